"""A run resumes from any checkpoint on any number of ranks in any ZeRO stage, as if nothing had changed.

One run goes through all changes, a few steps each, and is compared with a run that was never stopped.
"""

import operator
import pickle
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dcscale.checkpoint.layout import OPTIMIZER, WEIGHTS, step_name
from dcscale.observe import Console, read_metrics
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, whole_weights
from dcscale.train import build_trainer

pytestmark = pytest.mark.distributed

# (ranks, ZeRO stage, optimizer offload) of consecutive starts: on 2 ranks every stage follows every other stage; ranks
# change 1 -> 2, 2 -> 4, 4 -> 2 and 2 -> 1, with another stage and with the same; offload is switched on and off.
STAGES_ON_TWO = (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)
OFFLOADED_ON_TWO = ((2, 1, True), (2, 3, True), (2, 3, False), (2, 2, True))
FORMS = [
    (1, 2, True),
    *((2, stage, False) for stage in STAGES_ON_TWO),
    *OFFLOADED_ON_TWO,
    (4, 3, False),
    (2, 3, False),
    (1, 1, False),
]
FORMS_OF_BF16 = [(1, 2, True), *((2, stage, False) for stage in (0, 1, 2, 3)), (4, 3, False), (1, 1, False)]
"""Every stage, more and fewer ranks, offloading on and off: the saved state is float32 here too."""

STEPS_OF_A_START = 2


def forms_of(precision):
    return FORMS if precision == "fp32" else FORMS_OF_BF16


def settings(precision):
    return [
        f"train.precision={precision}",
        f"train.steps={STEPS_OF_A_START * len(forms_of(precision))}",
        "validation.interval=0",
        "log.compose_interval=0",
        "checkpoint.interval=0",
    ]


def refuse(*arguments, **named):
    raise AssertionError("something was unpickled")


class RefusingUnpickler(pickle.Unpickler):
    __init__ = refuse


def load_all(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def stored(folder):
    """Every parameter's master and moments as one vector, read without TrainingStateReader."""
    parts = {}
    for key, part in load_all(folder).items():
        name, kind, start = key.rsplit(":", 2)
        parts.setdefault((name, kind), []).append((int(start), part))
    return {key: torch.cat([part for _, part in sorted(p, key=lambda p: p[0])]) for key, p in parts.items()}


def differences(trainer, checkpoint):
    """Where the loaded state differs from the state in the files in any bit."""
    state = stored(checkpoint / OPTIMIZER)
    snapshot = trainer.engine.snapshot()
    found = []
    if snapshot.steps != trainer.state.step:
        found.append(f"{snapshot.steps} steps")
    for (name, kind, start), part in snapshot.tensors.items():
        if not part.equal(state[name, kind][start : start + len(part)]):
            found.append(f"{kind} of {name} from {start}")
    for name, weight in whole_weights(trainer.engine).items():
        if not weight.equal(state[name, "master"].to(weight.dtype).view_as(weight)):
            found.append(name)
    return found


class Start(NamedTuple):
    """Observations of one rank in one start."""

    differences: list[str]
    rows: list[list[bytes]]
    """Input rows of each step."""
    snapshot_bytes: int


def train_starts(configs):
    """Trains each config on this rank, one after the other; fails if anything is unpickled."""
    answers = []
    for config in configs:
        environment = discover()
        start_distributed(environment, config.parallel.start_timeout_minutes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "load", refuse)
            patch.setattr(pickle, "load", refuse)
            patch.setattr(pickle, "loads", refuse)
            patch.setattr(pickle, "Unpickler", RefusingUnpickler)
            trainer = build_trainer(config, environment, Console(enabled=False))
        wrong = differences(trainer, trainer.latest_checkpoint) if trainer.latest_checkpoint else []
        rows, forward_backward = [[]], trainer.engine.forward_backward

        def recording(inputs, scale, last, rows=rows, forward_backward=forward_backward):
            rows[-1] += [row.numpy().tobytes() for row in inputs[0]]
            if last:
                rows.append([])
            return forward_backward(inputs, scale, last)

        trainer.engine.forward_backward = recording
        trainer.fit()
        trainer.close()
        answers.append(Start(wrong, rows[:-1], trainer.engine.snapshot().nbytes))
    return answers


class Runs(NamedTuple):
    precision: str
    whole: Path
    changing: Path
    expected_rows: list[list[bytes]]
    """Input rows of each step of the uninterrupted run, sorted."""
    starts: list[tuple[Start, ...]]
    """Starts of the changing run, with the observations of each rank."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(request, tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("runs")
    base = settings(request.param)
    whole = tiny_config(folder / "whole", shards, *base, "parallel.zero_stage=1")
    ((rank0,), (rank1,)) = run_distributed(train_starts, 2, [whole])
    expected = [sorted(rows) for rows in map(operator.add, rank0.rows, rank1.rows)]
    starts, done = [], 0
    for ranks, forms in groupby(forms_of(request.param), key=lambda form: form[0]):
        configs = []
        for _, stage, offload in forms:
            done += STEPS_OF_A_START
            form = [
                f"parallel.zero_stage={stage}",
                f"parallel.offload_optimizer={offload}",
                f"train.stop_after={done}",
            ]
            configs.append(tiny_config(folder / "changing", shards, *base, *form))
        starts += zip(*run_distributed(train_starts, ranks, configs))
    return Runs(request.param, folder / "whole", folder / "changing", expected, starts)


def test_losses_are_those_of_a_run_that_was_never_stopped(runs):
    """Up to float32 rounding. In bfloat16 the stages round gradients differently, with or without a stop."""
    expected, found = (
        torch.tensor([record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record])
        for run in (runs.whole, runs.changing)
    )
    assert len(expected) == STEPS_OF_A_START * len(forms_of(runs.precision))
    torch.testing.assert_close(found, expected, rtol={"fp32": 1e-6, "bf16": 2e-2}[runs.precision], atol=0)


def test_each_start_has_the_state_of_the_files_bit_for_bit(runs):
    assert [start.differences for ranks in runs.starts for start in ranks] == [[]] * sum(
        ranks for ranks, *_ in forms_of(runs.precision)
    )


def test_steps_use_the_same_sequences(runs):
    steps = (rows_of_ranks for ranks in runs.starts for rows_of_ranks in zip(*(start.rows for start in ranks)))
    found = [sorted(chain.from_iterable(rows_of_ranks)) for rows_of_ranks in steps]
    assert found == runs.expected_rows


def test_ranks_copy_equal_shares_of_one_state(runs):
    last = step_name(STEPS_OF_A_START * len(forms_of(runs.precision)))
    weights = load_all(runs.changing / "checkpoints" / last / WEIGHTS)
    whole = 3 * 4 * sum(weight.numel() for weight in weights.values())
    expected = [[whole // ranks] * ranks for ranks, *_ in forms_of(runs.precision)]
    assert [[start.snapshot_bytes for start in ranks] for ranks in runs.starts] == expected
