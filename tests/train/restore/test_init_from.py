"""Models that checkpoint.init_from may name, and errors and warnings for those that do not fit the run."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import seal
from dcscale.config import to_yaml
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from dcscale.testing.models import write_checkpoint
from dcscale.testing.runs import tiny_config
from dcscale.train.restore.init_from import initial_weights
from dcscale.train.restore.resume import init_from_changes

BYTES = TokenizerInfo("byte", ByteTokenizer.fingerprint, 257, 256)


@pytest.fixture
def start(tmp_path):
    """A function that opens initial weights, by default of a model with the run's settings in the folder ``model``."""

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


def test_a_model_folder_or_the_newest_checkpoint_of_a_run(start, tmp_path):
    found = start()
    assert (found.source, found.warnings) == (tmp_path / "model", [])
    assert found.weights.read("norm.weight").shape == (32,)
    model = tiny_config(tmp_path, tmp_path).model
    newest = write_checkpoint(tmp_path / "other" / "checkpoints" / "step-00000007", model, training=True)
    assert start(name="other").source == newest


def test_settings_that_keep_the_shapes_may_change_with_a_warning(start, tmp_path):
    found = start("model.rope_base=500000.0", "model.windows=[4]", "model.backend=reference")
    source, rest = tmp_path / "model", "in this run: the weights fit, but were trained with the former"
    assert found.warnings == [
        f"model.rope_base is 10000.0 in {source} and 500000.0 {rest}",
        f"model.windows is [8, null] in {source} and [4] {rest}",
    ]


def test_sequences_longer_than_those_of_the_source_give_a_warning(start, tmp_path):
    config = tiny_config(tmp_path, tmp_path)  # sequences of 32
    for name in ("run-of-32", "model-of-32"):
        folder = write_checkpoint(tmp_path / name, config.model, training=name.startswith("run"))
        (folder / "COMPLETE").unlink()
        (folder / "config.yaml").write_text(to_yaml(config))
        seal(folder)
    assert start(name="run-of-32").warnings == []
    assert start("data.sequence_length=64", name="run-of-32").warnings == [
        f"{tmp_path / 'run-of-32'} was trained on sequences of 32 tokens and data.sequence_length is 64: positions "
        "beyond the former are new to it; model.rope_base or model.rope_scaling may help"
    ]
    assert start("data.sequence_length=64", name="model-of-32").warnings == []  # it may have been trained on any


def test_all_weights_that_do_not_fit_are_listed(start):
    with pytest.raises(CheckpointError) as error:
        start("model.attention=mha", "model.ffn_dim=64")
    for part in (
        "checkpoint.init_from: ",
        "blocks.1.attention.compose.qkw is unknown to the model",
        "blocks.0.ffn.up.weight has shape (48, 32), the model expects (64, 32)",
        "model/config.yaml",
    ):
        assert part in str(error.value)


def test_a_missing_or_corrupt_model(start, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"checkpoint.init_from: .*nothing holds no checkpoint.*convert_checkpoint.py"
    ):
        start(name="nothing")
    shard = tmp_path / "model" / "weights" / "model-00001.safetensors"
    flip_last_byte(shard)
    with pytest.raises(CheckpointError, match=r"checkpoint.init_from: .*00001.* has the SHA-256 .*copy it again"):
        start()
    shard.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"checkpoint.init_from: .* has 5 bytes, .* were written"):
        start()


def test_each_rank_verifies_its_share_of_the_files(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path, f"checkpoint.init_from={tmp_path / 'model'}")
    model = write_checkpoint(tmp_path / "model", config.model, shard_bytes=1)
    shards = sorted((model / "weights").glob("*.safetensors"))
    for shard in shards:
        flip_last_byte(shard)
        rejected = 0
        for rank in range(3):
            try:
                initial_weights(config, BYTES, rank, 3)
            except CheckpointError:
                rejected += 1
        assert rejected == 1, shard
        flip_last_byte(shard)


def test_another_tokenizer(start, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match="token ids would decode to different text.* --tokenizer byte"):
        start(tokenizer=TokenizerInfo("tokenizer.json", "0" * 64, 257, 256))
    change_state(folder, tokenizer={"spec": "tokenizer.json", "eos_id": 1})
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        start()
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<eos>": 2}, unk_token="a")).save(str(folder / "tokenizer.json"))
    change_state(folder)
    with pytest.raises(CheckpointError, match=f"--tokenizer {folder / 'tokenizer.json'}"):
        start()
    own = HuggingFaceTokenizer(folder / "tokenizer.json", 1).save(tmp_path)
    assert start(tokenizer=own).warnings == []
    other = HuggingFaceTokenizer(folder / "tokenizer.json", 2).save(tmp_path)
    assert start(tokenizer=other).warnings == [f"the end-of-document token is 1 in {folder} and 2 in the data"]


def test_an_unknown_tokenizer_is_a_warning(start, tmp_path):
    change_state(tmp_path / "model", tokenizer=None)
    assert start().warnings == [
        f"{tmp_path / 'model'} does not record its tokenizer: make sure that the data have the same one"
    ]


def test_a_resumed_run_reports_other_initial_weights(tmp_path):
    source = str(tmp_path / "run" / "checkpoints" / "step-00000007")
    for same in (source, str(tmp_path / "run"), None):
        assert init_from_changes(source, same) == []
    assert init_from_changes(None, "models/a") == [
        "this run was started from random weights; checkpoint.init_from has no effect on a resume"
    ]
    assert "started from the weights of " + source in init_from_changes(source, str(tmp_path / "other"))[0]
