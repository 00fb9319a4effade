"""From the files of a run to its status. Everything is judged by the files and one clock, this machine's."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dcscale.cluster.ending import ENDING, ENDING_FORMAT, ExitCode
from dcscale.cluster.status.run_files import (
    CHECKPOINTS,
    CODE,
    MARKER,
    RunFiles,
    count,
    number,
    open_file,
    text,
    timestamp,
)
from dcscale.cluster.status.run_status import (
    COUNTERS,
    CheckpointStatus,
    EndingStatus,
    JobStatus,
    LeaseStatus,
    Progress,
    RunStatus,
    StartStatus,
    State,
    Straggler,
    judge,
    patience,
)
from dcscale.lease import LEASE, LeaseTimes, holder_of, process_state

SMOOTHED, RECENT = 50, 20
"""Records over which the loss is averaged, and those over which tokens/s are."""

CLOCK_SKEW = 30.0
"""Seconds by which times of the run may be in the future of this machine without a remark."""

MOST_INCIDENTS = 5

RESTARTS = "restarts.json"
"""Of ``dcscale.cluster.restarts``, which imports what reads configs: that takes longer than the rest here."""

RUN_ENTRIES = {CHECKPOINTS, "metrics.jsonl", "events", LEASE, ENDING, RESTARTS, "summary.json"}
"""What a folder has one of at least, if it is that of a run."""

INCIDENTS = ("nonfinite", "spike", "rollback", "rollback_failure", "checkpoint_failure", "request_failure")
"""Kinds of events that should not happen."""


def find_runs(path: Path, depth: int = 2) -> list[Path]:
    """The run folder at ``path``, or those in it, in the order of the numbers in their names; empty without any.

    Also the runs of a job array whose tasks have not started, so that they have no folder yet. A folder that cannot be
    listed counts as a run, so that its status says why.
    """
    try:
        names = os.listdir(path)
    except OSError:
        return [path]
    if not RUN_ENTRIES.isdisjoint(names) or os.path.isfile(path / CODE / "config.yaml"):
        return [path]
    waiting = {name: [path / name] for name in _tasks_without_folder(path, names)}
    folders = [name for name in names if depth > 0 and name[0] != "." and os.path.isdir(path / name)]
    found = {**waiting, **{name: find_runs(path / name, depth - 1) for name in folders}}
    return [run for name in sorted(found, key=natural) for run in found[name]]


def _tasks_without_folder(array: Path, names: Sequence[str]) -> list[str]:
    """Names of the folders that tasks of a job array will have, which ``launch/slurm/submit.py`` has submitted."""
    files, numbers = RunFiles(array), {name.partition("-")[0] for name in names}
    configs = [match for name in files.names(CODE) if (match := re.fullmatch(r"config-(\d+)\.yaml", name))]
    return [
        Path(files.settings(array / CODE / match[0]).get("run.folder") or match[1]).name
        for match in configs
        if match[1] not in numbers
    ]


def natural(name: str) -> list[tuple[float, str]]:
    """A key that sorts names by the numbers in them: ``lr=3e-4`` before ``lr=1e-3``, ``run-9`` before ``run-10``."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def read_status(run: Path, now: float | None = None) -> RunStatus:
    """The status of a run. Whatever its files hold, nothing is raised: see ``RunStatus.problems``.

    Args:
        run: the run folder, which need not exist.
        now: seconds since 1970; None: now.
    """
    now, files = time.time() if now is None else now, RunFiles(run)
    if not os.path.isdir(run):
        files.problems.append(f"{run} is not a folder" if os.path.lexists(run) else f"{run} does not exist")
    elif (names := files.names("")) and RUN_ENTRIES.isdisjoint(names) and CODE not in names:
        files.problems.append(f"{run} has nothing of a run: give the folder that is run.folder in its config")
    config, records, events = files.config(), files.records(), files.events()
    summary, last = files.json("summary.json"), records[-1] if records else {}
    lease, starts = _lease(files, now), _starts(files, events)
    since_start = events[max((i for i, event in enumerate(events) if event["event"] == "start"), default=0) :]
    progress = Progress.of(events)
    ending = _ending(files, lease, starts)
    checkpoint = _checkpoint(files, events, now)
    step, steps = _step(last, starts, ending, checkpoint), count(config.get("train.steps"))
    validation = next((record for record in reversed(records) if "validation_loss" in record), None)
    validation = files.last_validation() if validation is None and records else validation or {}
    losses = [loss for record in records if (loss := number(record.get("loss"))) is not None]
    seconds_per_step = progress.seconds_per_step or _mean(records, "step_seconds")
    left = None if step is None or steps is None or seconds_per_step is None else max(0, steps - step)
    recorded = progress.last_time
    if recorded is None and records:
        recorded = files.modified(run / "metrics.jsonl")
    status = RunStatus(
        run=str(run),
        state=State.NOT_STARTED,
        why="",
        step=step,
        steps=steps,
        tokens=count(last.get("tokens")),
        loss=losses[-1] if losses else None,
        smoothed_loss=statistics.fmean(losses[-SMOOTHED:]) if losses else None,
        smoothed_over=len(losses[-SMOOTHED:]),
        validation_loss=number(validation.get("validation_loss")),
        validation_step=count(validation.get("step")),
        bits_per_byte=number(validation.get("bits_per_byte")),
        tokens_per_second=_mean(records, "tokens_per_second"),
        seconds_per_step=seconds_per_step,
        seconds_left=None if left is None else left * seconds_per_step,
        record_age_seconds=None if recorded is None else max(0.0, now - recorded),
        record=last,
        checkpoint=checkpoint,
        ending=ending,
        starts=starts,
        stragglers=_stragglers(since_start),
        skipped={name: value for name in COUNTERS if (value := count(last.get(name)))},
        incidents=[event for event in events if event["event"] in INCIDENTS][-MOST_INCIDENTS:],
        hangs=files.names("hangs"),
        lease=lease,
        job=_job(files),
    )
    signs = [recorded, timestamp(events[-1].get("time")) if events else None, lease.since if lease else None]
    latest = max([sign for sign in signs if sign is not None], default=now if lease and lease.alive else 0.0)
    if latest > now + CLOCK_SKEW:
        ahead = f"{latest - now:.0f} s ahead of the clock of this machine"
        files.problems.append(f"{run} has times that are {ahead}: the state and all ages may be wrong")
    state, why = judge(status, summary, now - latest, patience(config, progress, status))
    problems = files.problems if os.path.isdir(run) else files.problems[:1]  # all others follow from the first
    return replace(status, state=state, why=why, problems=problems)


# -- parts ------------------------------------------------------------------------------------------------------------


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for record in records[-RECENT:] if (value := number(record.get(name))) is not None]
    return statistics.fmean(values) if values else None


def _step(
    record: Mapping[str, Any],
    starts: Sequence[StartStatus],
    ending: EndingStatus | None,
    checkpoint: CheckpointStatus | None,
) -> int | None:
    """Steps done: records are only written every ``log.interval`` steps, and not of steps gone back from."""
    if ending is not None and ending.step is not None:
        return ending.step
    known = [record.get("step"), starts[-1].step if starts else None]
    known = [step for value in known if (step := count(value)) is not None]
    return max(known) if known else checkpoint and checkpoint.step


def _lease(files: RunFiles, now: float) -> LeaseStatus | None:
    path = files.run / LEASE
    renewed = files.modified(path)
    if renewed is None:
        return None
    try:
        open_file(path).close()
        holder = holder_of(files.run)
    except OSError as error:
        files.problems.append(f"{path} cannot be read: {error.strerror or error}")
        return None
    age = max(0.0, now - renewed)
    fresh = age < LeaseTimes().expire
    if holder is None:
        files.problems.append(f"{path} is damaged, so who holds the run is not known")
        return LeaseStatus("an unknown process", fresh, False, False, age, None, None)
    here = holder.on_this_machine()
    alive = not holder.is_gone() if here else fresh
    stopped = here and alive and process_state(holder.pid)[0] == "T"
    return LeaseStatus(str(holder), alive, here, stopped, age, timestamp(holder.since), holder.job or None)


def _ending(files: RunFiles, lease: LeaseStatus | None, starts: Sequence[StartStatus]) -> EndingStatus | None:
    """How the last start ended, by ``ending.json``, or else by its events; None if it runs, or says nothing."""
    content = files.json(ENDING)
    ending = _parsed_ending(content)
    if content and (ending is None or content.get("format") != ENDING_FORMAT):
        files.problems.append(
            f"{files.run / ENDING} has format {content.get('format')!r} and code {content.get('code')!r}: this version "
            f"reads format {ENDING_FORMAT} and the codes {', '.join(str(int(code)) for code in ExitCode)}"
        )
        ending = None
    if ending is None and starts:
        ending = starts[-1].ended
    # A start removes the file of the one before, unless it trains without launch/train.py.
    earlier = lease and lease.since and ending and ending.time and ending.time < lease.since
    return None if earlier else ending


def _parsed_ending(content: Mapping[str, Any]) -> EndingStatus | None:
    """An ending, of ``ending.json`` or of an event; None if it has no valid code."""
    code = count(content.get("code"))
    if code not in list(ExitCode):
        return None
    return EndingStatus(
        code=code,
        reason=text(content.get("reason")) or "",
        time=timestamp(content.get("time")),
        step=count(content.get("step")),
        rank=count(content.get("rank")),
        host=text(content.get("host")),
        error=text(content.get("error")),
    )


def _starts(files: RunFiles, events: Sequence[Mapping[str, Any]]) -> list[StartStatus]:
    """The starts in the events of rank 0. If that could not write how one ended, another rank may have."""
    places = [place for place, event in enumerate(events) if event["event"] == "start"]
    others: list[EndingStatus] | None = None
    starts = []
    for place, following in pairwise([*places, len(events)]):
        event, later = events[place], events[place + 1 : following]
        end = next((_parsed_ending(other) for other in reversed(later) if other["event"] == "ending"), None)
        begun = timestamp(event.get("time"))
        if end is None and begun is not None:
            if others is None:
                found = [other for rank in (1, 2, 3) for other in files.events(rank, 0) if other["event"] == "ending"]
                others = [ended for other in found if (ended := _parsed_ending(other)) is not None]
            until = timestamp(events[following].get("time")) if following < len(events) else None
            end = next((e for e in others if e.time and begun <= e.time and (until is None or e.time < until)), None)
        starts.append(
            StartStatus(
                time=begun,
                step=count(event.get("step")),
                checkpoint=text(event.get("checkpoint")),
                host=text(event.get("host")),
                world_size=count(event.get("world_size")),
                ended=end,
            )
        )
    return starts


def _checkpoint(files: RunFiles, events: Sequence[Mapping[str, Any]], now: float) -> CheckpointStatus | None:
    newest = files.newest_checkpoint()
    if newest is None:
        return None
    step, path = newest
    written = [
        e for e in events if e["event"] == "checkpoint" and Path(text(e.get("checkpoint")) or "").name == path.name
    ]
    event = written[-1] if written else {}
    at = timestamp(event.get("time")) or files.modified(path / MARKER)
    return CheckpointStatus(
        step=step,
        path=str(path),
        age_seconds=None if at is None else max(0.0, now - at),
        bytes=count(event.get("bytes")),
        write_seconds=number(event.get("seconds")),
    )


def _job(files: RunFiles) -> JobStatus | None:
    content = files.json(RESTARTS)
    if not content:
        return None
    last, excluded = content.get("last"), content.get("excluded")
    last = last if isinstance(last, dict) else {}
    return JobStatus(
        job_id=text(content.get("job_id")),
        restarts=count(content.get("restarts")),
        without_progress=count(content.get("without_progress")),
        excluded={host: str(why) for host, why in excluded.items()} if isinstance(excluded, dict) else {},
        action=text(last.get("action")),
        reason=text(last.get("reason")),
        time=timestamp(last.get("time")),
        wait_seconds=number(last.get("wait_seconds")),
    )


def _stragglers(events: Sequence[Mapping[str, Any]]) -> list[Straggler]:
    """The ranks that are slow, of the events of one start."""
    slow: dict[int, Straggler] = {}
    for event in events:
        rank = count(event.get("rank"))
        if rank is not None and event["event"] == "straggler":
            host, phase = text(event.get("host")), text(event.get("phase"))
            slow[rank] = Straggler(rank, host, number(event.get("excess")), phase, count(event.get("step")))
        elif event["event"] == "recovered":
            slow.pop(rank, None)
    return list(slow.values())
