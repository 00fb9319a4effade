"""Training and validation data of a run that do not fit together."""

import dataclasses
import shutil

import pytest
import torch

from dcscale.data import DataError, read_manifest
from dcscale.data.shards.manifest import write_manifest
from dcscale.parallel import Environment
from dcscale.testing.runs import tiny_config
from dcscale.train.data import open_data, open_training_stream, open_validation_stream


def open_run(shards, *overrides):
    config = tiny_config(shards / "run", shards, *overrides)
    environment = Environment(0, 0, 1, 1, torch.device("cpu"))
    return open_data(config, environment, open_training_stream(config), open_validation_stream(config))


def test_held_out_shards_are_opened_and_no_validation_needs_none(shards):
    assert open_run(shards).validation is not None
    assert open_run(shards, f"data.validation={shards}/train", "validation.interval=0").validation is None


@pytest.mark.parametrize("of", ["folder", "link", "copy", "part", "mixture"])
def test_validation_with_data_that_is_trained_on_is_refused(shards, tmp_path, of):
    validation, more = tmp_path / "held-out", []
    name = read_manifest(shards / "train").shards[0].name
    if of == "folder":
        validation = shards / "train"
    elif of == "link":
        validation.symlink_to(shards / "train")
    elif of == "copy":
        shutil.copytree(shards / "train", validation)
    elif of == "part":
        shutil.copytree(shards / "validation", validation)
        shutil.copyfile(shards / "train" / name, validation / "copy.tar")
        manifest, taken = read_manifest(validation), read_manifest(shards / "train").shards[0]
        taken = dataclasses.replace(taken, name="copy.tar")
        write_manifest(validation, dataclasses.replace(manifest, shards=(*manifest.shards, taken)))
    else:
        validation.symlink_to(shards / "validation")
        sources = [{"name": part, "path": f"{shards}/{part}"} for part in ("train", "validation")]
        more = ["data.train=''", f"data.sources={sources}"]
    trained = "validation" if of == "mixture" else "train"
    message = (
        rf"^data\.validation: {validation} is not held out, it has data in common with the training data "
        rf"{shards}/{trained}: \d+ shards? of [\d,]+ tokens, such as {shards}/{trained}/.*\.tar and {validation}/.*; "
        rf"name other shards \(tools/make_shards\.py --hold-out makes them\), or set validation\.interval=0$"
    )
    with pytest.raises(DataError, match=message):
        open_run(shards, f"data.validation={validation}", *more)


def test_validation_with_another_tokenizer_is_refused(shards, tmp_path):
    shutil.copytree(shards / "validation", tmp_path / "other")
    manifest = read_manifest(tmp_path / "other")
    tokenizer = dataclasses.replace(manifest.tokenizer, fingerprint="1" * 64)
    write_manifest(tmp_path / "other", dataclasses.replace(manifest, tokenizer=tokenizer))
    with pytest.raises(DataError, match=r"^data\.validation: the tokenizer of .*/other has the fingerprint 111"):
        open_run(shards, f"data.validation={tmp_path / 'other'}")
