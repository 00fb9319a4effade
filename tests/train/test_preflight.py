"""What keeps a run from starting is found all at once, without a process group, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import seal
from dcscale.config import to_yaml
from dcscale.data import DataError
from dcscale.parallel import Environment
from dcscale.testing.models import write_checkpoint
from dcscale.testing.runs import numbered_shards, tiny_config, write_token_shards
from dcscale.train import preflight as preflight_module
from dcscale.train.optimizer import RuleError
from dcscale.train.preflight import Preflight, PreflightError, preflight

CPU = torch.device("cpu")


def environment(world_size: int = 1) -> Environment:
    return Environment(0, 0, world_size, world_size, CPU)


def reasons(run: Path, shards: Path, *overrides: str) -> list[str]:
    return preflight(tiny_config(run, shards, *overrides), environment(), quick=True).reasons


def contents(folder: Path) -> dict[str, int]:
    """Every path below a folder, with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_can_start_has_everything_and_nothing_is_written(shards: Path, tmp_path: Path) -> None:
    before = contents(shards), contents(tmp_path)
    config = tiny_config(tmp_path / "new" / "run", shards, "samples.interval=1", f"data.cache={tmp_path / 'cache'}")
    for world_size, quick in ((1, False), (4, True)):
        found = preflight(config, environment(world_size), quick)
        data, start, hooks = found.result()
        assert found.reasons == []
        assert (data, start, hooks) == (found.data, found.start, found.hooks)
        assert data.validation is not None
        assert start.state.step == 0
        assert "samples" in [hook.name for hook in hooks]
    assert (contents(shards), contents(tmp_path)) == before


REFUSED = [
    (["data.train={tmp}/no"], ["data.train: {tmp}/no: no such folder"]),
    (["data.validation={tmp}/no"], ["data.validation: {tmp}/no: no such folder"]),
    (["data.validation={shards}/train"], ["data.validation: {shards}/train is not held out"]),
    (
        ["data.train=", "data.sources=[{{name: a, path: '{shards}/train'}}, {{name: b, path: '{tmp}/no'}}]"],
        ["data.sources: {tmp}/no: no such folder"],
    ),
    (
        ["model.vocab_size=256"],
        [
            "data.train: {shards}/train/manifest.json: tokenizer.vocab_size is 257, but model.vocab_size is 256",
            "data.val",
        ],
    ),
    (["data.sequence_length=100000000"], ["data.train: {shards}/train/manifest.json: totals.tokens is", "data.val"]),
    (["checkpoint.init_from={tmp}/no"], ["checkpoint.init_from: {tmp}/no holds no checkpoint"]),
    (["checkpoint.resume={tmp}/no"], ["checkpoint.resume: {tmp}/no holds no checkpoint"]),
    (["optimizer.rules=[{{match: nothing}}]"], ["optimizer.rules: 'nothing' applies to no parameter"]),
    (["run.folder={shards}/train/manifest.json"], ["run.folder {shards}/train/manifest.json cannot be used: {shards}"]),
    (["data.cache={shards}/train/manifest.json"], ["data.cache is {shards}/train/manifest.json, but cannot be used: "]),
    (
        ["data.train={tmp}/no", "data.validation=", "validation.interval=0", "checkpoint.init_from={tmp}/no"],
        ["data.train: ", "checkpoint.init_from: "],
    ),
]


@pytest.mark.parametrize(("overrides", "messages"), REFUSED, ids=[overrides[-1] for overrides, _ in REFUSED])
def test_a_run_that_cannot_start(shards: Path, tmp_path: Path, overrides: list[str], messages: list[str]) -> None:
    places = {"shards": shards, "tmp": tmp_path}
    found = reasons(tmp_path / "run", shards, *(text.format(**places) for text in overrides))
    assert [
        text[: len(message)] for text, message in zip(found, [m.format(**places) for m in messages], strict=True)
    ] == [message.format(**places) for message in messages]
    assert list(tmp_path.iterdir()) == []


def test_folders_without_permission_to_write(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert reasons(tmp_path / "a" / "run", shards, f"data.cache={tmp_path / 'b'}") == [
        f"data.cache is {tmp_path}/b, but cannot be used: no permission to write to {tmp_path}; name another, or null",
        f"run.folder {tmp_path}/a/run cannot be used: no permission to write to {tmp_path}; use another folder",
    ]


def test_every_shard_is_looked_for_by_a_quick_check(tmp_path: Path) -> None:
    write_token_shards(tmp_path / "train", numbered_shards([100, 101]), vocab_size=257)
    (tmp_path / "train" / "shard-001.tar").unlink()
    config = tiny_config(tmp_path / "run", tmp_path, "validation.interval=0")
    assert preflight(config, environment(2)).reasons == []  # not in the share of rank 0
    assert "shard-001.tar: the manifest names this shard" in preflight(config, environment(2), quick=True).reasons[0]


def test_a_server_that_does_not_answer_is_given_up_soon(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight_module._impatient(tiny_config(tmp_path, shards, f"data.cache={tmp_path}").data)
    assert (found.timeout_seconds, found.retry_total_seconds, found.cache) == (10, 20, None)
    fast = tiny_config(tmp_path, shards, "data.timeout_seconds=1", "data.retry_total_seconds=0.1").data
    assert preflight_module._impatient(fast) == fast
    overrides = [
        "data.retry_total_seconds=0.01",
        "data.train=http://127.0.0.1:9/x",
        "data.validation=http://127.0.0.1:9/y",
    ]
    found_reasons = reasons(tmp_path / "run", shards, *overrides)
    assert [text.partition(": cannot be read")[0] for text in found_reasons] == [
        f"data.{name}: http://127.0.0.1:9/{folder}/manifest.json"
        for name, folder in (("train", "x"), ("validation", "y"))
    ]


def test_a_checkpoint_is_compared_without_reading_it(shards: Path, tmp_path: Path) -> None:
    model = tiny_config(tmp_path, shards).model
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", model, training=True)
    start = [f"checkpoint.init_from={checkpoint}"]
    weights = next((checkpoint / "weights").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert reasons(tmp_path / "other", shards, *start) == []
    config = tiny_config(tmp_path / "other", shards, *start)
    assert "has the SHA-256" in preflight(config, environment()).reasons[0]
    weights.write_bytes(content[:-1])
    assert "bytes" in reasons(tmp_path / "other", shards, *start)[0]
    weights.write_bytes(content)
    found = reasons(tmp_path / "other", shards, *start, "model.dim=64", "data.train=no")
    assert ["data.train: no: no such folder" in found[0], "does not fit the model" in found[1]] == [True, True]


def test_resuming_is_checked_also_without_the_data(shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", shards)
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", config.model, training=True)
    (checkpoint / "COMPLETE").unlink()
    (checkpoint / "config.yaml").write_text(to_yaml(config))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "global_batch_size": 8, "data_identity": {}}))
    seal(checkpoint)
    for data in ([], ["data.train=no"]):
        found = reasons(tmp_path / "run", shards, "model.ffn_dim=64", "train.global_batch_size=16", *data)
        assert found[-1].startswith(
            f"cannot resume from {checkpoint}: model.ffn_dim is 48 in the checkpoint and 64 now"
        )
        assert f"run.name or run.folder, which checkpoint.init_from={checkpoint} starts with these weights" in found[-1]
        assert len(found) == 1 + len(data)


def test_a_metrics_file_of_something_else_is_found(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert "metrics.jsonl, line 1: is not a record of a run" in reasons(tmp_path / "run", shards)[0]


def test_one_problem_is_raised_as_it_is_and_several_together(shards: Path, tmp_path: Path) -> None:
    one = preflight(tiny_config(tmp_path / "run", shards, "data.train=no"), environment())
    with pytest.raises(DataError, match="^data.train: no: no such folder"):
        one.result()
    overrides = ["data.train=no", "optimizer.rules=[{match: nothing}]", "checkpoint.init_from=no"]
    several = preflight(tiny_config(tmp_path / "run", shards, *overrides), environment())
    with pytest.raises(PreflightError) as caught:
        several.result()
    text = str(caught.value)
    assert text.startswith("the run has 3 problems and cannot start:\n  - data.train: no: no such folder")
    assert text.count("\n  - ") == 3


def test_faults_of_the_program_are_not_taken_for_problems_of_the_run() -> None:
    found = Preflight()
    assert found.attempt(lambda: 3) == 3
    assert found.attempt(lambda: 1 // 0) is None
    found.attempt(lambda: _raise(RuleError("no")))
    found.attempt(lambda: _raise(CheckpointError("no")))
    with pytest.raises(ZeroDivisionError):
        found.result()
    found.problems.pop(0)
    assert found.reasons == ["no"]  # the same text once


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(("second", "retry"), [(True, True), (False, False)])
def test_several_reasons_may_be_gone_later_only_if_each_may(second: bool, retry: bool) -> None:
    found = Preflight(problems=[DataError("data.train", retry=True), DataError("data.validation", retry=second)])
    with pytest.raises(PreflightError, match="the run has 2 problems") as raised:
        found.result()
    assert raised.value.retry is retry
