"""A step that is not finite, or a spike, has no effect if it is skipped or gone back from, however the run is killed.

Faults belong to sequences, not to steps: whoever trains on the same sequences again meets them again.
"""

import dataclasses
import json
import math
import shutil
import socket
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcscale.checkpoint import checkpoints_of
from dcscale.checkpoint.layout import read_state
from dcscale.config import Config
from dcscale.observe import Console, read_metrics
from dcscale.observe.events import event_path, read_events
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_all
from dcscale.train import build_trainer, write_summary
from dcscale.train.hooks import Hook
from dcscale.train.numerics import DivergedError
from dcscale.train.restore.rollbacks import ROLLBACKS

pytestmark = pytest.mark.distributed

BATCH = 8
BASE = 33
"""Steps of the run that all others resume from: enough to judge the next ones."""
NOT_FINITE, SPIKE = BASE + 1, BASE + 3
"""Steps whose sequences are faulty."""
STEPS = BASE + 4
CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
KILLED = {(0, "bf16"): 2, (1, "fp32"): 2, (2, "fp32"): 3, (2, "bf16"): 2, (3, "bf16"): 2}
"""Cases of runs that are killed, and after which step of the start: the second is the last one before the spike, the
third the first one after the rollback."""


class Lines(Console):
    """Keeps what it would print."""

    def __init__(self):
        super().__init__(enabled=False)
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


class Faults(Hook):
    """Makes steps faulty, keeps losses and norms of all steps, and copies the run at a moment at which it is killed.

    Args:
        trainer: is changed.
        faults: number of a step's first sequence -> ``nan``: the loss of rank 1 in its last micro-batch is not a
            number; ``spike``: the gradient is 1000 times what it would be. None: of any other step.
        kill_at: copies the run folder after so many steps of this start.
        corrupt_at: flips a bit of the newest checkpoint after so many steps of this start.
    """

    name = "faults"

    def __init__(self, trainer, faults, kill_at, corrupt_at):
        self.trainer, self.faults, self.kill_at, self.corrupt_at = trainer, faults, kill_at, corrupt_at
        self.after, self.skips_changed_nothing, self.judged = 0, [], []
        self.forward_backward, self.update = trainer.engine.forward_backward, trainer.engine.update
        trainer.engine.forward_backward, trainer.engine.update = self.faulty_forward_backward, self.observed_update

    def faulty_forward_backward(self, inputs, scale, last):
        fault = self.faults.get(self.trainer.state.sequences, self.faults.get(None))
        rank = self.trainer.environment.rank
        poison = math.nan if fault == "nan" and last and rank == self.trainer.environment.world_size - 1 else 1.0
        loss = self.forward_backward(inputs, scale * poison * (1000 if fault == "spike" else 1), last)
        return loss * poison

    def observed_update(self, lr, loss_sum, accept):
        answers = []

        def observing(*values):
            answers.append(accept(*values))
            self.judged.append((self.trainer.state.sequences, *map(str, values), answers[0]))
            return answers[0]

        faulty = self.trainer.state.sequences in self.faults
        before = self.trainer.engine.snapshot() if faulty else None
        self.update(lr, loss_sum, observing)
        if faulty and not answers[0]:
            after = self.trainer.engine.snapshot()
            same = before.tensors.keys() == after.tensors.keys() and before.steps == after.steps
            self.skips_changed_nothing.append(
                same and all(tensor.equal(after.tensors[key]) for key, tensor in before.tensors.items())
            )

    def after_step(self, trainer):
        self.after += 1
        if self.after == self.kill_at and trainer.environment.is_main:
            # What a start is about to write is as after a kill: not there.
            shutil.copytree(trainer.run, f"{trainer.run}-killed", ignore=shutil.ignore_patterns(".*", "lease.json"))
        if self.after == self.corrupt_at:
            (part,) = (trainer.latest_checkpoint / "optimizer").iterdir()
            content = bytearray(part.read_bytes())
            content[-1] ^= 1
            part.write_bytes(content)


class Ran(NamedTuple):
    error: tuple[type, str, int] | None
    """Type, text and the rank that it names."""
    lines: list[str]
    judged: list
    skips_changed_nothing: list[bool]
    step: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A start of a run, and the arguments of its :class:`Faults`."""

    config: Config
    faults: dict
    kill_at: int | None = None
    corrupt_at: int | None = None


def train_jobs(jobs):
    """Trains one job after the other on this rank."""
    ran = []
    for job in jobs:
        environment, console = discover(), Lines()
        start_distributed(environment, job.config.parallel.start_timeout_minutes)
        trainer = build_trainer(job.config, environment, console)
        faults = Faults(trainer, job.faults, job.kill_at, job.corrupt_at)
        trainer.hooks = [*trainer.hooks, faults]
        error = None
        try:
            write_summary(trainer, trainer.fit())
        except DivergedError as caught:
            error = type(caught), str(caught), caught.rank
        trainer.close()
        ran.append(Ran(error, console.lines, faults.judged, faults.skips_changed_nothing, trainer.state.step))
    return ran


def settings(folder, name, shards, *more):
    base = [
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "checkpoint.keep_last=null",
        "checkpoint.background=false",
        "validation.interval=0",
        "log.compose_interval=0",
        "model.attention=mha",
        "model.layers=1",
        "model.windows=[8]",
    ]
    return tiny_config(folder / name, shards, *base, *more)


@pytest.fixture(scope="module")
def base(tmp_path_factory, shards):
    """A run of one rank without faults, stopped after step ``BASE``."""
    folder = tmp_path_factory.mktemp("base")
    run_distributed(train_all, 1, [settings(folder, "base", shards, f"train.stop_after={BASE}")])
    return folder / "base"


def name_of(stage, precision):
    return f"zero{stage}-{precision}"


POLICIES = ["train.on_nonfinite=skip", "train.on_spike=rollback", f"checkpoint.interval={NOT_FINITE}"]
FAULTS = {BATCH * (NOT_FINITE - 1): "nan", BATCH * (SPIKE - 1): "spike"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards, base):
    """Folder of the runs, and what both ranks observed of each: all cases, then the resumes after a kill."""
    folder = tmp_path_factory.mktemp("runs")
    whole, resumed = [], []
    for case in CASES:
        form = [f"parallel.zero_stage={case[0]}", f"train.precision={case[1]}", *POLICIES]
        shutil.copytree(base, folder / name_of(*case))
        whole.append(Job(settings(folder, name_of(*case), shards, *form), FAULTS, kill_at=KILLED.get(case)))
        if case in KILLED:
            resumed.append(Job(settings(folder, f"{name_of(*case)}-killed", shards, *form), FAULTS))
    return folder, *run_distributed(train_jobs, 2, whole + resumed)


@pytest.mark.parametrize("case", CASES)
def test_ranks_decide_alike_and_a_refused_step_changes_neither_weights_nor_moments(runs, case):
    _, rank0, rank1 = runs
    for run0, run1 in zip(rank0, rank1):
        assert run0.error is None
        assert run0.judged == run1.judged
        assert run0.step == STEPS
    number = CASES.index(case)
    # The step that is not finite, and the spike.
    assert rank0[number].skips_changed_nothing == rank1[number].skips_changed_nothing == [True, True]
    assert [accepted for *_, accepted in rank0[number].judged] == [False, True, False, *[True] * 3]


def exact(run):
    """What must repeat of the records of a run."""
    timed = ("seconds", "_per_", "wait", "mfu", "memory", "checkpoint", "slowest")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in timed)}
        for record in read_metrics(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_before_or_after_a_rollback_ends_like_one_that_was_not(runs, case):
    resume = runs[1][len(CASES) + list(KILLED).index(case)]
    steps_to_the_end = [True] * (STEPS - NOT_FINITE)
    # Only a run that was killed before meets the spike again.
    expected = {2: [True, False, *steps_to_the_end], 3: steps_to_the_end}
    assert [accepted for *_, accepted in resume.judged] == expected[KILLED[case]]
    # The run that goes on after an update that was skipped, or a rollback, has nothing left of it in its gradients.
    assert resume.judged == runs[1][CASES.index(case)].judged[-len(resume.judged) :]
    run, killed = (runs[0] / f"{name_of(*case)}{suffix}" for suffix in ("", "-killed"))
    assert exact(run) == exact(killed)
    assert [record["step"] for record in exact(run)] == list(range(1, STEPS + 1))
    end = f"checkpoints/step-{STEPS:08d}"
    states = [read_state(folder / end) for folder in (run, killed)]
    for key in ("sequences", "tokens", "passed_over", "numerics", "pending", "first_loss", "last_loss"):
        assert states[0][key] == states[1][key], key
    weights = [load_file(folder / end / "weights/model-00001.safetensors") for folder in (run, killed)]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_a_rollback_is_in_metrics_state_events_board_and_summary(runs):
    run = runs[0] / name_of(2, "bf16")
    records = exact(run)
    assert [record.get("skipped_updates", 0) for record in records] == [0] * BASE + [1] * 4
    assert [record.get("rollbacks", 0) for record in records] == [0] * NOT_FINITE + [1] * 3
    assert [record.get("passed_over_sequences", 0) for record in records] == [0] * NOT_FINITE + [16] * 3
    assert "spikes" not in records[-1], "of the steps that count, none was one"
    assert records[NOT_FINITE - 1]["loss"] is records[NOT_FINITE - 1]["grad_norm"] is None
    assert records[NOT_FINITE - 1]["tokens"] == records[NOT_FINITE - 2]["tokens"]
    assert "spike_score" not in records[31]
    assert records[32]["spike_score"] < 10
    epoch = records[0]["data_epoch"]
    # Two steps more than it would be, which were passed over.
    assert records[-1]["data_epoch"] == pytest.approx((STEPS + 2) * epoch)

    state = read_state(run / f"checkpoints/step-{STEPS:08d}")
    assert state["sequences"] == (STEPS + 2) * BATCH
    (passed_over,) = state["passed_over"]
    first, end = NOT_FINITE * BATCH, SPIKE * BATCH
    assert (passed_over["step"], passed_over["first"], passed_over["end"]) == (SPIKE, first, end)
    (skip,) = state["numerics"]["skips"]
    assert (skip["step"], skip["sequences"]) == (NOT_FINITE, [264, 272])
    # Rank 1 has every second sequence, two in a micro-batch; its last micro-batch was not finite.
    where = f"rank 1 ({socket.gethostname()}): sequences 269, 271"
    assert skip["reason"] == f"loss nan, gradient norm inf; the loss is not finite on {where}"

    events = [
        event for event in read_events(event_path(run, 0)) if event["event"] in ("nonfinite", "spike", "rollback")
    ]
    assert [(event["event"], event["step"]) for event in events] == [
        ("nonfinite", NOT_FINITE),
        ("spike", SPIKE),
        ("rollback", SPIKE),
    ]
    assert (events[0]["loss"], events[0]["action"], events[1]["action"]) == ("nan", "skip", "roll_back")
    assert events[2]["sequences"] == [first, end]
    assert events[2]["checkpoint"].endswith(f"step-{NOT_FINITE:08d}")

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("optimizer/rollbacks")] == list(range(NOT_FINITE + 1, STEPS + 1))
    assert [event.step for event in board.Scalars("optimizer/grad_norm")][-4:] == [33, *range(35, STEPS + 1)]
    summary = json.loads((run / "summary.json").read_text())
    counts = ("spikes", "skipped_updates", "rollbacks", "passed_over_sequences")
    assert [summary[key] for key in counts] == [0, 1, 1, 16]


def test_what_happens_is_printed(runs):
    _, rank0, _ = runs
    folder = runs[0] / name_of(0, "fp32")
    warnings = [line for line in rank0[0].lines if line.startswith("warning    step")]
    assert warnings[0] == (
        "warning    step 34, sequences 264 to 271: loss nan, gradient norm nan; the loss is not finite on rank 1 "
        f"({socket.gethostname()}): sequences 269, 271. The update is skipped (train.on_nonfinite=skip), "
        "1 of at most 10 in a row"
    )
    assert warnings[1].startswith("warning    step 36, sequences 280 to 287: gradient norm ")
    assert " robust standard deviations above the median of " in warnings[1]
    assert warnings[1].endswith(
        f". The run goes back to {folder}/checkpoints/step-00000034 and passes over sequences 272 to 287 "
        "(train.on_spike=rollback), 1 of at most 10 times to this checkpoint"
    )
    resuming = "resuming   after a rollback to step-00000034 from a spike in step 36: passes over sequences 272 to 287"
    assert [resuming in resume.lines for resume in rank0[len(CASES) :]] == [at == 3 for at in KILLED.values()]


@pytest.fixture(scope="module")
def policies(tmp_path_factory, shards, base):
    """The runs of one rank under other policies, by name, and their folder."""
    folder = tmp_path_factory.mktemp("policies")
    # ZeRO then keeps its gradient buffers, which a skipped update must not take away.
    offload = "parallel.offload_optimizer=true"
    always_spike, one_spike = {None: "spike"}, {BATCH * (NOT_FINITE - 1): "spike"}
    starts = {
        "skipping-nan": (["train.on_nonfinite=skip", "train.max_skipped_updates=3"], {None: "nan"}, None),
        "again": (["train.on_nonfinite=skip"], {}, None),
        "stopping": ([], {BATCH * NOT_FINITE: "nan"}, None),
        "warning": (["train.max_skipped_updates=3"], always_spike, None),
        "ignoring": (["train.on_spike=ignore", "train.max_skipped_updates=3"], always_spike, None),
        "skipping": (["train.on_spike=skip", "parallel.zero_stage=3", offload], one_spike, None),
        "too-often": (["train.on_spike=rollback", "train.max_skipped_updates=2"], always_spike, None),
        "corrupt": (["train.on_spike=rollback", "parallel.zero_stage=2", offload], {BATCH * NOT_FINITE: "spike"}, 1),
        "fresh": (["train.on_spike=rollback", f"train.stop_after={NOT_FINITE}"], one_spike, None),
    }
    jobs = []
    for name, (policy, faults, corrupt_at) in starts.items():
        if name == "again":
            config = settings(folder, "skipping-nan", shards, *policy)
        else:
            config = settings(folder, name, shards, *policy)
            if name != "fresh":
                shutil.copytree(base, folder / name)
        jobs.append(Job(config, faults, corrupt_at=corrupt_at))
    (ran,) = run_distributed(train_jobs, 1, jobs)
    return folder, dict(zip(starts, ran))


def warnings_of(ran):
    return [line.removeprefix("warning    ") for line in ran.lines if line.startswith("warning    step")]


def test_too_many_skipped_updates_in_a_row_stop_after_a_checkpoint_that_the_next_start_resumes_from(policies):
    folder, ran = policies
    run = folder / "skipping-nan"
    kind, text, rank = ran["skipping-nan"].error
    assert (kind, rank) == (DivergedError, -1)
    assert text == (
        f"the updates of 3 steps in a row, up to step {BASE + 3}, were skipped, and train.max_skipped_updates is 3: "
        "lower optimizer.learning_rate, or inspect the data of these steps. Newest checkpoint: "
        f"{run}/checkpoints/step-{BASE + 3:08d}"
    )
    weights = [
        load_file(run / f"checkpoints/step-{step:08d}/weights/model-00001.safetensors") for step in (BASE, BASE + 3)
    ]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert ran["again"].error is None
    assert ran["again"].step == STEPS
    assert exact(run)[-1]["skipped_updates"] == 3


def test_a_step_that_is_not_finite_stops_after_a_checkpoint_of_the_steps_before_it(policies):
    folder, ran = policies
    kind, text, rank = ran["stopping"].error
    assert (kind, rank) == (DivergedError, 0)
    assert text == (
        f"step {BASE + 2}, sequences 272 to 279: loss nan, gradient norm inf; the loss is not finite on rank 0 "
        f"({socket.gethostname()}): sequences 278, 279. The weights were not updated. Lower "
        "optimizer.learning_rate, lengthen schedule.warmup_steps, inspect the data of this step, or skip such updates "
        f"(train.on_nonfinite=skip). Newest checkpoint: {folder}/stopping/checkpoints/step-{BASE + 1:08d}"
    )
    assert ran["stopping"].step == BASE + 1
    assert checkpoints_of(folder / "stopping")[-1].name == f"step-{BASE + 1:08d}"


def test_warn_updates_and_takes_a_level_that_stays_for_the_new_one(policies):
    folder, ran = policies
    assert [line.split(":")[0] for line in warnings_of(ran["warning"])] == [
        "step 34, sequences 264 to 271",
        "step 35, sequences 272 to 279",
        "step 36, sequences 280 to 287",
        "step 36 is the last of 3 spikes in a row",
    ]
    assert all(accepted for *_, accepted in ran["warning"].judged)
    assert exact(folder / "warning")[-1]["spikes"] == 3


def test_ignore_says_nothing_but_trains_and_counts_as_warn_does(policies):
    folder, ran = policies
    assert warnings_of(ran["ignoring"]) == []
    assert ran["ignoring"].judged == ran["warning"].judged
    assert exact(folder / "ignoring") == exact(folder / "warning")
    assert not [event for event in read_events(event_path(folder / "ignoring", 0)) if event["event"] == "spike"]


def test_skip_leaves_out_the_update_of_a_spike_but_reports_its_loss(policies):
    folder, ran = policies
    (line,) = warnings_of(ran["skipping"])
    assert line.endswith(". The update is skipped (train.on_spike=skip), 1 of at most 10 in a row")
    assert ran["skipping"].skips_changed_nothing == [True]
    records = exact(folder / "skipping")
    assert (records[-1]["spikes"], records[-1]["skipped_updates"]) == (1, 1)
    assert records[BASE]["loss"] == exact(folder / "warning")[BASE]["loss"]
    assert records[BASE]["spike_score"] > 10


def test_too_many_rollbacks_to_one_checkpoint_stop(policies):
    folder, ran = policies
    kind, text, rank = ran["too-often"].error
    assert (kind, rank) == (DivergedError, -1)
    checkpoint = folder / f"too-often/checkpoints/step-{BASE:08d}"
    assert text == (
        f"step {BASE + 1} is a spike, and the run has gone back to {checkpoint} 2 times, which is "
        "train.max_skipped_updates: lower optimizer.learning_rate, or inspect the data up to sequence 287. Newest "
        f"checkpoint: {checkpoint}"
    )
    rollbacks = json.loads((folder / "too-often" / ROLLBACKS).read_text())["rollbacks"]
    assert [(rollback["step"], rollback["first"], rollback["end"]) for rollback in rollbacks] == [
        (BASE + 1, 264, 272),
        (BASE + 1, 272, 280),
    ]


@pytest.mark.parametrize(("name", "reason"), [("fresh", "there is no checkpoint yet"), ("corrupt", "is corrupt: ")])
def test_a_run_that_cannot_go_back_skips_the_update(policies, name, reason):
    folder, ran = policies
    (line,) = warnings_of(ran[name])
    assert "The run cannot go back, so the update is skipped: " in line
    assert reason in line
    assert ran[name].error is None
    assert exact(folder / name)[-1]["skipped_updates"] == 1
    assert not (folder / name / ROLLBACKS).exists()
    (event,) = [event for event in read_events(event_path(folder / name, 0)) if event["event"] == "rollback_failure"]
    assert reason in event["error"]
