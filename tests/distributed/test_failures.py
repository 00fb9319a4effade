"""When one rank fails, all know; what was there stays; nothing half-written is taken for whole."""

import os
import signal
from pathlib import Path

import pytest

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.data import DataError
from dcscale.observe import Console
from dcscale.parallel import NonFiniteError, RankError, decided_by_main, discover, on_every_rank, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import make_shards, tiny_config, train_here
from dcscale.train import Ending, build_trainer
from dcscale.train.hooks import Hook

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def build(config, *extra_hooks):
    environment = discover()
    start_distributed(environment, config.parallel.timeout_minutes)
    trainer = build_trainer(config, environment, Console(enabled=False))
    trainer.hooks = [*extra_hooks, *trainer.hooks]
    return trainer


def failure(call):
    """The type and text of what ``call`` raises."""
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

    return (
        failure(lambda: on_every_rank(fail_on_one)),
        decided_by_main(decide),
        failure(lambda: decided_by_main(refuse)),
    )


def test_ranks_fail_and_decide_together():
    (alone0, decided0, refused0), (alone1, decided1, refused1) = run_distributed(_together, 2)
    assert alone0 == (RankError, "rank 1: ValueError: out of luck")
    assert alone1 == (ValueError, "out of luck")
    assert decided0 == decided1 == "decided"
    assert refused0 == refused1 == (CheckpointError, "refused")


class BreakData(Hook):
    """After step 2 the loader of rank 1 fails."""

    name = "break_data"

    def after_step(self, trainer):
        if trainer.state.step == 2 and trainer.environment.rank == 1:

            def fail(*arguments):
                raise DataError("shard-000001.tar has the wrong checksum")

            trainer.loader._stream.sequences = fail


def _data_fails(config):
    trainer = build(config, BreakData())
    return (*failure(trainer.fit), trainer.state.step)


def test_data_that_fails_on_one_rank_stops_all_with_its_words(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "data.prefetch_steps=0")
    for kind, text, step in run_distributed(_data_fails, 2, config):
        assert kind is DataError
        assert text == "the data of step 3 could not be read: rank 1: shard-000001.tar has the wrong checksum"
        assert step == 2


class Poison(Hook):
    """After step 3 one gradient of rank 1 becomes infinite."""

    name = "poison"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            parameter = next(p for n, p in trainer.engine.module.named_parameters() if n.endswith("norm.weight"))
            parameter.register_hook(lambda gradient: gradient * float("inf"))


def _gradient_explodes(configs):
    results = []
    for config in configs:
        trainer = build(config, Poison())
        weights = {}
        kind, text = failure(trainer.fit)
        weights = {name: tensor for name, tensor in trainer.engine.weights() if tensor is not None}
        finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
        results.append((kind, text, trainer.state.step, finite, len(weights)))
    return results


def test_a_gradient_that_is_not_finite_stops_before_the_update(shards, tmp_path):
    cases = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
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
    for case, (kind, text, step, finite, tensors), (kind1, *_) in zip(cases, main, other):
        assert kind is kind1 is NonFiniteError, case
        assert text.startswith("step 4: gradient norm "), (case, text)
        assert "the update was not made. Newest checkpoint: " in text
        assert "step-00000002" in text
        assert step == 3
        assert finite, case
        assert tensors > 10


class SignalOneRank(Hook):
    """Rank 1 is told to stop during step 3."""

    name = "signal"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _signalled(config):
    trainer = build(config, SignalOneRank())
    ending = trainer.fit()
    trainer.close()
    return ending, trainer.state.step


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards)
    assert run_distributed(_signalled, 2, config) == [(Ending.SIGNALLED, 3)] * 2
    assert find_checkpoint(tmp_path / "run").name == "step-00000003"


class BreakSaving(Hook):
    """From step 4 on, rank 1 cannot write its part of a checkpoint."""

    name = "break_saving"

    def after_step(self, trainer):
        if trainer.state.step == 4 and trainer.environment.rank == 1:
            save = trainer.engine.save

            def fail(folder):
                save(folder)
                raise OSError("No space left on device")

            trainer.engine.save = fail


def _saving_fails(config):
    return failure(build(config, BreakSaving()).fit)


def test_a_checkpoint_that_fails_on_one_rank_fails_on_all_and_the_old_one_stays(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "checkpoint.interval=2")
    for kind, text in run_distributed(_saving_fails, 2, config):
        assert kind is CheckpointError
        assert "step-00000004 was not written: rank 1: OSError: No space left on device" in text
    assert [p.name for p in checkpoints_of(tmp_path / "run")] == ["step-00000002"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000002\n"


def _keep_last(config):
    trainer, _ = train_here(config)
    return trainer.latest_checkpoint


def test_old_checkpoints_are_removed_and_leftovers_of_a_crash_too(shards, tmp_path):
    run: Path = tmp_path / "run"
    (run / "checkpoints" / ".unfinished-step-00000001").mkdir(parents=True)
    config = tiny_config(run, shards, "checkpoint.interval=2", "checkpoint.keep_last=2")
    run_distributed(_keep_last, 1, config)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000006", "step-00000008"]
