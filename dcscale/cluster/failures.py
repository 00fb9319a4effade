"""From an error to an exit code and one message: the rank that failed first says what happened, the others one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

import dcscale
from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import step_of
from dcscale.cluster.ending import Ending, ExitCode
from dcscale.config import ConfigError
from dcscale.data import DataError
from dcscale.files import may_succeed_later, parse_json
from dcscale.lease import LeaseHeldError, LeaseLostError
from dcscale.parallel import LaunchError, RankError
from dcscale.parallel.agreement import DisagreementError
from dcscale.parallel.rendezvous import ArrivalError, StartError, current_rendezvous, new_store_client

ROOT = Path(dcscale.__file__).parents[1]
FIRST_FAILURE = "dcscale/first_failure"
"""Key of the run's store."""

_UNFIT = (ConfigError, LaunchError, DisagreementError, DataError, CheckpointError, RankError)
_RETRY = (LeaseHeldError, ArrivalError)
_LOST_PEER = re.compile(r"gloo|[Cc]onnection (closed|reset) by peer|[Ss]ocket (closed|timed? ?out)|Broken pipe")
_ADVICE = {
    ExitCode.FAILED: "an error of the program",
    ExitCode.UNFIT: "the same command would fail again",
    ExitCode.DIVERGED: "training diverged",
    ExitCode.RESUME: "the same command resumes",
    ExitCode.RETRY: "try again: the same command resumes",
}


def exit_code(error: BaseException, refusals: tuple[type[Exception], ...] = ()) -> ExitCode:
    """The exit code for an error that ends a run.

    What it was raised from counts too: a checkpoint may not have been written because the disk is full.

    Args:
        error: the error.
        refusals: further types that say that settings, data or checkpoint do not fit.
    """
    if isinstance(error, LeaseLostError):
        return ExitCode.UNFIT
    if isinstance(error, _RETRY) or may_succeed_later(error) or any(map(is_lost_peer, _causes(error))):
        return ExitCode.RETRY
    if isinstance(error, FloatingPointError):
        return ExitCode.DIVERGED
    return ExitCode.UNFIT if isinstance(error, (*_UNFIT, *refusals)) else ExitCode.FAILED


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error of a collective says that another rank, or the way to it, was lost."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises nothing more special. Its "enforce fail" is about arguments that differ between ranks.
    text = str(error)
    return type(error) is RuntimeError and _LOST_PEER.search(text) is not None and "enforce fail" not in text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


@dataclass(frozen=True)
class Failure:
    """What ended a run, as the rank that met it first says it to the others."""

    code: int
    reason: str
    """Type of the error."""

    error: str
    """Text of the error."""

    rank: int | None
    """The rank that is the cause; None: unknown."""

    host: str | None
    said_by: int | None = None
    """The rank that says so; None: unknown."""

    place: str = ""
    """Where our code raised it: file, line and function."""

    log: str | None = None
    """Log file of the rank that says so."""

    @property
    def cause(self) -> str:
        """The rank that is the cause, for messages."""
        return "another rank" if self.rank is None else f"rank {self.rank} ({self.host})"


class Failures:
    """Context manager: an error in its body ends the process, with one message on the terminal for all ranks.

    Args:
        ending: ends the process.
        refusals: see :func:`exit_code`.
        open_store: makes a client of the run's store; raises RuntimeError if that does not answer for so many seconds.
        hosts: the host of each rank.
        words_seconds: how long a rank that only knows that another failed waits for its words.
        yield_seconds: how long ranks let rank 0 speak first, as one for all if an error is raised on all of them.
        hear_seconds: how long rank 0 then keeps the store for those that have not heard it yet.
    """

    def __init__(
        self,
        ending: Ending,
        refusals: tuple[type[Exception], ...] = (),
        *,
        open_store: Callable[[float], dist.Store] = new_store_client,
        hosts: Callable[[], Sequence[str]] = lambda: current_rendezvous().hosts,
        words_seconds: float = 5.0,
        yield_seconds: float = 0.3,
        hear_seconds: float = 1.0,
    ) -> None:
        self._ending, self._refusals, self._open_store, self._hosts = ending, refusals, open_store, hosts
        self._words_seconds, self._yield_seconds, self._hear_seconds = words_seconds, yield_seconds, hear_seconds

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.end(error)

    def end(self, error: BaseException) -> None:
        """Says what happened and ends the process."""
        ending = self._ending
        own = self._failure(error)
        ending.signals.ignore()  # srun sends SIGTERM as soon as another rank has ended, which is no reason of its own
        first, agreed = self._first(own, error)
        if first.reason == LeaseLostError.__name__:
            ending.abandon()
        rank = -1 if first.rank is None else first.rank
        may_speak = ending.decide(ExitCode(first.code), first.reason, first.error, rank, first.host)
        trace = "".join(traceback.format_exception(error))
        speaks = first.said_by == own.said_by and (agreed or may_speak)
        if speaks:
            ending.error(_message(first))
        elif ending.log is not None or own.said_by == 0:
            text = first.error.splitlines()[0]
            because = "" if first.rank is None else f" because of {first.cause}"
            print(f"rank {ending.rank} ({ending.host}) ends{because}: {text}", file=sys.stderr)
        if speaks and first.code == ExitCode.FAILED:
            ending.error(trace)
        elif ending.log is not None:
            ending.log.write(trace)
        tell_torchrun(first)
        ending.exit()

    def _failure(self, error: BaseException) -> Failure:
        """What this rank knows."""
        ending, code = self._ending, exit_code(error, self._refusals)
        step, checkpoint = ending.progress()
        if is_lost_peer(error) and ending.signals.received and (not step or _is_of_step(checkpoint, step)):
            code = ExitCode.RESUME  # the other one stopped more quickly, and no step is lost
        rank, host = self._cause(error)
        return Failure(
            code=code,
            reason=type(error).__name__,
            error=str(error) or type(error).__name__,
            rank=rank,
            host=host,
            said_by=ending.rank,
            place=_place(error),
            log=None if ending.log is None else str(ending.log.path),
        )

    def _cause(self, error: BaseException) -> tuple[int | None, str | None]:
        """The rank that is the cause, and its host. An error that all ranks raise together may name one of them."""
        named = [cause.rank for cause in _causes(error) if getattr(cause, "rank", None) is not None]
        if not named or named[0] == self._ending.rank:
            return self._ending.rank, self._ending.host
        return (None, None) if named[0] < 0 else (named[0], self._hosts()[named[0]])

    def _first(self, own: Failure, error: BaseException) -> tuple[Failure, bool]:
        """What the rank says that failed first, and whether all ranks know that it does.

        They tell each other through the run's store, or by ``ending.json`` if the store is gone.
        """
        if self._ending.world_size == 1:  # or not known yet
            return own, False
        if isinstance(error, StartError):  # the ranks may not have met, or rank 0 has left already
            if error.from_rank0:
                return replace(own, rank=0, host=None, said_by=0), True
            return own, self._ending.rank <= 1  # rank 1 speaks if it is rank 0 that is missing
        lost_peer = any(map(is_lost_peer, _causes(error)))
        yields = self._ending.rank != 0 or lost_peer
        if lost_peer and (deviation := self._ending.deviation()) is not None:
            # gloo aborts a rank that receives another size than it expects, which need not be the one that is wrong.
            text = f"rank {own.rank} ({own.host}) {deviation}, so the collectives do not match: "
            text += _without_guess(own.error)
            own, lost_peer = replace(own, reason="collectives do not match", error=text), False
            yields = False
        patience = self._words_seconds if isinstance(error, RankError) else self._yield_seconds * yields
        began = time.monotonic()
        try:
            store = self._open_store(self._words_seconds)
            if not _is_said(store, patience) and lost_peer:  # it said nothing before it went
                # One rank finds out which it is, since that takes the heartbeats of all. The others wait for its words.
                name = str(self._ending.rank)
                namer = store.compare_set(f"{FIRST_FAILURE}/namer", "", name).decode()
                if namer == name or not _is_said(store, 2 * self._words_seconds):
                    own = self._name_lost(own)
            said = store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(own)))
            self._let_others_hear(store)
            return Failure(**parse_json(said, FIRST_FAILURE)), True
        except RuntimeError:  # the store has gone with its process: mostly rank 0
            own = self._name_lost(own) if lost_peer else own
            while lost_peer and time.monotonic() < began + self._words_seconds:
                if (ended := self._ending.read()) is not None:
                    text = ended["error"] or ended["reason"]
                    return Failure(ended["code"], ended["reason"], text, ended["rank"], ended["host"]), True
                time.sleep(0.05)
            return own, False

    def _let_others_hear(self, store: dist.Store) -> None:
        """Rank 0 waits a moment for the others, as the store ends with it: they would each speak for themselves."""
        key, deadline = f"{FIRST_FAILURE}/heard", time.monotonic() + self._hear_seconds
        heard = store.add(key, 1)
        while self._ending.rank == 0 and heard < self._ending.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            heard = store.add(key, 0)

    def _name_lost(self, own: Failure) -> Failure:
        """The failure of a rank that only lost another, with that one's name if it is known."""
        lost = self._ending.lost_ranks(self._words_seconds / 2)
        names = ", ".join(f"rank {rank} ({host})" for rank, host in sorted(lost.items())) or "another rank"
        rank = min(lost, default=None)
        text = f"lost {names}: {_without_guess(own.error)}"
        return replace(own, reason="lost rank", rank=rank, host=lost.get(rank), error=text)


def _is_said(store: dist.Store, seconds: float) -> bool:
    """Whether a rank says within so many seconds what happened."""
    deadline = time.monotonic() + seconds
    while not store.check([FIRST_FAILURE]):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _without_guess(error: str) -> str:
    """The text of an error of gloo, without where in its sources and what it guesses."""
    return re.sub(r"^\[\S+\] |\. This is typically.*", "", error, flags=re.DOTALL)


def _is_of_step(checkpoint: Path | None, step: int) -> bool:
    return checkpoint is not None and step_of(checkpoint) == step


def _place(error: BaseException) -> str:
    """Where our code raised an error, as ``FILE:LINE in FUNCTION``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "dcscale") or path.is_relative_to(ROOT / "launch"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} in {frame.name}"
    return ""


def _message(failure: Failure) -> str:
    """The message of a failure for the terminal: its text first, then who, where, and what to do."""
    code = ExitCode(failure.code)
    if code is ExitCode.UNFIT and failure.rank == 0:
        return f"error: {failure.error}"  # these are written for users
    kind = f"{failure.reason}: " if code is ExitCode.FAILED else ""
    where = f" at {failure.place}" if failure.place else ""
    if failure.rank == failure.said_by:
        details = [failure.cause, f"{failure.reason}{where}"]
    else:
        details = [f"noticed by rank {failure.said_by}{where}"]
        if failure.rank is not None and failure.cause not in failure.error:
            details.insert(0, f"on {failure.cause}")
    details += [f"log {failure.log}"] if failure.log else []
    return f"error: {kind}{failure.error}\n  {'; '.join(details)}; exit code {int(code)} ({_ADVICE[code]})"


def tell_torchrun(failure: Failure) -> None:
    """Gives torchrun the message for its own summary, see ``torch.distributed.elastic.multiprocessing.errors``."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = _message(failure)
        content = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # torchrun then prints its own
            Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")
