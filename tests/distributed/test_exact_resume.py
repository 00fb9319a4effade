"""A stopped and resumed run has the losses, gradient norms and weights of an uninterrupted one, bit for bit."""

import json

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_all

CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
EXACT = ("step", "tokens", "padding_tokens", "loss", "grad_norm", "lr", "validation_loss", "bits_per_byte")
STOP, STEPS = 3, 8

pytestmark = pytest.mark.distributed


def name(stage, precision):
    return f"zero{stage}-{precision}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """For every case an uninterrupted run and a run stopped after step 3 and resumed in new processes, on 2 ranks."""
    folder = tmp_path_factory.mktemp("runs")

    def config(kind, stage, precision, *more):
        # log.interval=2 makes the stop fall between two records.
        return tiny_config(
            folder / f"{kind}-{name(stage, precision)}",
            shards,
            f"parallel.zero_stage={stage}",
            f"train.precision={precision}",
            "log.interval=2",
            *more,
        )

    whole = [config("whole", *case) for case in CASES]
    stopped = [config("resumed", *case, f"train.stop_after={STOP}") for case in CASES]
    run_distributed(train_all, 2, whole + stopped)
    run_distributed(train_all, 2, [config("resumed", *case) for case in CASES])
    return folder


def exact(record):
    """The part of a record that must repeat: everything except speed and memory."""
    return {key: value for key, value in record.items() if key in EXACT or key.startswith("compose/")}


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_metrics_repeat_bit_for_bit(runs, stage, precision):
    whole = [exact(r) for r in read_metrics(runs / f"whole-{name(stage, precision)}" / "metrics.jsonl")]
    resumed = [exact(r) for r in read_metrics(runs / f"resumed-{name(stage, precision)}" / "metrics.jsonl")]
    assert [r["step"] for r in whole] == [1, 2, 4, 6, 8]
    assert whole == resumed
    assert whole[-1]["loss"] < whole[1]["loss"]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_weights_repeat_bit_for_bit(runs, stage, precision):
    end = f"checkpoints/step-{STEPS:08d}/weights/model-00001.safetensors"
    whole = load_file(runs / f"whole-{name(stage, precision)}" / end)
    resumed = load_file(runs / f"resumed-{name(stage, precision)}" / end)
    assert whole.keys() == resumed.keys()
    assert all(whole[key].equal(resumed[key]) for key in whole)


def test_stages_train_the_same_model(runs):
    """Sharding must not change what is computed: fp32 losses agree to rounding."""
    losses = [
        [r["loss"] for r in read_metrics(runs / f"whole-{name(stage, 'fp32')}" / "metrics.jsonl") if "loss" in r]
        for stage in range(4)
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_summary(runs):
    summary = json.loads((runs / "resumed-zero1-fp32" / "summary.json").read_text())
    records = read_metrics(runs / "resumed-zero1-fp32" / "metrics.jsonl")
    assert summary["completed"]
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    assert summary["tokens"] == records[-1]["tokens"]
    assert summary["tokens"] + summary["padding_tokens"] == STEPS * 8 * 32
    assert summary["padding_tokens"] < 32, "the end of the last sequence of an epoch"
    assert summary["last_loss"] == records[-1]["loss"]
    assert summary["bits_per_byte"] == records[-1]["bits_per_byte"]
    assert summary["first_loss"] == pytest.approx(5.6, abs=0.3)
    assert summary["last_checkpoint"].endswith("step-00000008")


def test_tensorboard_shows_each_step_once(runs):
    board = EventAccumulator(str(runs / "resumed-zero2-bf16" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/train")] == [2, 4, 6, 8]
    assert [event.step for event in board.Scalars("loss/validation")] == [4, 8]
    assert [event.step for event in board.Scalars("weights/compose/pre/layer_00")] == [1, 4, 8]
