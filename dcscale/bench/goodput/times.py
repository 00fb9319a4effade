"""Where the times of a simulation come from: measured in this repository, derived from a cluster, or of a real run."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dcscale.bench.goodput.simulate import Times
from dcscale.config.cluster import Cluster
from dcscale.files import parse_json, read_json
from dcscale.observe.events import event_path, read_events

CAMPAIGN_FAULTS = (
    "a rank SIGKILLed at a random moment",
    "node powered off",
    "link of a node cut",
    "OOM-killed data worker",
    "SIGSTOP",
    "hang in Python",
    "hang in C that keeps the interpreter's lock",
    "skipped collective",
)
"""Rows of the campaign in launch/README.md that are failures: steps are lost, or a rank; the next start resumes."""

REQUEUE_SECONDS = 5.7
"""From ``scontrol requeue`` to the new start, measured on the SLURM of tests/cluster with two nodes."""

LIVE = "tools/results/goodput-live.json"
LIVE_STALL, LIVE_DURABLE = 0.33, 0.95
"""Seconds, of the first run in :data:`LIVE`."""

HASH_GB_PER_SECOND = 0.8
"""SHA-256 of one process on an AMD EPYC with other load; each file of a checkpoint is hashed when it is written and
when it is read."""

PAGEABLE_GB_PER_SECOND = 5.0
"""Assumed of copies from a GPU to memory that is not pinned, as that of a snapshot."""

START_SECONDS, FIRST_STEP_SECONDS = 60.0, 30.0
"""Assumed of a large cluster: container, imports, rendezvous and NCCL; and what the first step takes longer."""

OPTIMIZER_BYTES, MASTER_BYTES, WEIGHT_BYTES = 12, 4, 2
"""Bytes a parameter in a checkpoint: master weight and two moments in float32; of these the master weight; and the
bfloat16 copy in weights/."""


@dataclass(frozen=True)
class Value:
    """A time, and where it is from."""

    seconds: float
    source: str
    assumed: bool = False
    """Whether it depends on something that was not measured."""


Values = dict[str, Value]
"""By the name of the field of :class:`Times`."""


@dataclass(frozen=True)
class Fault:
    """Medians of a kind of fault in the campaign."""

    title: str
    ended: float
    """Seconds from the fault to the end of all ranks."""

    next_start: float
    """Seconds that the next start took until it had finished the run: more than until its first step."""


def times_of(values: Mapping[str, Value]) -> Times:
    """The values as the simulation takes them. Raises ValueError if they cannot be."""
    return Times(**{name: value.seconds for name, value in values.items()})


def campaign_faults(page: Path) -> list[Fault]:
    """The faults of :data:`CAMPAIGN_FAULTS`, read from the table in launch/README.md that the campaign writes.

    Raises:
        ValueError: the page cannot be read, or has no such row; names both.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page} cannot be read ({error}): give --notice and --restart") from None
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    header = next((row for row in rows if row[0] == "fault"), [])
    found = []
    for title in CAMPAIGN_FAULTS:
        row = next((row for row in rows if row[0] == title), [])
        cells = dict(zip(header, row, strict=False))
        ended = re.match(r"([\d.]+) \(", cells.get("ended, s", ""))
        again = re.search(r"finish, ([\d.]+) \(", cells.get("next start", ""))
        if ended is None or again is None:
            raise ValueError(
                f"{page} has no times of the fault '{title}' in its table of faults: run tests/cluster/campaign.sh, or "
                "give --notice and --restart"
            )
        found.append(Fault(title, float(ended[1]), float(again[1])))
    return found


def repository_values(faults: Sequence[Fault]) -> Values:
    """What was measured in this repository, with tiny models on CPUs; of the given faults the mean.

    Without faults there is neither ``notice`` nor ``restart``.
    """
    live = f"{LIVE}: 2 ranks on 2 cores with other load"
    values = {"stall": Value(LIVE_STALL, live), "durable": Value(LIVE_DURABLE, live)}
    if not faults:
        return values
    among = f"mean of the medians of {len(faults)} faults" if len(faults) > 1 else faults[0].title
    notice = sum(fault.ended for fault in faults) / len(faults)
    again = sum(fault.next_start for fault in faults) / len(faults)
    values["notice"] = Value(notice, f"launch/README.md, column 'ended', {among}")
    values["restart"] = Value(
        again + REQUEUE_SECONDS,
        f"launch/README.md, column 'next start', {among}, and {REQUEUE_SECONDS} s from scontrol requeue to the start",
    )
    return values


def cluster_values(cluster: Cluster, nodes: int, parameters: float, notice: Value) -> Values:
    """What a model with so many parameters would take on a cluster, by the bandwidths of its file.

    As :mod:`dcscale.checkpoint.checkpointer` works: each rank copies its part of the optimizer state to the host (the
    stall) and writes it; then rank 0 reads the master weights back and writes and hashes the model's weights.

    Args:
        cluster: the cluster.
        nodes: nodes of the run.
        parameters: of the model.
        notice: seconds from a failure to the end of all ranks, which limits set, not the size of a run.
    """
    disk = cluster.storage.shared or cluster.storage.local
    assert disk is not None, "load_cluster refuses a cluster without storage"
    gb, ranks = parameters / 1e9, nodes * cluster.gpus_per_node
    part = OPTIMIZER_BYTES * gb / ranks
    copy = min(cluster.links.host.gb_per_second, PAGEABLE_GB_PER_SECOND)
    write = min(nodes * disk.write_gb_per_second, disk.total_write_gb_per_second or float("inf"))
    read = min(nodes * disk.read_gb_per_second, disk.total_read_gb_per_second or float("inf"))
    stall = part / copy
    parts = OPTIMIZER_BYTES * gb / write + part / HASH_GB_PER_SECOND
    weights = WEIGHT_BYTES * gb * (1 / disk.write_gb_per_second + 1 / HASH_GB_PER_SECOND)
    rest = MASTER_BYTES * gb / disk.read_gb_per_second + weights
    load = OPTIMIZER_BYTES * gb / read + part / HASH_GB_PER_SECOND
    where = f"{parameters:.3g} parameters, {ranks} GPU{'s' * (ranks > 1)}"
    return {
        "stall": Value(stall, f"{where}: {part:.3g} GB a rank, copied at {copy:g} GB/s (pageable memory)", True),
        "durable": Value(
            stall + parts + rest,
            f"{where}: parts {parts:.3g} s, then rank 0 the weights {rest:.3g} s; SHA-256 at {HASH_GB_PER_SECOND} GB/s",
            True,
        ),
        "notice": notice,
        "restart": Value(
            REQUEUE_SECONDS + START_SECONDS + load + FIRST_STEP_SECONDS,
            f"requeue {REQUEUE_SECONDS} s (measured, 2 nodes), container, imports, NCCL {START_SECONDS:g} s, loading "
            f"{load:.3g} s, first step {FIRST_STEP_SECONDS:g} s longer",
            True,
        ),
    }


# -- a real run, by its folder: events/ and metrics.jsonl --------------------------------------------------------------

KILLS = "kills.json"
"""In the run folder: when ranks were killed, see :mod:`dcscale.bench.goodput.live`."""

MOST_WALL = 10 * 365 * 86_400.0
"""Seconds of a run."""

PLANNED = (0, 75)
"""Exit codes of a start that ended because it was asked to: nothing is lost."""


class RunError(ValueError):
    """A folder that times cannot be read from."""


@dataclass(frozen=True)
class Outage:
    """Between the last step of a start and the first of the next. Times are seconds since the run's first start."""

    last_step: float
    """When its last step ended."""

    ended: float | None
    """When its last rank said that it ends; None: none could."""

    training: float
    """When the next start trained again, without what its first step took longer."""

    first_step: float
    """What the first step of the next start took longer than the median step."""

    lost_steps: int
    """Steps that had to be trained again, as far as they were logged."""

    code: int | None
    """Exit code in the event of the end; None: there is none."""

    @property
    def planned(self) -> bool:
        return self.code in PLANNED


@dataclass(frozen=True)
class Start:
    """A start as who killed it saw it. Times are seconds since the run first began to train."""

    began: float
    killed: float | None
    """When a rank was killed; None: none was."""

    ended: float
    """When the last process had ended."""


@dataclass(frozen=True)
class MeasuredRun:
    """The times of a run, in seconds."""

    wall: float
    """From the first step of the run to its last event."""

    useful: float
    """Training of the steps that the run has at the end."""

    steps: int
    """These steps."""

    step_seconds: float
    """Their mean time, without checkpoints."""

    interval_steps: int
    """Median steps between two checkpoints of a start."""

    stall: float
    """Mean time that a checkpoint blocks training."""

    durable: float
    """Mean time from the beginning of a save to the complete checkpoint."""

    checkpoints: int
    """Complete checkpoints whose times are known."""

    outages: tuple[Outage, ...]

    starts: tuple[Start, ...]
    """All starts, those that did not get to train included, by RUN/kills.json; empty without that file."""

    @property
    def goodput(self) -> float:
        return self.useful / self.wall

    @property
    def interval(self) -> float:
        """Seconds of training between two checkpoints."""
        return self.interval_steps * self.step_seconds

    @property
    def failures(self) -> list[Outage]:
        """The outages that nobody asked for."""
        return [outage for outage in self.outages if not outage.planned]

    @property
    def failed_at(self) -> list[float]:
        """When it failed, in seconds since its first start; without kills.json, when the last step before ended."""
        if self.starts:
            # Before the first step there was nothing to lose.
            return [start.killed for start in self.starts if start.killed is not None and start.killed > 0]
        return [outage.last_step for outage in self.failures]

    def values(self, name: str, given: Values) -> Values:
        """The times as the simulation takes them; ``name`` is the run's, for their source; ``given`` replace its own.

        Without kills.json, starts that failed before they trained are part of ``restart``; and a failure of which no
        rank could write anything counts as noticed at once, so that its time is all in ``restart``.

        Raises:
            RunError: nothing failed in the run, and its times of a failure are not given.
        """
        saved = f"{name}, mean of {self.checkpoints} checkpoints"
        values = {"stall": Value(self.stall, saved), "durable": Value(max(self.stall, self.durable), saved), **given}
        if {"notice", "restart"} <= set(values):
            return values
        if not self.failures:
            raise RunError(f"{name}: nothing failed in this run: give --notice and --restart")
        if self.starts:
            notices = [start.ended - start.killed for start in self.starts if start.killed is not None]
            if not notices:
                raise RunError(f"{name}: it failed, but {KILLS} has no kill: give --notice and --restart")
            begins = [
                max(start.began for start in self.starts if start.began <= outage.training) for outage in self.failures
            ]
            noticed, restarted = "from SIGKILL to the end of all ranks", "from the processes' start to the first step"
        else:
            begins = [outage.last_step if outage.ended is None else outage.ended for outage in self.failures]
            notices = [begin - outage.last_step for begin, outage in zip(begins, self.failures, strict=True)]
            noticed, restarted = "from the last logged step to the last event", "from there to the first step"
        restarts = [
            outage.training - begin + outage.first_step for begin, outage in zip(begins, self.failures, strict=True)
        ]
        values = {
            **values,
            "notice": Value(statistics.mean(notices), f"{name}, mean of {len(notices)} failures, {noticed}"),
            "restart": Value(statistics.mean(restarts), f"{name}, mean of {len(restarts)} starts, {restarted}"),
        }
        return {**values, **given}

    def as_json(self) -> dict[str, Any]:
        derived = {"goodput": self.goodput, "interval_seconds": self.interval, "failed_at": self.failed_at}
        return {**asdict(self), **derived}


def measure_run(run: Path) -> MeasuredRun:
    """Reads the times of a run.

    Events of steps are cut from files of 2 MiB; starts from before that have no outage. Times of steps are known to
    ``log.interval`` steps: measure with ``log.interval=1``.

    Raises:
        RunError: files are missing or are not those of a run; names them and the reason.
    """
    events = _events(run)
    starts = [event for event in events[0] if event["event"] == "start"]
    if not starts:
        raise RunError(f"{event_path(run, 0)} has no event 'start': the run has not begun to train")
    records = _records(run)
    useful, before = 0.0, 0
    for record in records:
        useful += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    written = [record["checkpoint_write_seconds"] for record in records if "checkpoint_write_seconds" in record]
    if not written:
        raise RunError(f"{run / 'metrics.jsonl'} has no checkpoint_write_seconds: no checkpoint was complete")
    stalled = sum(record.get("checkpoint_stall_seconds", 0.0) for record in records)
    origin = starts[0]["seconds_"]
    every = [event for of_rank in events for event in of_rank]
    median_step = statistics.median(record["step_seconds"] for record in records)
    wall = max(event["seconds_"] for event in every) - origin
    if not 0 < wall <= MOST_WALL:
        raise RunError(f"{run}: its events span {wall:.3g} s, but a run lasts more than 0 s and at most ten years")
    if any(later["seconds_"] <= earlier["seconds_"] for earlier, later in pairwise(starts)):
        raise RunError(
            f"{event_path(run, 0)}: its starts are not in the order of their times, as if a clock was set back"
        )
    bounds = [start["seconds_"] for start in starts[1:]] + [math.inf]
    windows = [
        [event for event in every if start["seconds_"] <= event["seconds_"] < bound]
        for start, bound in zip(starts, bounds, strict=True)
    ]
    outages = [
        _outage(run, window, following, starts[number + 1], median_step, origin)
        for number, (window, following) in enumerate(pairwise(windows))
    ]
    return MeasuredRun(
        wall=wall,
        useful=useful,
        steps=before,
        step_seconds=useful / before,
        interval_steps=_interval(run, windows),
        stall=stalled / len(written),
        durable=statistics.mean(written),
        checkpoints=len(written),
        outages=tuple(outages),
        starts=_starts(run, origin),
    )


def _outage(
    run: Path, window: Sequence[dict], following: Sequence[dict], start: dict, median_step: float, origin: float
) -> Outage:
    steps = [event for event in window if event["event"] == "steps"]
    last = max(steps, key=lambda event: event["seconds_"], default=window[0])  # the first is its event "start"
    ends = [event for event in window if event["event"] == "ending" and event["seconds_"] >= last["seconds_"]]
    end = max(ends, key=lambda event: event["seconds_"], default=None)
    first = next((event for event in following if event["event"] == "steps"), None)
    longer = 0.0
    if first is not None:
        count = int(_number(run, first, "steps"))
        longer = max(0.0, first["seconds_"] - start["seconds_"] - count * median_step)
    return Outage(
        last_step=last["seconds_"] - origin,
        ended=None if end is None else end["seconds_"] - origin,
        training=start["seconds_"] - origin,
        first_step=longer,
        lost_steps=max(0, int(_number(run, last, "step") - _number(run, start, "step"))),
        code=None if end is None else int(_number(run, end, "code")),
    )


def _starts(run: Path, origin: float) -> tuple[Start, ...]:
    """The starts in RUN/kills.json; none if there is no such file."""
    path = run / KILLS
    if not path.exists():
        return ()
    starts = read_json(path, RunError).get("starts")
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunError(f"{path}: starts must be a list of objects, as tools/goodput.py --live writes it")
    found = []
    for start in starts:
        began, ended = (_number(path, start, key) - origin for key in ("began", "ended"))
        killed = None if start.get("killed") is None else _number(path, start, "killed") - origin
        if not began <= (began if killed is None else killed) <= ended:
            raise RunError(
                f"{path}: start {len(found) + 1} must begin before its kill, and that must be before its end"
            )
        found.append(Start(began, killed, ended))
    if not found or min(start.began for start in found) > 0:
        raise RunError(f"{path}: no start began before the run trained: it is of another run")
    return tuple(found)


def _interval(run: Path, windows: Sequence[Sequence[dict]]) -> int:
    gaps = []
    for window in windows:
        names = [str(event.get("checkpoint")) for event in window if event["event"] == "checkpoint"]
        steps = sorted({int(match[1]) for name in names if (match := re.search(r"step-(\d{1,18})$", name))})
        gaps += [after - before for before, after in pairwise(steps)]
    if not gaps:
        raise RunError(f"{run}: no start completed two checkpoints, so their interval is not known: train for longer")
    return int(statistics.median_low(gaps))


def _events(run: Path) -> list[list[dict[str, Any]]]:
    """The events of each rank, rank 0 first, each with ``seconds_`` since the epoch."""
    paths = [event_path(run, 0), *sorted(set((run / "events").glob("rank-*.jsonl")) - {event_path(run, 0)})]
    found = []
    for path in paths:
        try:
            events = read_events(path)
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}): give the folder of a run") from None
        good = []
        for event in events:
            try:
                seconds = datetime.fromisoformat(event["time"]).timestamp()
            except (KeyError, TypeError, ValueError, OverflowError):  # "unreadable" events have no time
                continue
            good.append({**event, "seconds_": seconds})
        found.append(good)
    return found


def _records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, merged by step, with checked numbers."""
    path, by_step = run / "metrics.jsonl", {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may not be complete
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}): give the folder of a run") from None
    for number, line in enumerate(lines, start=1):
        record = parse_json(line, f"{path}, line {number}", RunError)
        if not isinstance(record, dict):
            raise RunError(f"{path}, line {number}: is not a record of a run")
        by_step.setdefault(int(_number(path, record, "step")), {}).update(record)
    records = [record for _, record in sorted(by_step.items()) if "step_seconds" in record]
    for record in records:
        for key in ("step_seconds", "checkpoint_stall_seconds", "checkpoint_write_seconds"):
            if key in record:
                _number(path, record, key)
    if not records or records[-1]["step"] < 1:
        raise RunError(f"{path} has no record with step_seconds: the run has logged no step")
    return records


def _number(where: Path, values: dict[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        raise RunError(f"{where}: {key} is {value!r}, but must be a number of at least 0")
    return value
