"""What checkpoint.init_from may name, and what is said where it does not fit the run."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import seal
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from dcscale.testing.models import write_checkpoint
from dcscale.testing.runs import tiny_config
from dcscale.train.restore.init_from import init_from_changes, initial_weights

BYTES = TokenizerInfo("byte", ByteTokenizer.fingerprint, 257, 256)


@pytest.fixture
def begin(tmp_path):
    """Begins with a model, by default that of the run, written under ``model``; what is told of it."""

    def call(*overrides, name="model", tokenizer=BYTES):
        folder = tmp_path / name
        config = tiny_config(tmp_path / "run", tmp_path, f"checkpoint.init_from={folder}", *overrides)
        return initial_weights(config, tokenizer)

    write_checkpoint(tmp_path / "model", tiny_config(tmp_path, tmp_path).model)
    return call


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def change_state(folder, **changes):
    (folder / "COMPLETE").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))
    seal(folder)


def test_a_model_folder_or_the_newest_checkpoint_of_a_run(begin, tmp_path):
    found = begin()
    assert (found.source, found.warnings) == (tmp_path / "model", [])
    assert found.weights.read("norm.weight").shape == (32,)
    model = tiny_config(tmp_path, tmp_path).model
    newest = write_checkpoint(tmp_path / "other" / "checkpoints" / "step-00000007", model, training=True)
    assert begin(name="other").source == newest


def test_settings_that_leave_the_shapes_may_change_and_are_told(begin, tmp_path):
    found = begin("model.rope_base=500000.0", "model.windows=[4]", "model.backend=reference")
    there = tmp_path / "model"
    assert found.warnings == [
        f"model.rope_base is 10000.0 in {there} and 500000.0 here: the weights fit, but were trained with the former",
        f"model.windows is [8, null] in {there} and [4] here: the weights fit, but were trained with the former",
    ]


def test_weights_that_do_not_fit_are_all_named(begin):
    with pytest.raises(CheckpointError) as error:
        begin("model.attention=mha", "model.ffn_dim=64")
    for part in (
        "checkpoint.init_from: ",
        "blocks.1.attention.compose.qkw is unknown to the model",
        "blocks.0.ffn.up.weight has shape (48, 32), the model wants (64, 32)",
        "model/config.yaml",
    ):
        assert part in str(error.value)


def test_what_is_not_there_or_damaged(begin, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"checkpoint.init_from: .*nothing holds no checkpoint.*convert_checkpoint.py"
    ):
        begin(name="nothing")
    shard = tmp_path / "model" / "weights" / "model-00001.safetensors"
    flip_last_byte(shard)
    with pytest.raises(CheckpointError, match=r"checkpoint.init_from: .*00001.* has the SHA-256 .*copy it again"):
        begin()
    shard.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"checkpoint.init_from: .* has 5 bytes, .* were written"):
        begin()


def test_a_rank_compares_its_share_of_the_files(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path, f"checkpoint.init_from={tmp_path / 'model'}")
    model = write_checkpoint(tmp_path / "model", config.model, shard_bytes=1)
    shards = sorted((model / "weights").glob("*.safetensors"))
    for shard in shards:
        flip_last_byte(shard)
        refused = 0
        for rank in range(3):
            try:
                initial_weights(config, BYTES, rank, 3)
            except CheckpointError:
                refused += 1
        assert refused == 1, shard
        flip_last_byte(shard)


def test_another_tokenizer(begin, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match="the same token would mean another text.* --tokenizer byte"):
        begin(tokenizer=TokenizerInfo("tokenizer.json", "0" * 64, 257, 256))
    change_state(folder, tokenizer={"spec": "tokenizer.json", "eos_id": 1})
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        begin()
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<eos>": 2}, unk_token="a")).save(str(folder / "tokenizer.json"))
    change_state(folder)
    with pytest.raises(CheckpointError, match=f"--tokenizer {folder / 'tokenizer.json'}"):
        begin()
    own = HuggingFaceTokenizer(folder / "tokenizer.json", 1).save(tmp_path)
    assert begin(tokenizer=own).warnings == []
    other = HuggingFaceTokenizer(folder / "tokenizer.json", 2).save(tmp_path)
    assert begin(tokenizer=other).warnings == [f"a document ends with token 1 for {folder}, with 2 in the data"]


def test_an_unknown_tokenizer_is_told(begin, tmp_path):
    change_state(tmp_path / "model", tokenizer=None)
    assert begin().warnings == [
        f"{tmp_path / 'model'} does not say which tokenizer it was trained with: it should be that of the data"
    ]


def test_a_run_that_goes_on_says_if_it_began_otherwise(tmp_path):
    began = str(tmp_path / "run" / "checkpoints" / "step-00000007")
    for same in (began, str(tmp_path / "run"), None):
        assert init_from_changes(began, same) == []
    assert init_from_changes(None, "models/a") == [
        "this run began with random weights; checkpoint.init_from is only read when a run begins"
    ]
    assert "began with the weights of " + began in init_from_changes(began, str(tmp_path / "other"))[0]
