"""Which checkpoint a run resumes from, and which checkpoints it rejects."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import read_config, seal, step_name
from dcscale.config import to_yaml
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.testing.runs import tiny_config
from dcscale.train.restore import resume
from dcscale.train.restore.resume import (
    check_compatible,
    checkpoint_to_resume,
    data_changes,
    find_resumable_checkpoint,
    hyperparameter_changes,
    read_state,
    restore_state,
    topology_changes,
)
from dcscale.train.state import TrainState

IDENTITY = {"data": "abc", "sequence_length": 32}
TOKENIZER = TokenizerInfo("byte", "0" * 64, 257, 256)


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "run", tmp_path / "shards")


def write(config, step, **changes):
    """Writes a checkpoint without weights."""
    folder = Path(config.run.folder) / "checkpoints" / step_name(step)
    (folder / "optimizer").mkdir(parents=True)
    extra = {"world_size": 2, "zero_stage": 1, "precision": "fp32", "global_batch_size": 8}
    extra |= {"tokenizer": asdict(TOKENIZER), **changes}
    state = TrainState(step=step, tokens=step * 256, sequences=step * 8, data_identity=IDENTITY, first_loss=2.0)
    state.padding_tokens, state.steps_without_targets, state.pending = 40, 1, [(1.5, 3)]
    (folder / "state.json").write_text(json.dumps(state.to_json(**extra)))
    (folder / "config.yaml").write_text(to_yaml(config))
    seal(folder)
    return folder


def check(folder, config, identity=IDENTITY, tokenizer=TOKENIZER):
    return check_compatible(folder, read_state(folder), read_config(folder), config, identity, tokenizer)


def test_a_new_run_has_no_checkpoint_to_resume_from(config):
    assert checkpoint_to_resume(config) is None


def flip(path):
    """Changes the content of a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "COMPLETE").unlink(), "COMPLETE is missing"),
        (lambda folder: flip(folder / "state.json"), "state.json has the SHA-256"),
    ],
)
def test_a_corrupt_newest_checkpoint_is_an_error_or_passed_over(config, harm, problem):
    older, newer = write(config, 2), write(config, 4)
    assert find_resumable_checkpoint(config, 0, 1) == (newer, {})
    harm(newer)
    with pytest.raises(
        CheckpointError, match=rf"corrupt: .*{problem}.* checkpoint.on_corrupt=previous to quarantine it"
    ):
        find_resumable_checkpoint(config, 0, 1)
    config.checkpoint.on_corrupt = "previous"
    found, corrupt = find_resumable_checkpoint(config, 0, 1)
    assert found == older
    assert list(corrupt) == [newer]
    assert problem in corrupt[newer]
    harm(older)
    with pytest.raises(CheckpointError, match=rf"all checkpoints in .* are corrupt; the newest: .*4/{problem[:5]}"):
        find_resumable_checkpoint(config, 0, 1)


def test_checkpoints_linked_to_another_disk_belong_to_the_run(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    older, newest = write(config, 2), write(config, 4)
    assert check(newest, config).branched_from is None
    (newest / "state.json").unlink()
    config.checkpoint.on_corrupt = "previous"
    checkpoint, corrupt = find_resumable_checkpoint(config, 0, 1)
    assert (checkpoint, list(corrupt)) == (older, [newest])


def test_a_corrupt_file_found_by_another_rank_counts(config, monkeypatch):
    write(config, 4)
    monkeypatch.setattr(
        resume, "gather_objects", lambda value: [value, "x/optimizer/rank-00001.safetensors is missing"]
    )
    with pytest.raises(CheckpointError, match="corrupt: x/optimizer/rank-00001.safetensors is missing"):
        find_resumable_checkpoint(config, 0, 2)


def test_a_corrupt_checkpoint_of_another_run_is_not_replaced_by_its_previous_one(config, tmp_path):
    older = write(config, 2)
    flip(older / "config.yaml")
    settings = [f"checkpoint.resume={older}", "checkpoint.on_corrupt=previous"]
    branch = tiny_config(tmp_path / "branch", tmp_path / "shards", *settings)
    with pytest.raises(CheckpointError, match=r"to resume from is corrupt: .*config.yaml has .*; name another one"):
        find_resumable_checkpoint(branch, 0, 1)


def test_a_named_checkpoint_of_the_run_itself_that_is_corrupt(config):
    write(config, 2)
    newer = write(config, 4)
    flip(newer / "config.yaml")
    config.checkpoint.resume, config.checkpoint.on_corrupt = str(newer), "previous"
    with pytest.raises(CheckpointError, match=r"names a corrupt checkpoint: .*config.yaml has .*; name another one"):
        find_resumable_checkpoint(config, 0, 1)


def test_a_branch_whose_newest_checkpoint_is_corrupt(config, tmp_path):
    older = write(config, 2)
    settings = [f"checkpoint.resume={older}", "checkpoint.on_corrupt=previous"]
    branch = tiny_config(tmp_path / "branch", tmp_path / "shards", *settings)
    first, second = (write(branch, step, branched_from=str(older)) for step in (5, 6))
    (second / "state.json").unlink()
    assert find_resumable_checkpoint(branch, 0, 1)[0] == first
    (first / "state.json").unlink()
    assert find_resumable_checkpoint(branch, 0, 1)[0] == older


def test_resume_never_rejects_a_folder_with_a_run(config):
    config.checkpoint.resume = "never"
    assert checkpoint_to_resume(config) is None
    write(config, 2)
    with pytest.raises(
        CheckpointError, match="already contains a run .* use another run.name or run.folder, or checkpoint.resume=auto"
    ):
        checkpoint_to_resume(config)


def test_a_named_checkpoint(config, tmp_path):
    older = write(config, 2)
    branch = tiny_config(tmp_path / "branch", tmp_path / "shards", f"checkpoint.resume={older}")
    assert checkpoint_to_resume(branch) == older


def test_the_same_command_resumes_a_branch(config, tmp_path):
    older = write(config, 2)
    branch = tiny_config(tmp_path / "branch", tmp_path / "shards", f"checkpoint.resume={older}")
    state = check(older, branch)
    assert state.branched_from == str(older)
    newest = write(branch, 5, branched_from=str(older))
    assert checkpoint_to_resume(branch) == newest
    assert check(newest, branch).branched_from == str(older)


def test_going_back_in_the_same_run_folder_is_rejected(config):
    older = write(config, 2)
    write(config, 4)
    config.checkpoint.resume = str(older)
    with pytest.raises(
        CheckpointError, match="has newer checkpoints, up to step-00000004: use another run.name or run.folder"
    ):
        checkpoint_to_resume(config)


def test_a_missing_checkpoint(config, tmp_path):
    config.checkpoint.resume = str(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="checkpoint.resume: .*nothing holds no checkpoint"):
        checkpoint_to_resume(config)
    config.checkpoint.resume = "Auto"
    with pytest.raises(CheckpointError, match="checkpoint.resume: Auto holds no checkpoint: .*; or use auto or never"):
        checkpoint_to_resume(config)


def test_state_round_trip(config):
    state = check(write(config, 3), config)
    assert (state.step, state.tokens, state.sequences, state.first_loss) == (3, 768, 24, 2.0)
    assert (state.padding_tokens, state.steps_without_targets) == (40, 1)
    assert state.pending == [(1.5, 3)]


def test_a_checkpoint_from_before_padding_was_counted_apart(config):
    content = read_state(write(config, 3))
    stream = SimpleNamespace(identity=IDENTITY, tokenizer=TOKENIZER, has_packed_rows=True)
    folder = Path(config.run.folder) / "checkpoints" / step_name(3)

    def restored():
        return restore_state(folder, content, read_config(folder), config, 2, stream)

    assert restored()[1] == []
    del content["padding_tokens"], content["steps_without_targets"]
    content["pending"] = [(0.0, 0), (1.5, 3)]
    state, lines = restored()
    assert (state.tokens, state.padding_tokens, state.steps_without_targets) == (768, 0, 0)
    assert state.pending == [(1.5, 3)]
    assert lines == ["resuming   with padding in the token count of the 3 steps so far, as the checkpoint counted it"]
    stream.has_packed_rows = False
    assert restored()[1] == []


def test_the_backend_may_change(config):
    folder = write(config, 3)
    other = replace(config.model, backend="reference", scratch_mib=7)
    assert check(folder, replace(config, model=other)).step == 3


def test_the_scratch_of_the_run_is_restored(config):
    assert check(write(config, 3, scratch_mib=1008), config).scratch_mib == 1008
    # Older checkpoints have it only in their config, where the default was a number.
    older = write(replace(config, model=replace(config.model, scratch_mib=256)), 4)
    assert check(older, config).scratch_mib == 256


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dim=64"], "model.dim is 32 in the checkpoint and 64 now: this changes the model"),
        (["model.attention=mha"], 'model.attention is "dcmha" in the checkpoint and "mha" now'),
        (["model.windows=[null]"], r"model.windows is \[8, null\] in the checkpoint and \[null\] now"),
        (["model.compose.rank=1"], "model.compose.rank is 2 in the checkpoint and 1 now"),
        (["train.global_batch_size=16"], "train.global_batch_size is 8 in the checkpoint and 16 now: it must match"),
        (["train.steps=2"], "it is at step 3, past train.steps 2"),
    ],
)
def test_another_model_or_run_is_rejected(config, tmp_path, overrides, message):
    folder = write(config, 3)
    with pytest.raises(CheckpointError, match=message):
        check(folder, tiny_config(tmp_path / "run", tmp_path / "shards", *overrides))


def test_other_data_are_rejected_with_all_differences(config, tmp_path):
    folder = write(config, 3)
    larger = tiny_config(tmp_path / "run", tmp_path / "shards", "train.global_batch_size=16")
    with pytest.raises(CheckpointError) as error:
        check(folder, larger, identity={**IDENTITY, "data": "xyz"})
    assert "train.global_batch_size is 8 in the checkpoint and 16 now" in str(error.value)
    assert "the data's data was 'abc' in the checkpoint and is 'xyz' now" in str(error.value)
    assert f"another run.name or run.folder, which checkpoint.init_from={folder} starts with" in str(error.value)
    assert ", or set checkpoint.allow_data_change=true" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        check(folder, larger)
    assert "allow_data_change" not in str(error.value)


def test_topology_changes_are_reported(config, tmp_path):
    content = read_state(write(config, 3))
    assert topology_changes(content, config, 2) == []
    other = tiny_config(tmp_path / "run", tmp_path / "shards", "parallel.zero_stage=3", "train.precision=bf16")
    assert [change.split(";")[0] for change in topology_changes(content, other, 4)] == [
        "ranks was 2 in the checkpoint and is 4 now",
        "parallel.zero_stage was 1 in the checkpoint and is 3 now",
        "train.precision was fp32 in the checkpoint and is bf16 now",
    ]


def test_hyperparameter_changes_are_reported(config, tmp_path):
    folder = write(config, 3)
    saved = read_config(folder)
    assert hyperparameter_changes(saved, config) == []
    rule = 'optimizer.rules=[{match: "*.compose.*", lr_scale: 0.5}]'
    overrides = ["optimizer.learning_rate=0.002", rule, "schedule.kind=constant", "train.steps=9", "log.interval=2"]
    assert hyperparameter_changes(
        read_config(folder), tiny_config(tmp_path / "run", tmp_path / "shards", *overrides)
    ) == [
        "train.steps was 8 in the checkpoint and is 9 now",
        "optimizer.learning_rate was 0.01 in the checkpoint and is 0.002 now",
        "optimizer.rules was [] in the checkpoint and is "
        '[{"match": "*.compose.*", "lr_scale": 0.5, "weight_decay": null}] now',
        'schedule.kind was "cosine" in the checkpoint and is "constant" now',
    ]


def test_other_data_may_be_allowed_but_not_another_tokenizer(config):
    folder = write(config, 3)
    config.checkpoint.allow_data_change = True
    identity = {**IDENTITY, "data": "xyz", "weights": [1, 2]}
    state = check(folder, config, identity=identity)
    assert (state.sequences, state.data_identity) == (24, IDENTITY)
    assert data_changes(state.data_identity, identity) == [
        "the data's data was 'abc' in the checkpoint and is 'xyz' now: the sequences would differ",
        "the data's weights was None in the checkpoint and is [1, 2] now: the sequences would differ",
    ]
    with pytest.raises(CheckpointError, match="another tokenizer: token ids would decode to different text"):
        check(folder, config, identity=identity, tokenizer=replace(TOKENIZER, fingerprint="1" * 64))


def test_a_model_without_optimizer_state_cannot_be_resumed(config):
    folder = write(config, 3)
    (folder / "optimizer").rmdir()
    config.run.folder += "-other"
    config.checkpoint.resume = str(folder)
    with pytest.raises(CheckpointError, match="contains a model without optimizer state"):
        checkpoint_to_resume(config)


def test_corrupt_parts_are_named(config):
    folder = write(config, 3)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json cannot be read"):
        read_state(folder)
    (folder / "state.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="state.json must be a JSON object, but is a list"):
        read_state(folder)
    (folder / "state.json").write_text('{"format": 7}')
    with pytest.raises(CheckpointError, match="format 7, this version of dcscale reads 1"):
        read_state(folder)
    other = write(config, 5)
    (other / "config.yaml").write_text("model: {colour: red}")
    with pytest.raises(CheckpointError, match=r"(?s)config of .* cannot be read.*colour"):
        check(other, config)
