"""JSON that anybody may have written: what cannot be read is an error that names the file, in every reader."""

import json
import struct
from argparse import ArgumentParser

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import read_marker, read_state
from dcscale.checkpoint.training_state import TrainingStateReader
from dcscale.checkpoint.weights import read_index
from dcscale.cli import print_tables
from dcscale.convert import ConversionError, prepare
from dcscale.convert.tensor_files import open_tensors
from dcscale.data import DataError
from dcscale.data.prepare.journal import Journal, state_folder
from dcscale.data.shards.manifest import read_manifest
from dcscale.data.tokenizers import load_tokenizer
from dcscale.evaluation.task_format import read_samples
from dcscale.files import parse_json, read_json
from dcscale.observe import MetricsFile, read_metrics

DEEP = '{"format":' * 100_000
"""Python raises RecursionError here, which is no ValueError."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (DEEP, "it is nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "it is nested too deeply, in more than 100 levels"),
        ('{"a": [' + "[" * 100 + "]" * 100 + "]}", "it is nested too deeply, in more than 100 levels"),
        ("1" * 5000, r"the integer 1111111111\.\.\. has 5000 digits"),
        ('{"a": [-' + "1" * 300 + "]}", r"the integer -111111111\.\.\. has 301 digits"),
        (b'{"a": "\xff"}', "it is not UTF-8: .*0xff"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8: "),
        ("{'a': 1}", "it is not JSON: Expecting property name"),
        ("", "it is not JSON: Expecting value"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_cannot_be_read(content, reason, tmp_path):
    with pytest.raises(ValueError, match=f"^some.jsonl, line 3 cannot be read: {reason}"):
        parse_json(content, "some.jsonl, line 3")
    path = tmp_path / "some.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"^{path} cannot be read: {reason}"):
        read_json(path)


def test_json_that_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "ä"], "b": {}}
    for _ in range(90):
        value = {"c": value, "d": 10**299}
    assert parse_json(json.dumps(value), "here") == value
    assert parse_json(b"[]", "here") == []
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


def test_files_without_an_object(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="a.json must be a JSON object, but is a list"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="b.json cannot be read: No such file"):
        read_json(tmp_path / "b.json")


def safetensors_of(metadata: bytes) -> bytes:
    return struct.pack("<Q", len(metadata)) + metadata


READERS = {
    "marker": ("COMPLETE", read_marker, CheckpointError),
    "state": ("state.json", read_state, CheckpointError),
    "index of a checkpoint": (
        "model.safetensors.index.json",
        lambda folder: read_index(folder / "model.safetensors.index.json"),
        CheckpointError,
    ),
    "index of another model": ("model.safetensors.index.json", open_tensors, ConversionError),
    "index of .bin files": ("pytorch_model.bin.index.json", open_tensors, ConversionError),
    "header of safetensors": ("model.safetensors", open_tensors, ConversionError),
    "metadata of safetensors": ("rank-00000.safetensors", TrainingStateReader, CheckpointError),
    "config": ("config.json", lambda folder: prepare(folder, "dcscale"), ConversionError),
    "manifest": ("manifest.json", read_manifest, DataError),
    "tokenizer": ("tokenizer.json", load_tokenizer, DataError),
    "tasks": ("tasks.jsonl", lambda folder: read_samples(folder / "tasks.jsonl"), DataError),
    "metrics": ("metrics.jsonl", lambda folder: read_metrics(folder / "metrics.jsonl"), ValueError),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_deep_json(name, tmp_path):
    file, read, error = READERS[name]
    content = DEEP.encode()
    if name == "header of safetensors":
        content = safetensors_of(content)
    elif name == "metadata of safetensors":
        content = safetensors_of(json.dumps({"__metadata__": {"state": DEEP}}).encode())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(error, match=file.replace(".", r"\.")) as caught:
        read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_metrics_file_ends_before_a_line_that_is_not_json(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + DEEP + "\n")
    MetricsFile(tmp_path / "metrics.jsonl", 5, pytest.fail).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_damaged_build_does_not_stop_another(tmp_path):
    other = state_folder(tmp_path / "out") / "other"
    other.mkdir(parents=True)
    (other / "identity.json").write_text(DEEP)
    with Journal(tmp_path / "out", {"seed": 1}) as journal:
        assert journal.other_builds() == [f"{other}/identity.json cannot be read: it is nested too deeply"]


def test_a_result_of_a_benchmark_that_is_deep(tmp_path, capsys):
    (tmp_path / "result.json").write_text(DEEP)
    with pytest.raises(SystemExit):
        print_tables(ArgumentParser(), tmp_path / "result.json", str)
    assert "result.json cannot be read: it is nested too deeply" in capsys.readouterr().err
