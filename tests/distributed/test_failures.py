"""When one rank fails, all ranks fail; existing checkpoints stay; nothing incomplete is taken for complete."""

import errno
import json
import os
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcscale.checkpoint import CheckpointError, checkpointer, checkpoints_of, find_checkpoint
from dcscale.data import DataError
from dcscale.data.stream import lookahead
from dcscale.files import may_succeed_later
from dcscale.observe import Console
from dcscale.parallel import (
    RankError,
    broadcast_from_rank0,
    discover,
    run_on_all_ranks,
    start_distributed,
)
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_here, whole_weights
from dcscale.train import StopReason, build_trainer
from dcscale.train.hooks import Hook
from dcscale.train.numerics import DivergedError

pytestmark = pytest.mark.distributed


def build(config, *extra_hooks):
    environment = discover()
    start_distributed(environment, config.parallel.start_timeout_minutes)
    trainer = build_trainer(config, environment, Console(enabled=False))
    trainer.hooks = [*extra_hooks, *trainer.hooks]
    return trainer


def failure(call):
    """Type and text of the exception that ``call`` raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def _together():
    environment = discover()
    start_distributed(environment, 1)

    def fail_on_one():
        if environment.rank == 1:
            raise ValueError("out of luck")
        return environment.rank

    def decide():
        assert environment.is_main
        return "decided"

    def refuse():
        raise CheckpointError("refused")

    def fill_disk():
        raise CheckpointError("not written") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError) as disk_is_full:
        broadcast_from_rank0(fill_disk)
    assert may_succeed_later(disk_is_full.value)  # on both ranks, so that they end with the same code

    return (
        failure(lambda: run_on_all_ranks(fail_on_one)),
        broadcast_from_rank0(decide),
        failure(lambda: broadcast_from_rank0(refuse)),
    )


def test_ranks_fail_and_decide_together():
    (alone0, decided0, refused0), (alone1, decided1, refused1) = run_distributed(_together, 2)
    assert alone0 == (RankError, "rank 1: ValueError: out of luck")
    assert alone1 == (ValueError, "out of luck")
    assert decided0 == decided1 == "decided"
    assert refused0 == refused1 == (CheckpointError, "refused")


class BreakData(Hook):
    """Makes the loader of rank 1 fail after step 2."""

    name = "break_data"

    def after_step(self, trainer):
        if trainer.state.step == 2 and trainer.environment.rank == 1:

            def fail(*arguments):
                raise DataError("shard-000001.tar has the wrong checksum")

            for source in trainer.loader._stream.sources:
                source.blocks.take = fail


def _data_fails(config):
    lookahead._GROUP_SEQUENCES = 1  # otherwise all steps of this small run are planned at once, before step 1
    trainer = build(config, BreakData())
    return (*failure(trainer.fit), trainer.state.step)


def test_a_data_failure_on_one_rank_stops_all_with_its_message_and_a_checkpoint(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "data.prefetch_steps=0")
    for kind, text, step in run_distributed(_data_fails, 2, config):
        assert kind is DataError
        assert text == "the data of step 3 could not be read: rank 1: shard-000001.tar has the wrong checksum"
        assert step == 2
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"


class BreakValidationData(Hook):
    """Makes the validation data of rank 1 fail after step 3."""

    name = "break_validation_data"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            (validation,) = (hook for hook in trainer.hooks if hook.name == "validation")

            def fail(*arguments):
                raise DataError("shard-000000.tar is shorter than the manifest says")

            for source in validation._loader._stream.sources:
                source.blocks.take = fail


def _validation_data_fail(config):
    return failure(build(config, BreakValidationData()).fit)


def test_a_validation_data_failure_on_one_rank_stops_all_with_its_message_and_a_checkpoint(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "checkpoint.interval=3")
    for kind, text in run_distributed(_validation_data_fail, 2, config):
        assert kind is DataError
        assert text == "rank 1: shard-000000.tar is shorter than the manifest says"
    # The checkpoint that was being written, and one of the following step, whose validation failed.
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    assert find_checkpoint(tmp_path / "run").name == "step-00000004"


class Poison(Hook):
    """Makes a gradient of rank 1 infinite after step 3."""

    name = "poison"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            parameter = next(p for n, p in trainer.engine.module.named_parameters() if n.endswith("norm.weight"))
            parameter.register_hook(lambda gradient: gradient * float("inf"))


def _gradient_explodes(configs):
    results = []
    for config in configs:
        trainer = build(config, Poison())
        kind, text = failure(trainer.fit)
        weights = whole_weights(trainer.engine)
        finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
        results.append((kind, text, trainer.state.step, finite, len(weights)))
        trainer.close()
    return results


def test_a_gradient_that_is_not_finite_stops_before_the_update_with_a_checkpoint(shards, tmp_path):
    """Where the engine computes the norm, where DeepSpeed skips the update itself, and where neither is so."""
    cases = [(0, "fp32"), (1, "fp32"), (3, "bf16")]
    configs = [
        tiny_config(
            tmp_path / f"{stage}-{precision}",
            shards,
            f"parallel.zero_stage={stage}",
            f"train.precision={precision}",
            "checkpoint.interval=2",
            "validation.interval=0",
            "log.compose_interval=0",
        )
        for stage, precision in cases
    ]
    main, other = run_distributed(_gradient_explodes, 2, configs)
    for case, config, (kind, text, step, finite, tensors), (kind1, *_) in zip(cases, configs, main, other):
        assert kind is kind1 is DivergedError, case
        assert text.startswith("step 4, sequences 24 to 31: loss "), (case, text)
        assert "; the loss is finite on every rank. The weights were not updated. " in text
        newest = f"{config.run.folder}/checkpoints/step-00000003"
        assert text.endswith(f"Newest checkpoint: {newest}")
        assert find_checkpoint(tmp_path / config.run.folder).name == "step-00000003"
        assert step == 3
        assert finite, case
        assert tensors > 10


class SignalOneRank(Hook):
    """Sends SIGTERM to rank 1 after step 3."""

    name = "signal"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _signalled(config):
    trainer = build(config, SignalOneRank())
    stop_reason = trainer.fit()
    trainer.close()
    return stop_reason, trainer.state.step


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards)
    assert run_distributed(_signalled, 2, config) == [(StopReason.SIGNAL, 3)] * 2
    assert find_checkpoint(tmp_path / "run").name == "step-00000003"


class BreakSaving(Hook):
    """Makes rank 1 fail to write its part of a checkpoint from step 4 on."""

    name = "break_saving"

    def after_step(self, trainer):
        if trainer.state.step == 4 and trainer.environment.rank == 1:

            def fail(*arguments):
                raise OSError("No space left on device")

            checkpointer.write_fragments = fail


def _saving_fails(config):
    return failure(build(config, BreakSaving()).fit)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_that_fails_on_one_rank_fails_on_all_and_the_old_one_stays(shards, tmp_path, stage):
    """Immediately: a rank that waited for another one would only fail after the timeout of 30 minutes."""
    config = tiny_config(tmp_path / "run", shards, "checkpoint.interval=2", f"parallel.zero_stage={stage}")
    for kind, text in run_distributed(_saving_fails, 2, config, timeout=120):
        assert kind is CheckpointError
        assert "step-00000004 was not written: rank 1: OSError: No space left on device" in text
    assert [p.name for p in checkpoints_of(tmp_path / "run")] == ["step-00000002"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000002\n"


def _saving_fails_but_training_continues(config):
    trainer = build(config, BreakSaving())
    return *failure(trainer.fit), trainer.state.step


def test_with_on_error_warn_training_continues_without_the_checkpoint(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "checkpoint.interval=2", "checkpoint.on_error=warn")
    for kind, text, step in run_distributed(_saving_fails_but_training_continues, 2, config):
        # The last checkpoint must succeed, or the result of the run would be lost.
        assert kind is CheckpointError
        assert "step-00000008 was not written: rank 1: OSError: No space left on device" in text
        assert step == 8
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # The checkpoint of step 6 may not have failed yet.
    assert [r for r in records if "loss" in r][-1]["checkpoint_failures"] in (1, 2)
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"


def _train_each(configs):
    results = []
    for config in configs:
        try:
            results.append(str(train_here(config)[0].latest_checkpoint))
        except CheckpointError as error:
            results.append(str(error))
    return results


def test_what_a_later_start_finds(shards, tmp_path):
    """Several starts, each in the state that the previous one left."""
    run = tmp_path / "run"
    (run / "checkpoints" / ".unfinished-step-00000001").mkdir(parents=True)
    base = ["checkpoint.interval=2", "checkpoint.keep_last=2", "validation.interval=3"]
    rules = "optimizer.rules=[{match: 'blocks.*.k.weight', lr_scale: 0.5}]"
    branch = [*base, f"checkpoint.resume={run / 'checkpoints' / 'step-00000006'}"]
    first = [
        tiny_config(run, shards, *base, rules),
        tiny_config(run, shards, *base, rules),  # complete: nothing to do
        tiny_config(tmp_path / "branch", shards, *branch, rules, "train.stop_after=7"),
        tiny_config(tmp_path / "branch", shards, *branch, rules),
    ]
    ((end, again, branched, resumed),) = run_distributed(_train_each, 1, first)
    assert end == again == str(run / "checkpoints" / "step-00000008")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000006", "step-00000008"]
    assert branched.endswith("branch/checkpoints/step-00000007")
    assert resumed.endswith("branch/checkpoints/step-00000008")

    # Records of a completed run are there once, also those written after its last step.
    steps = [
        r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "bits_per_byte" in r
    ]
    assert steps == [3, 6, 8]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/validation")] == [3, 6, 8]

    # A corrupt checkpoint is reported; with on_corrupt=previous it is quarantined, and does not count for keep_last.
    part = run / "checkpoints" / "step-00000008" / "optimizer" / "rank-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    stop = [*base, rules, "train.stop_after=7", "checkpoint.keep_last=1"]
    later = [tiny_config(run, shards, *stop), tiny_config(run, shards, *stop, "checkpoint.on_corrupt=previous")]
    ((error, went_back),) = run_distributed(_train_each, 1, later)
    assert f"the newest checkpoint is corrupt: {part} has the SHA-256" in error
    assert went_back == str(run / "checkpoints" / "step-00000007")
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["latest", "quarantined-step-00000008", "step-00000007"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000007\n"


def _clip_after_resume(configs):
    norms = []
    for config in configs:
        trainer, _ = train_here(config)
        norms.append(getattr(trainer.engine._engine.optimizer, "clip_grad", None))
    return norms


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_uses_the_clipping_of_its_own_config(shards, tmp_path, precision):
    configs = []
    for stage in (1, 2, 3):
        base = [f"parallel.zero_stage={stage}", f"train.precision={precision}", "validation.interval=0"]
        configs.append(tiny_config(tmp_path / f"{stage}", shards, *base, "train.stop_after=1"))
        configs.append(
            tiny_config(tmp_path / f"{stage}", shards, *base, "train.stop_after=2", "train.gradient_clipping=0.001")
        )
    (clips,) = run_distributed(_clip_after_resume, 1, configs)
    assert clips == [1.0, 0.001] * 3
