"""Ends a run that hangs, and names the rank that does.

Two threads on each rank: one exchanges heartbeats through the run's store, where it may block; the other looks at the
clock only, and ends this process if it is cut off. What happens when a rank hangs:

1. Rank 0 sees that a heartbeat is missing, or that a rank is in its phase for longer than the limit, and raises the
   alarm: it asks all ranks what they do. If rank 0 is missing, the first rank that sees it takes its place.
2. Every rank answers, and writes stacks and collectives into ``RUN/hangs/TIME/rank-N.txt``.
3. The rank that asked judges (:mod:`dcscale.cluster.verdict`) and prints who is at fault; all end with exit code 76.

A call in C that never gives back the interpreter's lock stops these threads too. Then a signal handler of faulthandler
prints the stack of the main thread, and the other ranks miss the heartbeat.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from dcscale.cluster import flight_recorder
from dcscale.cluster.ending import Ending, ExitCode
from dcscale.cluster.failures import Failure, tell_torchrun
from dcscale.cluster.hang_report import describe_main_thread, process_text, write_report
from dcscale.cluster.heartbeats import Alarm, Heartbeats
from dcscale.cluster.limits import MARGIN_SECONDS, AwakeClock, Limits
from dcscale.cluster.verdict import Answer, Status, Verdict, judge, rank_lines
from dcscale.config.schema import ParallelConfig
from dcscale.lease import pid_namespace, process_state
from dcscale.observe.requests import OUTPUT, STACKS, RequestError, RequestFiles
from dcscale.parallel import Environment, current_rendezvous
from dcscale.parallel.collectives import set_timeouts

START, STEP, NONE = "start", "step", "none"
"""Phases: before the first one, the one with a limit of its own, and between all others."""

HANGS = "hangs"
"""Folder in the run folder."""

LOOK_SECONDS = 1.0
"""Between two looks for ``RUN/stacks``."""

_numbers = itertools.count()
T = TypeVar("T")


class _Phase:
    """Tells the watchdog what the main thread does within it. A class, since a generator would take twice as long."""

    __slots__ = ("_began", "_name", "_outer", "_watchdog")

    def __init__(self, watchdog: Watchdog, name: str):
        self._watchdog, self._name = watchdog, name

    def __enter__(self) -> None:
        self._began = time.time()
        self._outer = self._watchdog._enter(self._name, self._began)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog._leave(self._name, self._began, self._outer, failed=kind is not None)


class Unwatched:
    """Replaces a :class:`Watchdog` where a hang must not end the process, as in tests."""

    patient = False

    def phase(self, name: str) -> AbstractContextManager[None]:
        """See :meth:`Watchdog.phase`."""
        return nullcontext()

    def step_done(self, step: int, seconds: float) -> None:
        """See :meth:`Watchdog.step_done`."""

    def close(self) -> None:
        """See :meth:`Watchdog.close`."""


class Watchdog:
    """Watches this rank's main thread, and on rank 0 all ranks.

    Args:
        rank: this rank.
        hosts: the host of each rank.
        limits: when something counts as a hang.
        ending: ends this process; knows the run folder.
        open_store: makes a client of the run's store that no other thread uses; raises DistError if it does not
            answer. Not called if this is the only rank.
        set_timeouts: sets the timeouts of all process groups, in seconds.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        limits: Limits,
        ending: Ending,
        open_store: Callable[[], dist.Store],
        set_timeouts: Callable[[float], None],
    ):
        self._rank, self._limits, self._ending, self._set_timeouts = rank, limits, ending, set_timeouts
        self._clock = AwakeClock(longest=limits.lost / 6)
        self._heartbeats = Heartbeats(rank, hosts, open_store, self._clock.now) if len(hosts) > 1 else None
        self._namespace = pid_namespace()
        self._phase = START, self._clock.now()
        self._step = 0
        self._seconds: deque[float] = deque(maxlen=64)
        self._step_limit = limits.start
        self._timeout: float | None = None
        self._step_times: deque[flight_recorder.Interval] = deque(maxlen=32)
        self._closed, self._roll_call = threading.Event(), threading.Event()
        self._leaving = self._alarmed = False
        self.patient = False
        """Whether a rank may hold the lock of Python for minutes: it counts as lost after ten times the time."""
        self._stacks = ""
        self.on_stacks: Callable[[str], None] = lambda folder: None
        """Called on rank 0, by another thread, when a user has asked for the stacks of all ranks."""
        self._threads = [threading.Thread(target=self._watch, name="dcscale-watchdog", daemon=True)]
        if self._heartbeats is not None:
            self._threads.append(threading.Thread(target=self._exchange, name="dcscale-heartbeat", daemon=True))
        if rank == 0 and ending.run is not None:
            files = RequestFiles(ending.run, [STACKS], seconds=0)
            self._threads.append(threading.Thread(target=self._look, args=(files,), name="dcscale-look", daemon=True))
        self._arm()  # also for a hang before the thread's first look at the clock
        for thread in self._threads:
            thread.start()

    # -- for the main thread ------------------------------------------------------------------------------------------

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Says what the main thread does within the context: ``data``, ``step``, or the name of a hook."""
        return _Phase(self, name)

    def step_done(self, step: int, seconds: float) -> None:
        """To be called after each optimizer step, with its wall-clock seconds."""
        self._step = step
        self._seconds.append(seconds)

    def deviation(self) -> str | None:
        """How the collectives of this rank's last step differ from those of the steps before."""
        return flight_recorder.deviation(flight_recorder.recorded_collectives(), list(self._step_times))

    def lost_ranks(self, seconds: float) -> dict[int, str]:
        """The ranks that do not run any more, with their hosts; none are known after :meth:`close`.

        This rank must be about to end. Does not return while the watchdog is ending this process itself.

        Args:
            seconds: for which a rank may be silent; at least the time of a heartbeat.
        """
        heartbeats = self._heartbeats
        if heartbeats is None or self._closed.is_set():
            return {}
        began, patience = time.monotonic(), max(seconds, self._limits.beat + 1)
        called = self._clock.now()
        self._leaving = True  # so that the ranks that ask somewhat later do not miss this one
        self._roll_call.set()
        while time.monotonic() < began + patience / 2 and heartbeats.contact < called:
            time.sleep(0.05)
        read = self._clock.now()  # what was new then may still have been sent before the rank was lost
        missing: list[int] = []
        gone: list[int] = []
        while time.monotonic() < began + patience:
            others = [s for s in heartbeats.statuses.values() if s.rank != self._rank and not s.ending]
            missing = [status.rank for status in others if heartbeats.changed[status.rank] < read]
            gone = [status.rank for status in others if status.pid and self._process(status) == ""]
            if gone or not missing:
                missing = gone
                break
            time.sleep(0.05)
        while self._alarmed:
            time.sleep(1)
        if missing != gone and self._rank != 0 and heartbeats.contact < called:
            missing = [0]  # all that is known is that the store is gone, which was in the process of rank 0
        return {rank: heartbeats.statuses[rank].host for rank in missing}

    def close(self) -> None:
        """Stops watching."""
        self._leaving = True
        self._closed.set()
        self._roll_call.set()
        for thread in self._threads:
            thread.join(timeout=self._limits.answer)  # a daemon: it may wait for a store that is gone
        self._disarm()

    # -- phases -------------------------------------------------------------------------------------------------------

    def _enter(self, name: str, began: float) -> str:
        """Begins a phase; returns the one around it."""
        (outer, _), self._phase = self._phase, (name, self._clock.now())
        if name == STEP:
            self._step_times.append((began, None))
        self._use_timeout(name)
        return NONE if outer == START else outer

    def _leave(self, name: str, began: float, outer: str, failed: bool) -> None:
        if name == STEP and not failed:  # a step that failed is not complete
            self._step_times[-1] = began, time.time()
        self._phase = outer, self._clock.now()
        self._use_timeout(outer)

    def _use_timeout(self, phase: str) -> None:
        seconds = self._limit(phase) + MARGIN_SECONDS
        if seconds != self._timeout:
            self._timeout = seconds
            self._set_timeouts(seconds)

    def _limit(self, phase: str) -> float:
        """Longest time in a phase, in seconds."""
        if phase == START:
            return self._limits.start
        return self._step_limit if phase == STEP else self._limits.pause

    def _limit_text(self, phase: str) -> str:
        """The limit of a phase, and the setting that changes it."""
        if phase == START or (phase == STEP and not self._seconds):
            setting = "start_timeout_minutes"
        else:
            setting = "hang_seconds" if phase == STEP else "pause_timeout_minutes"
        return f"limit of phase {phase}: {self._limit(phase):.0f} s (parallel.{setting})"

    def _lost_limit(self) -> float:
        return self._limits.lost * (10 if self.patient else 1 if self._seconds else 4)

    def _status(self) -> Status:
        phase, since = self._phase
        return Status(
            rank=self._rank,
            host=self._ending.host,
            pid=os.getpid(),
            namespace=self._namespace,
            step=self._step,
            phase=phase,
            seconds=self._clock.now() - since,
            started=flight_recorder.started_collectives(),
            ending=self._leaving,
            stacks=self._stacks,
        )

    # -- the thread that looks at the clock ---------------------------------------------------------------------------

    def _watch(self) -> None:
        tick = min(1.0, self._limits.lost / 20)
        while not self._closed.wait(tick):
            self._clock.tick()
            self._step_limit = self._limits.of_step(list(self._seconds))
            self._arm()
            verdict = self._own_verdict()
            if verdict is not None and not self._closed.is_set():
                self._end_alone(verdict)
                return

    def _own_verdict(self) -> Verdict | None:
        """Whether this rank must end by itself: it is the only one, or nobody else does it."""
        heartbeats, now, (phase, since) = self._heartbeats, self._clock.now(), self._phase
        over = now - since - self._limit(phase)
        if heartbeats is None:
            if over <= 0:
                return None
            answer = self._answer([])
            return judge({self._rank: answer.status}, {self._rank: answer}, {}, [self._rank])
        grace = self._limits.beat + 2 * self._limits.answer
        silence = max(heartbeats.silent(0), now - heartbeats.contact)
        if silence > self._lost_limit() + grace:
            return self._nobody_answers(heartbeats.statuses[0], silence)
        if over > self._lost_limit() + grace:
            own = self._status()
            reason = f"{own} hangs: {own.place}, for {own.seconds:.0f} s, and rank 0 has not ended it"
            return Verdict([own.rank], own.host, reason)
        return None

    def _nobody_answers(self, rank0: Status, silence: float) -> Verdict:
        if self._rank == 0:
            reason = f"{rank0} does not reach the store of the run for {silence:.0f} s, so it ends by itself"
        else:
            state = self._process(rank0)
            seen = "or the network to it is cut" if state is None else process_text(state)
            reason = (
                f"{rank0} does not answer: no heartbeat for {silence:.0f} s, {seen}; so rank {self._rank} ends itself"
            )
        return Verdict([0], rank0.host, reason)

    def _end_alone(self, verdict: Verdict) -> None:
        folder, (phase, since) = _folder_name(), self._phase
        lines = [self._limit_text(phase)] if self._clock.now() - since > self._limit(phase) else []
        speaks = self._decide(verdict)
        self._write(f"{HANGS}/{folder}", self._answer([]))
        if speaks:
            self._print(verdict, folder, lines)
        else:
            self._log(verdict)
        self._ending.exit()

    def _arm(self) -> None:
        """What still works if no thread of Python runs any more."""
        log = self._ending.log
        file = 2 if log is None else log.descriptor
        # The main thread prints its own stack. faulthandler's thread would read those of all threads, and crash if they
        # run after all: when this process was stopped for a while and is continued.
        faulthandler.register(signal.SIGALRM, file=file, all_threads=False)
        signal.setitimer(signal.ITIMER_REAL, 0.8 * self._limits.lost)
        if self._heartbeats is not None:  # so that this rank does not keep a job whose other ranks have ended
            faulthandler.dump_traceback_later(max(self._limits.pause, self._limits.start), exit=True, file=file)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)

    # -- the thread that talks to the other ranks ---------------------------------------------------------------------

    def _exchange(self) -> None:
        heartbeats = self._heartbeats
        assert heartbeats is not None
        while True:
            try:
                heartbeats.beat(self._status(), all_ranks=self._rank == 0 or self._roll_call.is_set())
                if self._closed.is_set():
                    return
                if self._rank != 0:  # rank 0 would take an earlier request, in its own last heartbeat, for a new one
                    self._write_stacks_once(heartbeats.statuses[0].stacks)
                if (alarm := heartbeats.alarm() or self._suspect(heartbeats)) is not None:
                    self._attend(heartbeats, alarm)
                    return
            except dist.DistError:  # no answer from the store: the other thread sees for how long
                if self._closed.is_set():
                    return
            self._roll_call.wait(self._limits.beat)
            if self._roll_call.is_set():
                time.sleep(min(0.2, self._limits.beat))

    def _suspect(self, heartbeats: Heartbeats) -> Alarm | None:
        """Raises the alarm if a rank seems to hang."""
        watched = [s for s in heartbeats.statuses.values() if self._rank == 0 or s.rank == 0]
        watched = [status for status in watched if not (status.ending or self._leaving)]
        silent = {status.rank: heartbeats.silent(status.rank) for status in watched}
        over = [s.rank for s in watched if self._rank == 0 and s.seconds > self._limit(s.phase)]
        if not over and max(silent.values(), default=0.0) <= self._lost_limit():
            return None
        silent = {rank: seconds for rank, seconds in silent.items() if seconds > 3 * self._limits.beat}
        missing = [status for status in watched if status.rank in silent]
        return heartbeats.raise_alarm(Alarm(self._rank, _folder_name(), silent, over, missing))

    def _attend(self, heartbeats: Heartbeats, alarm: Alarm) -> None:
        """Answers an alarm, judges it if it is our own, and ends the process."""
        self._alarmed = True
        answer = self._answer(alarm.missing)
        heartbeats.answer(answer)
        patience = self._limits.answer + self._limits.beat
        if alarm.by == self._rank:
            verdict, lines = self._judge(heartbeats, alarm, patience)
            if alarm.over:
                lines.append(self._limit_text(heartbeats.statuses[alarm.over[0]].phase))
            self._decide(verdict)
            self._write(f"{HANGS}/{alarm.folder}", answer)
            self._print(verdict, alarm.folder, lines)
            heartbeats.conclude(verdict)
            time.sleep(min(1.0, self._limits.beat))  # the others end first, so that none takes this end for the cause
        else:
            self._write(f"{HANGS}/{alarm.folder}", answer)
            verdict = _wait_for(heartbeats.verdict, 3 * patience) or Verdict(
                [alarm.by], heartbeats.statuses[alarm.by].host, f"rank {alarm.by} suspected a hang and then fell silent"
            )
            self._decide(verdict)
            self._log(verdict)
        self._ending.exit()

    def _judge(self, heartbeats: Heartbeats, alarm: Alarm, patience: float) -> tuple[Verdict, list[str]]:
        """The verdict, and what each rank does."""
        heartbeats.beat(self._status(), all_ranks=True)
        statuses = {rank: status for rank, status in heartbeats.statuses.items() if not status.ending}
        answers: dict[int, Answer] = {}

        def all_answers() -> bool:
            nonlocal answers
            answers = heartbeats.answers(answers)
            return answers.keys() >= statuses.keys()

        _wait_for(all_answers, patience)
        answers = {rank: answer for rank, answer in answers.items() if rank in statuses}
        return judge(statuses, answers, alarm.silent, alarm.over), rank_lines(statuses, answers)

    def _answer(self, missing: Iterable[Status]) -> Answer:
        """What this rank does, and what it sees of the processes of the missing ones."""
        recorded, steps = flight_recorder.recorded_collectives(), list(self._step_times)
        waiting = next((collective for collective in recorded if not collective.done), None)
        states = {status.rank: self._process(status) for status in missing}
        return Answer(
            status=self._status(),
            where=describe_main_thread(),
            waiting=waiting,
            members=None if waiting is None else flight_recorder.members(waiting.group),
            latest=recorded[-1] if recorded else None,
            deviation=flight_recorder.deviation(recorded, steps),
            unlikeness=flight_recorder.unlikeness(recorded, steps),
            processes={rank: process_text(state) for rank, state in states.items() if state is not None},
        )

    def _process(self, status: Status) -> str | None:
        """The state letter of the process of a rank, empty if it is gone; None: this process cannot see it."""
        if (status.host, status.namespace) != (self._ending.host, self._namespace):
            return None
        state, _ = process_state(status.pid)
        return "" if state in ("Z", "X") else state

    # -- stacks, when a user asks for them ----------------------------------------------------------------------------

    def _look(self, files: RequestFiles) -> None:
        """Looks for ``RUN/stacks``, in a thread of its own, as a disk may block it; heartbeats tell the other ranks."""
        while not self._closed.wait(LOOK_SECONDS):
            try:
                if not files.waiting() or files.take(STACKS, 1) is None:
                    continue
            except RequestError as error:
                print(f"warning    {error}", file=sys.stderr, flush=True)
                continue
            folder = f"{OUTPUT}/stacks-{_folder_name()}"
            self._write_stacks_once(folder)
            print(f"stacks     of all ranks: {self._ending.run}/{folder}", file=sys.stderr, flush=True)
            self.on_stacks(folder)

    def _write_stacks_once(self, folder: str) -> None:
        """Writes this rank's stacks, unless it has done so: in another thread, so that no disk holds up a heartbeat."""
        if folder and folder != self._stacks:
            self._stacks = folder
            threading.Thread(target=lambda: self._write(folder, self._answer([])), daemon=True).start()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _decide(self, verdict: Verdict) -> bool:
        """Returns whether this rank should speak for all, if they cannot agree on it."""
        rank = verdict.ranks[0]
        speaks = self._ending.decide(ExitCode.RETRY, "hang", verdict.reason, rank, verdict.host)
        tell_torchrun(Failure(ExitCode.RETRY, "hang", verdict.reason, rank, verdict.host, said_by=self._rank))
        return speaks

    def _write(self, folder: str, answer: Answer) -> None:
        """Writes this rank's file into a folder of the run folder."""
        if self._ending.run is None:
            return
        path = self._ending.run / folder / f"rank-{self._rank}.txt"
        try:
            write_report(path, answer, flight_recorder.recorded_collectives())
        except OSError as error:
            print(f"warning    {path} could not be written: {error.strerror or error}", file=sys.stderr)

    def _log(self, verdict: Verdict) -> None:
        if self._ending.log is not None:
            self._ending.log.write(f"rank {self._rank} ends because of a hang: {verdict.reason}\n")

    def _print(self, verdict: Verdict, folder: str, lines: list[str]) -> None:
        where = "" if self._ending.run is None else f"stacks: {self._ending.run / HANGS / folder}; "
        advice = "exit code 76 (try again: the same command resumes)"
        self._ending.error("\n  ".join([f"error: {verdict.reason}", *lines, where + advice]))


def start_watchdog(config: ParallelConfig, environment: Environment, ending: Ending) -> Watchdog:
    """The watchdog of a run. All ranks call it together, after ``start_distributed``."""
    # The ranks build their trainers in the same order, so a number means the same watchdog on all of them.
    prefix, limits = f"watchdog/{next(_numbers)}", Limits.from_config(config, environment.world_size)
    rendezvous = current_rendezvous()
    watchdog = Watchdog(
        environment.rank,
        rendezvous.hosts,
        limits,
        ending,
        open_store=lambda: dist.PrefixStore(prefix, rendezvous.new_store_client(limits.lost / 2)),
        set_timeouts=set_timeouts,
    )
    ending.lost_ranks, ending.deviation = watchdog.lost_ranks, watchdog.deviation
    return watchdog


def _folder_name() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")


def _wait_for(call: Callable[[], T], seconds: float) -> T:
    """What ``call`` returns as soon as it is true; after ``seconds``, what it returns then."""
    deadline = time.monotonic() + seconds
    while not (result := call()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result
