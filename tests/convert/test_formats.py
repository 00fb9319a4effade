"""The list of formats: each declares its options, command lines offer them, and a new one needs only its own module."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch

from dcscale import cli
from dcscale.config import Config
from dcscale.convert import DTYPES, TARGETS, ConversionError, conversion, convert, detect, prepare
from dcscale.convert.formats import FORMATS
from dcscale.convert.tensor_files import open_tensors
from dcscale.convert.tensor_map import Format, Imported, Source, same_names_plan
from dcscale.testing.models import tensors_of, tiny_config, write_checkpoint


def test_command_lines_offer_what_the_formats_declare():
    options = Counter(name for format in FORMATS for name in format.options)
    assert {name for name, formats in options.items() if formats > 1} == {"seed", "model"}  # of plain Transformers
    assert cli.SOURCE_OPTIONS.keys() <= options.keys()
    assert (TARGETS, tuple(DTYPES)) == (cli.MODEL_TARGETS, cli.MODEL_DTYPES)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_load_takes_the_declared_options(format):
    source, *options = inspect.signature(format.load).parameters
    assert (source, tuple(options)) == ("source", format.options)


def test_an_unknown_option_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "model", tiny_config())
    with pytest.raises(TypeError, match="no format has the options colour"):
        prepare(source, "dcscale", colour="red")


def test_a_new_format_needs_nothing_but_its_declaration(tmp_path, monkeypatch):
    model = tiny_config()

    def load(source, layers=2):
        return Imported(
            open_tensors(source.folder), Config(model=tiny_config(layers=layers)), same_names_plan(model), ["a note"]
        )

    def find(path):
        return Source("flat", path, f"flat folder {path}") if (path / "flat.txt").exists() else None

    formats = (*FORMATS, Format("flat", "flat.txt", find, load, options=("layers",)))
    monkeypatch.setattr(detect, "FORMATS", formats)
    monkeypatch.setattr(conversion, "FORMATS", formats)
    monkeypatch.setattr(conversion, "_FORMAT_BY_NAME", {format.name: format for format in formats})
    source = write_checkpoint(tmp_path / "model", model)
    (source / "weights").rename(tmp_path / "flat")
    (tmp_path / "flat" / "flat.txt").write_text("")
    done = convert(tmp_path / "flat", tmp_path / "back", "dcscale", layers=2)
    assert (done.source.format, done.notes[0]) == ("flat", "a note")
    given, converted = tensors_of(tmp_path / "flat"), tensors_of(tmp_path / "back")
    assert given.keys() == converted.keys()
    assert all(torch.equal(given[name], converted[name]) for name in given)
    with pytest.raises(ConversionError, match="--layers: only for flat models, but the source is a dcscale"):
        prepare(tmp_path / "back", "upstream", layers=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"looked for COMPLETE .*; flat.txt"):
        prepare(tmp_path / "empty", "dcscale")
