"""The status of one run as a page, and of several as a table. What files hold cannot control the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

from dcscale.cli import short
from dcscale.cluster.status.run_status import (
    COUNTERS,
    EndingStatus,
    JobStatus,
    LeaseStatus,
    RunStatus,
    StartStatus,
    State,
    Straggler,
)
from dcscale.observe import printable

MOST_RESTARTS = 5
"""Restarts that a page lists, the last ones."""

MOST_PROBLEMS = 10
MOST_CHARACTERS, MOST_CHARACTERS_OF_ERROR = 300, 1000
"""Of a text of a file."""


def page(status: RunStatus) -> str:
    """One run, for reading."""
    lines = [f"{'run':<11}{clean(status.run)}", f"{'state':<11}{status.state}{clean(status.why, before=': ')}"]
    for name, values in _rows(status):
        for value in values:
            lines.append(f"{name:<11}{value}")
            name = ""
    return "\n".join(lines)


def _rows(status: RunStatus) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of what is known."""
    yield "progress", _progress(status)
    if status.loss is not None:
        mean = f"{status.smoothed_loss:.4f} over the last {plural(status.smoothed_over, 'record')}"
        yield "loss", [f"{mean}, {status.loss:.4f} in the last one"]
    if status.validation_loss is not None:
        bits = "" if status.bits_per_byte is None else f", {status.bits_per_byte:.4f} bits/byte"
        yield "validation", [f"{status.validation_loss:.4f}{bits} at step {_count(status.validation_step)}"]
    yield "speed", _speed(status)
    yield "left", _left(status)
    if status.record_age_seconds is not None:
        yield "recorded", [f"{duration(status.record_age_seconds)} ago"]
    yield "checkpoint", _checkpoint(status)
    if status.lease is not None:
        yield "holder", [_lease(status.lease)]
    if status.ending is not None:
        error = status.ending.error
        yield "ended", [_ending(status.ending), *([clean(error, MOST_CHARACTERS_OF_ERROR)] if error else [])]
    yield "restarts", _restarts(status.starts)
    if status.job is not None:
        yield "job", _job(status.job)
    yield "stragglers", [_straggler(slow) for slow in status.stragglers]
    skipped = [_skipped(name, value) for name, value in status.skipped.items()]
    yield "skipped", [", ".join(skipped)] if skipped else []
    yield "incidents", [_incident(event) for event in status.incidents]
    if status.hangs:
        newest = os.path.join(status.run, "hangs", status.hangs[-1])
        yield "hangs", [f"{len(status.hangs)}; stacks of the last: {clean(newest)}"]
    problems = [clean(problem) for problem in status.problems]
    more = len(problems) - MOST_PROBLEMS
    yield "problems", problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])


def _progress(status: RunStatus) -> list[str]:
    if status.step is None:
        return [] if status.steps is None else [f"no step of {status.steps:,} yet"]
    of = " steps, of a number that is not known" if status.steps is None else f" of {status.steps:,} steps"
    part = "" if status.done is None else f" ({status.done:.1%})"
    tokens = "" if status.tokens is None else f", {status.tokens:,} tokens"
    return [f"{status.step:,}{of}{part}{tokens}"]


def _speed(status: RunStatus) -> list[str]:
    parts = []
    if status.tokens_per_second is not None:
        parts.append(f"{short(status.tokens_per_second)} tokens/s")
    if status.seconds_per_step is not None:
        parts.append(f"{short(status.seconds_per_step)} s a step")
    return [", ".join(parts)] if parts else []


def _left(status: RunStatus) -> list[str]:
    if status.seconds_left is None or status.state not in (State.RUNNING, State.STALLED, State.RESUMABLE):
        return []
    left = duration(status.seconds_left)
    if status.state is State.RUNNING:
        try:
            end = datetime.now(timezone.utc) + timedelta(seconds=status.seconds_left)
        except OverflowError:
            return [left]
        return [f"{left}, until {end:%Y-%m-%d %H:%M} UTC at this speed"]
    return [f"{left} of training at the last speed; it does not train now"]


def _checkpoint(status: RunStatus) -> list[str]:
    saved = status.checkpoint
    if saved is None:
        return ["none yet"] if status.step is not None else []
    parts = [f"step {saved.step:,}"]
    if saved.age_seconds is not None:
        parts.append(f"{duration(saved.age_seconds)} ago")
    if saved.bytes is not None:
        parts.append(
            _size(saved.bytes) + ("" if saved.write_seconds is None else f" in {short(saved.write_seconds)} s")
        )
    return [f"{', '.join(parts)}: {clean(saved.path)}"]


def _lease(lease: LeaseStatus) -> str:
    renewed = "" if lease.age_seconds is None else f"renewed {duration(lease.age_seconds)} ago"
    if lease.alive:
        process = "stopped" if lease.stopped else "running"
        return f"{clean(lease.holder)}; {f'{process} on this machine, ' if lease.here else ''}{renewed}"
    gone = "which does not run any more" if lease.here else f"{renewed}, so probably gone"
    return f"{clean(lease.holder)}, {gone}: the next start takes over"


def _ending(ending: EndingStatus) -> str:
    where = "" if ending.rank is None else f", rank {ending.rank}{clean(ending.host, before=' on ')}"
    step = "" if ending.step is None else f", at step {ending.step:,}"
    when = "" if ending.time is None else f", {moment(ending.time)}"
    return f"exit code {ending.code}{clean(ending.reason, before=', ')}{where}{step}{when}"


def _restarts(starts: Sequence[StartStatus]) -> list[str]:
    """The last restarts, each with how the start before it ended."""
    lines = []
    for before, start in pairwise(starts):
        why = "all processes ended without a word"
        if before.ended is not None:
            why = _ending(replace(before.ended, time=None))
        ranks = "" if start.world_size is None else f" with {plural(start.world_size, 'rank')}"
        when = "" if start.time is None else f"{moment(start.time)}: "
        lines.append(f"{when}from step {_count(start.step)}{ranks}, after {why}")
    earlier = len(lines) - MOST_RESTARTS
    return [f"{len(lines)}, the last {MOST_RESTARTS}:", *lines[-MOST_RESTARTS:]] if earlier > 0 else lines


def _straggler(slow: Straggler) -> str:
    excess = "slower" if slow.excess is None else f"{slow.excess:.0%} slower"
    phase = clean(slow.phase, before=", most in ")
    return f"rank {slow.rank}{clean(slow.host, before=' on ')} is {excess} than the others{phase}, seen at step " + (
        _count(slow.step)
    )


def _job(job: JobStatus) -> list[str]:
    facts = [f"SLURM job {clean(job.job_id)}"]
    if job.restarts:
        facts.append(f"requeued {plural(job.restarts, 'time')}")
    if job.without_progress:
        facts.append(f"no newer checkpoint in the last {plural(job.without_progress, 'start')}")
    lines = [", ".join(facts)]
    if job.action:
        when = "" if job.time is None else f" {moment(job.time)}"
        wait = f" after {duration(job.wait_seconds)}" if job.wait_seconds else ""
        lines.append(f"decided{when}: {clean(job.action)}{wait}{clean(job.reason, before=': ')}")
    return lines + [f"without {clean(host)}: {clean(why)}" for host, why in job.excluded.items()]


def _skipped(name: str, value: int) -> str:
    noun, rest = COUNTERS[name]
    return plural(value, noun) + rest


def _incident(event: Mapping[str, Any]) -> str:
    facts = [f"{event['event'].replace('_', ' ')} at step {event.get('step')}"]
    facts += [f"{event[key]}" for key in ("reason", "error", "action") if isinstance(event.get(key), str)]
    return clean(", ".join(facts))


# -- several runs -----------------------------------------------------------------------------------------------------

COLUMNS = ("run", "state", "step", "of", "done", "loss", "validation", "tokens/s", "left", "recorded", "saved")
RIGHT = {*COLUMNS[2:], "restarts"}
"""Columns of numbers."""


def table(statuses: Sequence[RunStatus]) -> str:
    """Several runs, one a row. Columns that are empty for all of them are left out."""
    base = os.path.commonpath([os.path.dirname(os.path.abspath(status.run)) for status in statuses])
    columns = (*COLUMNS, "restarts", "remarks")
    rows = [_row(status, base) for status in statuses]
    shown = [name for name in columns if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in shown}
    lines = [clean(base)]
    for row in ({name: name for name in columns}, *rows):
        cells = [row[name].rjust(widths[name]) if name in RIGHT else row[name].ljust(widths[name]) for name in shown]
        lines.append("  ".join(cells).rstrip())
    states = Counter(status.state.value for status in statuses)
    lines.append(f"{plural(len(statuses), 'run')}: {', '.join(f'{states[s]} {s.value}' for s in State if states[s])}")
    return "\n".join(lines)


def _row(status: RunStatus, base: str) -> dict[str, str]:
    saved, left = status.checkpoint, status.seconds_left
    return {
        "run": clean(os.path.relpath(os.path.abspath(status.run), base)),
        "state": status.state.value,
        "step": _count(status.step),
        "of": _count(status.steps),
        "done": "" if status.done is None else f"{status.done:.1%}",
        "loss": "" if status.smoothed_loss is None else f"{status.smoothed_loss:.4f}",
        "validation": "" if status.validation_loss is None else f"{status.validation_loss:.4f}",
        "tokens/s": "" if status.tokens_per_second is None else short(status.tokens_per_second),
        "left": duration(left) if left is not None and status.state is State.RUNNING else "",
        "recorded": "" if status.record_age_seconds is None else f"{duration(status.record_age_seconds)} ago",
        "saved": "" if saved is None else f"{saved.step:,}",
        "restarts": str(len(status.starts) - 1) if len(status.starts) > 1 else "",
        "remarks": clean("; ".join(_remarks(status)), 100),
    }


def _remarks(status: RunStatus) -> Iterator[str]:
    """What somebody who looks at many runs should look at."""
    if status.state in (State.FAILED, State.DIVERGED) and status.ending is not None:
        yield status.ending.error or status.ending.reason
    elif status.state is State.STALLED:
        yield status.why
    elif status.state is State.RESUMABLE and status.job is not None and status.job.action == "stop":
        yield f"job {status.job.job_id} has stopped"
    for slow in status.stragglers:
        yield f"rank {slow.rank} is slow"
    for name, value in status.skipped.items():
        if name not in ("skipped_tokens", "passed_over_sequences"):
            yield _skipped(name, value)
    if status.hangs:
        yield plural(len(status.hangs), "hang")
    if status.problems:
        yield status.problems[0] if len(status.problems) == 1 else f"{len(status.problems)} problems"


# -- words ------------------------------------------------------------------------------------------------------------


def clean(value: str | None, most: int = MOST_CHARACTERS, before: str = "") -> str:
    """A text of a file as one line that can be printed anywhere, after ``before``; empty if there is none."""
    if not value:
        return ""
    line = printable(" ".join(value.split())).encode("utf-8", "backslashreplace").decode()
    return before + (line if len(line) <= most else f"{line[: most - 3]}...")


def duration(seconds: float) -> str:
    """Seconds in the units that matter: ``40 s``, ``12 min``, ``5 h 12 min``, ``3 d 4 h``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plural(number: int, noun: str) -> str:
    """A number of things: ``1 run``, ``2 runs``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def moment(seconds: float) -> str:
    """A time, in UTC."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _size(size: int) -> str:
    return f"{short(size / 2**30)} GiB" if size >= 2**30 else f"{short(size / 2**20)} MiB"
