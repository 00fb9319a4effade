"""Whether a SLURM job starts again after srun has ended: ``launch/slurm/job.sbatch`` asks.

    python -m dcscale.cluster.restarts RUN --code 137 --started 1764209000
    python -m dcscale.cluster.restarts CONFIG.yaml key=value ... --code 137 --started 1764209000

The run folder, or the arguments of launch/train.py that name it. Decides by RUN/ending.json, or by srun's exit code if
this start has written none, and requeues the job, or exits with the code that the job ends with. See :func:`decide`.

``RUN/restarts.json``, written by this program only:

- ``format``: 1
- ``job_id``: SLURM's number of the job that the counts are of; those of another job begin at 0
- ``step``: of the newest complete checkpoint when the last start ended
- ``restarts``: how often the job was requeued
- ``without_progress``: starts in a row that have ended without a newer checkpoint
- ``faults``: hosts that were the cause of the last starts that ended with 76, newest last; null if it is not known
- ``excluded``: nodes that the job is not to get any more, with the reason
- ``last``: the last decision: ``time`` (UTC, ISO 8601), ``action`` (done, restart, stop), ``code``, ``reason``,
  ``wait_seconds``

``RUN/bad_nodes/HOST.json``, see :func:`report_bad_node`: ``format`` 1, ``host``, ``reason``, ``job_id`` and
``restart_count`` of the start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from dcscale.cluster.ending import ENDING, ENDING_FORMAT, ExitCode
from dcscale.cluster.job.slurm import Job, SlurmError, patient_command, printable
from dcscale.config import ConfigError, load_arguments
from dcscale.files import read_json, write_json

RESTARTS, BAD_NODES, FORMAT = "restarts.json", "bad_nodes", 1
MOST_WITHOUT_PROGRESS = 8
"""Starts in a row without a newer checkpoint, after which the job ends."""

FIRST_WAIT, LONGEST_WAIT = 30, 1800
"""Seconds before the next start after the second one without progress, doubled after each, up to the longest."""

FAULTS_SEEN, FAULTS_OF_A_BAD_NODE = 5, 2
"""A host that was the cause of so many of the last failed starts is excluded."""

CLOCK_SKEW = 300
"""Seconds by which the clock of the host that wrote ``ending.json`` may be behind that of the job script."""

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")


class Action(str, Enum):
    """What the job script does."""

    DONE = "done"
    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class History:
    """``restarts.json`` without what is only for people."""

    job_id: str = ""
    step: int = 0
    restarts: int = 0
    without_progress: int = 0
    faults: tuple[str | None, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)

    def of_job(self, job_id: str) -> History:
        """What counts for this job: of another one, only how far the run was."""
        return self if self.job_id == job_id else History(job_id, self.step)


@dataclass(frozen=True)
class Outcome:
    """How a start ended."""

    code: int
    """Exit code of srun."""

    ending: Mapping[str, Any] | None
    """Content of ``ending.json`` if this start has written it."""

    step: int
    """Of the newest complete checkpoint; 0 if there is none."""

    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    """Nodes that failed their check in this start, with the reason."""

    ended_by_slurm: str = ""
    """Why SLURM ends this start itself, such as after scancel; empty if it does not."""


@dataclass(frozen=True)
class Decision:
    """What to do, why, and what to remember."""

    action: Action
    code: int
    """Exit code of the job, unless it is restarted."""

    reason: str
    history: History
    wait: int = 0
    """Seconds before the next start."""


def decide(outcome: Outcome, history: History) -> Decision:
    """What the job does after a start; a pure function.

    ``ending.json`` decides, else srun's code, of which 129 and more are those of killed ranks, but for Ctrl-C:

    - 0: done; 75 and 76: restart; all others: stop.
    - A start that SLURM ends itself, as after scancel, is not restarted by this script.
    - Starts without a newer checkpoint are counted: from the second in a row on, the next has to wait, twice as long
      each time, and after ``MOST_WITHOUT_PROGRESS`` the job stops. There is no limit for others.
    - Nodes that failed their check, and hosts that were the cause of several of the last failures, are excluded.
    """
    code, why = _meaning(outcome)
    if code not in (ExitCode.RESUME, ExitCode.RETRY):
        action = Action.DONE if code == ExitCode.DONE else Action.STOP
        without = 0 if outcome.step > history.step else history.without_progress
        return Decision(action, code, why, replace(history, step=outcome.step, without_progress=without))
    faults = history.faults
    if code == ExitCode.RETRY:
        host = None if outcome.ending is None else outcome.ending.get("host")
        faults = (*faults, host if _is_host(host) else None)[-FAULTS_SEEN:]
    often = {
        host: f"the cause of {count} of the last {len(faults)} failures"
        for host, count in Counter(faults).items()
        if host is not None and count >= FAULTS_OF_A_BAD_NODE
    }
    without = 0 if outcome.step > history.step else history.without_progress + 1
    history = replace(
        history,
        step=outcome.step,
        without_progress=without,
        faults=faults,
        excluded={**often, **history.excluded, **outcome.bad_nodes},
    )
    if outcome.ended_by_slurm:
        return Decision(Action.STOP, code, f"{why}; {outcome.ended_by_slurm}", history)
    if without >= MOST_WITHOUT_PROGRESS:
        reason = (
            f"{why}; {without} starts in a row have ended without a newer checkpoint than that of step {outcome.step}: "
            "find the cause in RUN/logs and RUN/hangs, then submit again"
        )
        return Decision(Action.STOP, code, reason, history)
    wait = min(FIRST_WAIT * 2 ** (without - 2), LONGEST_WAIT) if without > 1 else 0
    return Decision(Action.RESTART, code, why, replace(history, restarts=history.restarts + 1), wait)


def _meaning(outcome: Outcome) -> tuple[int, str]:
    """The exit code that an outcome amounts to, and why."""
    ending = outcome.ending
    if ending is not None:
        host, rank = ending.get("host"), ending.get("rank")
        who = f" (rank {rank} on {host})" if isinstance(rank, int) and _is_host(host) else ""
        return ending["code"], f"{printable(ending.get('reason'))}{who}"
    code, why = outcome.code, f"srun ended with {outcome.code}"
    if code > 128 and code != ExitCode.INTERRUPTED:
        try:
            why += f" ({signal.Signals(code - 128).name})"
        except ValueError:  # no signal has this number
            return code, why
        code = ExitCode.RETRY
    return int(code), why


def _is_host(name: Any) -> bool:
    return isinstance(name, str) and _HOST.fullmatch(name) is not None


# -- files of the run -------------------------------------------------------------------------------------------------


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, by its name and marker; 0 if there is none."""
    found = [re.fullmatch(r"step-(\d{8,18})", marker.parent.name) for marker in run.glob("checkpoints/*/COMPLETE")]
    return max((int(name[1]) for name in found if name), default=0)


def read_ending(run: Path, started: float, variables: Mapping[str, str]) -> dict[str, Any] | None:
    """``ending.json`` if it is of the start that began at ``started`` (Unix seconds), else None.

    Raises:
        ValueError: the file is malformed.
    """
    path = run / ENDING
    if not path.exists():
        return None
    content = read_json(path)
    code = content.get("code")
    if content.get("format") != ENDING_FORMAT or type(code) is not int or code not in list(ExitCode):
        found = printable(f"format {content.get('format')!r} and code {code!r}")
        raise ValueError(f"{path} has {found}, but must have format {ENDING_FORMAT} and a code of launch/README.md")
    try:
        written = datetime.fromisoformat(content["time"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        found = printable(repr(content.get("time")))
        raise ValueError(f"{path} has the time {found}, but must have one in ISO 8601") from None
    if not _is_of_this_start(content, variables):
        return None
    skew = CLOCK_SKEW if content.get("job_id") else 0
    return content if written >= int(started) - skew else None


def _is_of_this_start(content: Mapping[str, Any], variables: Mapping[str, str]) -> bool:
    names = (("job_id", "SLURM_JOB_ID", ""), ("restart_count", "SLURM_RESTART_COUNT", "0"))
    return all((content.get(key) or default) == (variables.get(name) or default) for key, name, default in names)


def read_history(run: Path) -> History:
    """``restarts.json``; an empty history if there is none.

    Raises:
        ValueError: it is malformed; says what is wrong.
    """
    path = run / RESTARTS
    if not path.exists():
        return History()
    content = read_json(path)
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "format": (f"must be {FORMAT}", lambda value: value == FORMAT),
        "job_id": ("must be text", lambda value: isinstance(value, str)),
        **dict.fromkeys(("step", "restarts", "without_progress"), ("must be a number of 0 or more", _is_count)),
        "faults": (
            "must be a list of hosts or null",
            lambda value: isinstance(value, list) and all(host is None or _is_host(host) for host in value),
        ),
        "excluded": (
            "must map hosts to reasons",
            lambda value: isinstance(value, dict) and all(map(_is_host, value)),
        ),
    }
    for key, (rule, holds) in rules.items():
        if not holds(content.get(key)):
            raise ValueError(f"{path} has {key} {printable(repr(content.get(key)))}: it {rule}")
    excluded = {host: printable(why) for host, why in content["excluded"].items()}
    counts = {key: content[key] for key in ("step", "restarts", "without_progress")}
    return History(content["job_id"], **counts, faults=tuple(content["faults"]), excluded=excluded)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def write_history(run: Path, decision: Decision, now: datetime) -> None:
    """Writes ``restarts.json``, atomically. Raises OSError if it cannot be written."""
    last = {
        "time": now.isoformat(timespec="seconds"),
        "action": decision.action.value,
        "code": decision.code,
        "reason": decision.reason,
        "wait_seconds": decision.wait,
    }
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / RESTARTS, {"format": FORMAT, **asdict(decision.history), "last": last})


def report_bad_node(run: Path, host: str, reason: str, variables: Mapping[str, str] = os.environ) -> None:
    """Records that a node failed its check: the job does not get it again. A rank of the node calls it.

    Raises:
        OSError: the file cannot be written.
    """
    (run / BAD_NODES).mkdir(parents=True, exist_ok=True)
    job = {"job_id": variables.get("SLURM_JOB_ID"), "restart_count": variables.get("SLURM_RESTART_COUNT")}
    write_json(run / BAD_NODES / f"{host}.json", {"format": FORMAT, "host": host, "reason": reason, **job})


def read_bad_nodes(run: Path, variables: Mapping[str, str], warn: Callable[[str], None]) -> dict[str, str]:
    """Nodes that failed their check in this start, with the reason. Malformed files are left out with a warning."""
    found = {}
    for path in sorted((run / BAD_NODES).glob("*.json")):
        try:
            content = read_json(path)
            if content.get("format") != FORMAT or not _is_host(content.get("host")):
                raise ValueError(f"{path} must have format {FORMAT} and the name of a host")
        except ValueError as error:
            warn(str(error))
            continue
        if _is_of_this_start(content, variables):
            found[content["host"]] = f"its check failed: {printable(content.get('reason'))}"
    return found


# -- program ----------------------------------------------------------------------------------------------------------


def main(
    arguments: Sequence[str] | None = None,
    variables: Mapping[str, str] = os.environ,
    command: Callable[..., str] = patient_command,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="RUN|CONFIG.yaml|key=value", help="names the run folder")
    parser.add_argument("--code", type=int, required=True, metavar="N", help="exit code of srun")
    parser.add_argument("--started", type=float, required=True, metavar="T", help="Unix seconds before srun began")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    run = run_folder([*options.settings, *unknown])
    if run is None:  # launch/train.py has said what is wrong with the config
        say(f"stopped    srun ended with {options.code}; the config names no run folder")
        return options.code
    return act(run, options.code, options.started, variables, command)


def run_folder(settings: Sequence[str]) -> Path | None:
    """The run folder that arguments of launch/train.py name, or that is given itself; None if they cannot be read."""
    if len(settings) == 1 and Path(settings[0]).is_dir():
        return Path(settings[0])
    try:
        return Path(load_arguments(settings).config.run.folder)
    except ConfigError:
        return None


def act(run: Path, code: int, started: float, variables: Mapping[str, str], command: Callable[..., str]) -> int:
    """Decides, writes it down and does it; returns the exit code of the job script."""
    job_id, job, trouble = variables.get("SLURM_JOB_ID", ""), None, ""
    try:
        job = Job(variables, command)
        trouble = job.ended_by_slurm()
    except SlurmError as error:
        trouble = f"SLURM cannot be asked ({error}), so the job is not started again"
    try:
        ending = read_ending(run, started, variables)
    except ValueError as error:
        say(f"warning    {error}; srun's exit code decides")
        ending = None
    try:
        history = read_history(run)
    except ValueError as error:
        say(f"warning    {error}; starts without progress are counted from 0")
        history = History()
    bad = read_bad_nodes(run, variables, lambda text: say(f"warning    {text}"))
    try:
        step = newest_step(run)
    except OSError as error:
        say(f"warning    {run / 'checkpoints'} cannot be read ({error.strerror or error}): counted as no progress")
        step = history.step
    decision = decide(Outcome(code, ending, step, bad, trouble), history.of_job(job_id))
    try:
        write_history(run, decision, datetime.now(timezone.utc))
    except OSError as error:
        if decision.action is not Action.DONE:  # without the count, it might start again for ever
            say(f"stopped    {decision.reason}; {run / RESTARTS} cannot be written: {error.strerror or error}")
            return decision.code
    if decision.action is not Action.RESTART or job is None:
        word = "done" if decision.action is Action.DONE else "stopped"
        say(f"{word:10} {decision.reason}; exit code {decision.code}")
        return decision.code
    try:
        restart(job, decision)
    except SlurmError as error:
        say(f"stopped    {decision.reason}; the job cannot be started again: {error}; exit code {decision.code}")
        with contextlib.suppress(OSError):  # it could be written just now, and nothing depends on it any more
            reason = f"{decision.reason}; the job cannot be started again: {printable(error)}"
            write_history(run, replace(decision, action=Action.STOP, reason=reason), datetime.now(timezone.utc))
        return decision.code
    return 0


def restart(job: Job, decision: Decision) -> None:
    """Requeues the job. Raises SlurmError if SLURM does not."""
    exclude = _nodes_to_exclude(job, decision.history.excluded)
    wait = f", in {decision.wait} s" if decision.wait else ""
    count = decision.history.without_progress
    note = f"; start {count} of {MOST_WITHOUT_PROGRESS} without a newer checkpoint" if count else ""
    say(f"restart    job {job.name}{wait}: {decision.reason}{note}")
    job.requeue()
    try:
        job.change(decision.wait, exclude)
    except SlurmError as error:
        say(f"warning    the job starts again, but at once and on any node: {error}")


def _nodes_to_exclude(job: Job, excluded: Mapping[str, str]) -> list[str]:
    """Those that the job can do without, as SLURM calls them; says of each host what becomes of it."""
    if not excluded:
        return []
    try:
        nodes, why_not = job.excludable(list(excluded))
    except SlurmError as error:
        say(f"warning    no node is excluded, since SLURM does not say which the job can do without: {error}")
        return []
    for host, reason in excluded.items():
        outcome = f"would be excluded, but {why_not[host]}" if host in why_not else "is excluded"
        say(f"node       {host} {outcome}: {reason}")
    return nodes


def say(line: str) -> None:
    """Prints a line with the time, since the log of a job has those of all its starts."""
    print(f"{time.strftime('%F %T')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
