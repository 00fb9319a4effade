"""What is known of a run, and what state follows from it.

The fields of :class:`RunStatus` are the keys of ``tools/status.py --json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from dcscale.cluster.ending import ExitCode
from dcscale.cluster.status.run_files import count, timestamp

COUNTERS = {
    "skipped_shards": ("shard", " skipped"),
    "skipped_tokens": ("token", " missing from every epoch"),
    "skipped_updates": ("update", " skipped"),
    "spikes": ("spike", ""),
    "rollbacks": ("rollback", ""),
    "passed_over_sequences": ("sequence", " passed over"),
    "steps_without_targets": ("step", " without targets"),
    "checkpoint_failures": ("checkpoint", " not written"),
}
"""Metrics that should be 0, with words: a noun, and what follows it."""


class State(str, Enum):
    """Of a run."""

    RUNNING = "running"
    STALLED = "stalled"
    """A start holds the run folder, but has recorded nothing for long."""

    RESUMABLE = "resumable"
    """It does not run, and the same command resumes it."""

    DONE = "done"
    FAILED = "failed"
    """The last start ended with exit code 1 or 2."""

    DIVERGED = "diverged"
    NOT_STARTED = "not started"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest complete checkpoint."""

    step: int
    path: str
    age_seconds: float | None
    bytes: int | None
    """Size; None as ``write_seconds``: not known."""

    write_seconds: float | None


@dataclass(frozen=True)
class EndingStatus:
    """How a start ended: of the last one ``ending.json``, of earlier ones what their events say."""

    code: int
    """Exit code, see launch/README.md."""

    reason: str
    time: float | None
    """Seconds since 1970."""

    step: int | None
    rank: int | None = None
    """The cause, with ``host``; None: none, or it is not known."""

    host: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class StartStatus:
    """A start that has begun to train."""

    time: float | None
    """Seconds since 1970."""

    step: int | None
    """The step that it began after."""

    checkpoint: str | None
    """What it resumed from."""

    host: str | None
    """Of rank 0."""

    world_size: int | None
    ended: EndingStatus | None
    """None: it runs, or ended without a word, as if all of its processes were killed at once."""


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others, now."""

    rank: int
    host: str | None
    excess: float | None
    """Its time of a step / median of the others - 1."""

    phase: str | None
    """The phase of a step that differs most."""

    step: int | None
    """When it was named."""


@dataclass(frozen=True)
class LeaseStatus:
    """Who holds the run folder, or held it and did not release it."""

    holder: str
    alive: bool
    """As far as can be told: its process runs, if that was on this machine, or the lease was renewed lately."""

    here: bool
    """Whether the holder runs, or ran, on this machine."""

    stopped: bool
    """Whether its process is stopped, as by Ctrl-Z or SIGSTOP; False also if that is not known."""

    age_seconds: float | None
    """Since the last renewal."""

    since: float | None
    """When it was taken, in seconds since 1970."""

    job: str | None
    """SLURM job id."""


@dataclass(frozen=True)
class JobStatus:
    """What the SLURM job of a run has decided after its last start, see ``dcscale.cluster.restarts``."""

    job_id: str | None
    restarts: int | None
    """How often the job was requeued, also after starts that ended before training."""

    without_progress: int | None
    """Starts in a row that have ended without a newer checkpoint."""

    excluded: Mapping[str, str]
    """Nodes that the job does not get any more, with the reason."""

    action: str | None
    """The last decision: done, restart or stop."""

    reason: str | None
    time: float | None
    """Of the decision, in seconds since 1970."""

    wait_seconds: float | None
    """Between the decision and the next start."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run is. What is not known is None, or empty."""

    run: str
    """The run folder."""

    state: State
    why: str
    """The reason for the state, and what comes next; empty if it is in ``ending``, or needs none."""

    step: int | None
    """Optimizer steps done."""

    steps: int | None
    """Optimizer steps of the complete run: ``train.steps`` of the last start."""

    tokens: int | None
    loss: float | None
    """nats/token, of the last record that has one."""

    smoothed_loss: float | None
    """Mean of the last ``smoothed_over`` records."""

    smoothed_over: int
    validation_loss: float | None
    """The last one, of ``validation_step``."""

    validation_step: int | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    """Over the last 20 records: of steps alone, as in ``metrics.jsonl``."""

    seconds_per_step: float | None
    """Wall-clock, with validation and saving, over the last 100 records of a start; of steps alone if that is not
    known."""

    seconds_left: float | None
    """Steps that are left * ``seconds_per_step``: of training, so not counting the time until a run is resumed."""

    record_age_seconds: float | None
    record: Mapping[str, Any]
    """The last record, with all of its metrics."""

    checkpoint: CheckpointStatus | None
    ending: EndingStatus | None
    """How the last start ended; None: it has not, or nothing says how."""

    starts: Sequence[StartStatus]
    """In order; one with more than the first are restarts."""

    stragglers: Sequence[Straggler]
    skipped: Mapping[str, int]
    """Metrics that should be 0 and are not, such as ``skipped_shards``, ``skipped_updates``, ``spikes``."""

    incidents: Sequence[Mapping[str, Any]]
    """The last 5 events of rank 0 of the kinds nonfinite, spike, rollback, and of failures."""

    hangs: Sequence[str]
    """Folders with stacks, in ``RUN/hangs``; their names are times."""

    lease: LeaseStatus | None
    job: JobStatus | None
    """None without SLURM."""

    problems: Sequence[str] = field(default_factory=list)
    """Files that cannot be read, and why."""

    @property
    def done(self) -> float | None:
        """Part of the steps that is done."""
        return None if self.step is None or not self.steps else self.step / self.steps

    def as_json(self) -> dict[str, Any]:
        """All fields and ``done`` as JSON values. Infinities and NaN, which JSON has not, become strings."""
        return json.loads(json.dumps({**asdict(self), "done": self.done}), parse_constant=str)


# -- the state, judged from all else -----------------------------------------------------------------------------------

RECENT_INTERVALS = 100
"""Log intervals from which the wall-clock time of a step is estimated."""

LEAST_SILENCE = 60.0
"""Seconds without a record, below which no run is called stalled."""


@dataclass(frozen=True)
class Progress:
    """When steps were done, as the ``steps`` events of the last start that has two of them say."""

    seconds_per_step: float | None
    longest_gap: float | None
    """Longest time between two of them."""

    last_time: float | None
    """Of all."""

    current: bool
    """Whether it is that of the last start."""

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]]) -> Progress:
        segments: list[list[tuple[int, float]]] = [[]]
        for event in events:
            if event["event"] in ("start", "rollback"):
                segments.append([])
            elif event["event"] == "steps":
                step, at = count(event.get("step")), timestamp(event.get("time"))
                if step is not None and at is not None:
                    segments[-1].append((step, at))
        last_time = next((segment[-1][1] for segment in reversed(segments) if segment), None)
        segment = next((segment for segment in reversed(segments) if len(segment) > 1), None)
        if segment is None:
            return cls(None, None, last_time, False)
        recent = segment[-RECENT_INTERVALS - 1 :]
        (first_step, first), (last_step, last) = recent[0], recent[-1]
        known = last_step > first_step and last > first
        return cls(
            (last - first) / (last_step - first_step) if known else None,
            max(later - earlier for (_, earlier), (_, later) in pairwise(recent)),
            last_time,
            segment is segments[-1],
        )


def _setting(config: Mapping[str, str], name: str, default: float) -> float:
    """A setting that is a number of 0 or more."""
    try:
        value = float(config.get(name, default))
    except ValueError:
        return default
    return value if 0 <= value < float("inf") else default


def patience(config: Mapping[str, str], progress: Progress, status: RunStatus) -> float:
    """Seconds without a record after which a run that holds its folder is called stalled."""
    lease, step = status.lease, status.step
    starting = lease is not None and lease.since is not None and (progress.last_time or 0.0) < lease.since
    if starting or not progress.current or progress.longest_gap is None:
        return max(LEAST_SILENCE, 60 * _setting(config, "parallel.start_timeout_minutes", 10.0))
    # Nothing is recorded during validation and samples, which may take long.
    intervals = {name: int(_setting(config, f"{name}.interval", 0)) for name in ("validation", "samples")}
    if "validation_loss" in status.record and status.record.get("step") == step:
        intervals["validation"] = 0
    pauses = step is not None and any(interval and step % interval == 0 for interval in intervals.values())
    if pauses or (step is not None and step == status.steps):
        return max(LEAST_SILENCE, 60 * _setting(config, "parallel.pause_timeout_minutes", 30.0))
    return max(LEAST_SILENCE, 3 * progress.longest_gap)


def judge(status: RunStatus, summary: Mapping[str, Any], silence: float, patience: float) -> tuple[State, str]:
    """The state, and the reason for it.

    Args:
        status: all that is known, but for the state.
        summary: content of ``summary.json``, if any.
        silence: seconds since anything was recorded.
        patience: seconds of silence after which a run is called stalled.
    """
    lease, ending, complete = status.lease, status.ending, _is_complete(status, summary)
    alive = lease is not None and lease.alive
    if ending is not None:
        return _after(status, ending, complete)
    if alive:
        if lease.stopped:
            return State.STALLED, "its process is stopped, as by Ctrl-Z or SIGSTOP; SIGCONT lets it go on"
        if silence > patience:
            return State.STALLED, f"nothing was recorded for {silence:.0f} s; {patience:.0f} s would be long"
        begun = status.starts[-1].time if status.starts else None
        if lease.since is not None and (begun is None or begun < lease.since):
            return State.RUNNING, "training has not begun yet"
        return State.RUNNING, ""
    if complete:
        return State.DONE, ""
    if not status.record and not status.starts and status.checkpoint is None and not summary:
        return State.NOT_STARTED, "a start ended before training began" if lease is not None else ""
    ended = summary and count(summary.get("steps")) == status.step
    if lease is None and not ended and silence < patience:
        return State.RUNNING, f"no start holds the folder, but something was recorded {silence:.0f} s ago"
    words = "" if ended else "all of its processes ended without a word, as if killed at once; "
    return State.RESUMABLE, words + _resumes_from(status) + _plan(status)


def _is_complete(status: RunStatus, summary: Mapping[str, Any]) -> bool:
    """Whether all steps are done, validation and the last checkpoint included."""
    steps = count(summary.get("steps"))
    return summary.get("completed") is True and steps is not None and (status.steps is None or steps >= status.steps)


def _after(status: RunStatus, ending: EndingStatus, complete: bool) -> tuple[State, str]:
    """The state of a run that has ended."""
    where = "" if ending.rank is None else f", rank {ending.rank}" + (f" ({ending.host})" if ending.host else "")
    why = f"exit code {ending.code}: {ending.reason}{where}"
    if ending.code == ExitCode.DONE:
        done = status.step is not None and status.steps is not None and status.step >= status.steps
        return (State.DONE, "") if done or complete else (State.RESUMABLE, f"{why}; {_resumes_from(status)}")
    if ending.code == ExitCode.DIVERGED:
        return State.DIVERGED, ""
    if ending.code in (ExitCode.FAILED, ExitCode.UNFIT):
        return State.FAILED, ""
    return State.RESUMABLE, f"{why}; {_resumes_from(status)}{_plan(status)}"


def _resumes_from(status: RunStatus) -> str:
    """What the next start begins with."""
    if status.checkpoint is None:
        return "the next start begins at step 0, as there is no checkpoint"
    again = (status.step or 0) - status.checkpoint.step
    return f"the next start resumes from step {status.checkpoint.step:,}" + (
        f", and does {again:,} steps again" if again > 0 else ""
    )


def _plan(status: RunStatus) -> str:
    """What the SLURM job does next; empty if it has decided nothing since the last start."""
    job, begun = status.job, status.starts[-1].time if status.starts else None
    if job is None or job.time is None or (begun is not None and job.time < begun):
        return ""
    if job.action == "restart":
        return f"; job {job.job_id} is queued again"
    return f"; job {job.job_id} does not start it again" if job.action == "stop" else ""
