"""What a user asks of a running job: a file that appears in the run folder, such as by ``touch RUN/profile``.

The file may be empty, or hold settings: ``steps=5 ranks=0,3 stacks``. It is removed when it is taken.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcscale.config.schema.observe import MOST_PROFILED_STEPS
from dcscale.files import write_atomically

PROFILE, MEMORY, STACKS = "profile", "memory", "stacks"
"""Names of the files, and what is asked for by them."""

OUTPUT = "profiles"
"""Folder in the run folder for all that was asked for."""

SETTINGS = {PROFILE: ("steps", "ranks", "memory", "shapes", "stacks"), MEMORY: ("ranks",), STACKS: ()}
"""What each file may hold, besides nothing."""

_FORMS = {"steps": f"steps=1 to {MOST_PROFILED_STEPS}", "ranks": "ranks=0,3 or 0-7 or all"}
_MOST_BYTES = 4096


class RequestError(ValueError):
    """A request cannot be followed; says why, and what to write instead."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    kind: str
    """:data:`PROFILE` or :data:`MEMORY` or :data:`STACKS`."""

    steps: int = 3
    """Optimizer steps in the trace, of a profile."""

    ranks: frozenset[int] | None = field(default_factory=lambda: frozenset([0]))
    """The ranks that look; None: all."""

    options: frozenset[str] = frozenset()
    """Of ``memory``, ``shapes`` and ``stacks``, which a trace contains besides times."""

    @property
    def text(self) -> str:
        """What :func:`parse_request` understands as this request."""
        ranks = "all" if self.ranks is None else ",".join(map(str, sorted(self.ranks)))
        values = {"steps": f"steps={self.steps}", "ranks": f"ranks={ranks}"}
        names = [name for name in SETTINGS[self.kind] if name in values or name in self.options]
        return " ".join(values.get(name, name) for name in names)

    def of_rank(self, rank: int) -> bool:
        """Whether this rank looks."""
        return self.ranks is None or rank in self.ranks


def parse_request(kind: str, text: str, world_size: int) -> Request:
    """The request in a file that anybody may have written.

    Raises:
        RequestError: it holds anything else than settings of this kind of request, each at most once.
    """
    values: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in SETTINGS[kind] or bool(equals) != (name in _FORMS):
            raise RequestError(f"{_shown(word)} is not a setting: {_advice(kind)}")
        if name in values:
            raise RequestError(f"{name} is given twice: {_advice(kind)}")
        values[name] = value
    ranks = Request(kind).ranks
    if "ranks" in values:
        ranks = _ranks(kind, values["ranks"], world_size)
    steps = Request.steps
    if "steps" in values:
        if not re.fullmatch("[0-9]{1,9}", values["steps"]) or not 1 <= int(values["steps"]) <= MOST_PROFILED_STEPS:
            raise RequestError(f"steps={_shown(values['steps'])} is not possible: {_advice(kind)}")
        steps = int(values["steps"])
    return Request(kind, steps, ranks, frozenset(name for name in values if name not in _FORMS))


def _ranks(kind: str, text: str, world_size: int) -> frozenset[int] | None:
    if text == "all":
        return None
    ranks: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if ends is None:
            raise RequestError(f"ranks={_shown(text)} is not possible: {_advice(kind)}")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < world_size:
            raise RequestError(f"ranks={_shown(text)}: the ranks of this run are 0 to {world_size - 1}")
        ranks.update(range(first, last + 1))
    return frozenset(ranks)


def _advice(kind: str) -> str:
    names = [_FORMS.get(name, name) for name in SETTINGS[kind]]
    return f"leave the file empty, or write any of: {'; '.join(names)}" if names else "leave the file empty"


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")


class RequestFiles:
    """Looks for request files, and takes them. For one thread of one rank: the others are told.

    Args:
        run: the run folder.
        kinds: which files.
        seconds: between two looks; longer where a look takes long, so that it costs at most a thousandth of the time.
        clock: seconds.
    """

    def __init__(
        self,
        run: Path,
        kinds: Sequence[str] = (PROFILE, MEMORY),
        seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run, self._kinds, self._seconds, self._clock = run, kinds, seconds, clock
        self._next = clock()
        self._refused: dict[str, tuple[int, int]] = {}
        """Inode and time of change of each file that could not be removed, so that it is reported once."""

    def found(self) -> bool:
        """Whether there is a request, as far as this look is due."""
        began = self._clock()
        if began < self._next:
            return False
        waiting = self.waiting()
        ended = self._clock()
        self._next = ended + max(self._seconds, 1000 * (ended - began))
        return bool(waiting)

    def waiting(self) -> list[str]:
        """The requests that are there now."""
        return [kind for kind in self._kinds if (seen := self._identity(kind)) and seen != self._refused.get(kind)]

    def _identity(self, kind: str) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._run / kind)
        except OSError:  # none; a disk that fails is reported by all that is written to it
            return None
        return status.st_ino, status.st_mtime_ns

    def take(self, kind: str, world_size: int) -> Request | None:
        """Removes the request and returns it; None if there is none any more.

        Raises:
            RequestError: the file is not one, cannot be removed, or holds what is no request.
        """
        path = self._run / kind
        identity = self._identity(kind)
        if identity is None:
            return None
        try:
            text = self._pop(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._refused[kind] = identity
            raise RequestError(f"{path} cannot be taken: {error.strerror or error}; remove it") from error
        try:
            return parse_request(kind, text.decode(), world_size)
        except UnicodeDecodeError:
            raise RequestError(f"{path} is not text: {_advice(kind)}") from None
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None

    def put_back(self, request: Request) -> None:
        """Writes a request again, for a later look, unless there is a new one.

        Raises:
            OSError: it cannot be written.
        """
        path = self._run / request.kind
        if not os.path.lexists(path):
            write_atomically(path, request.text)

    def _pop(self, path: Path) -> bytes:
        """Content of a file, which is renamed first, so that it is taken once, and removed."""
        if not stat.S_ISREG(os.lstat(path).st_mode):  # of a pipe, reading might never end
            raise OSError("it is not a regular file")
        taken = path.with_name(f".{path.name}-taken")
        os.replace(path, taken)
        try:
            with open(os.open(taken, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                content = file.read(_MOST_BYTES + 1) or b""
                if not content:  # whoever writes settings, such as a shell, first makes an empty file
                    time.sleep(0.1)
                    content = file.read(_MOST_BYTES + 1) or b""
        finally:
            os.unlink(taken)
        if len(content) > _MOST_BYTES:
            raise OSError(f"it is larger than {_MOST_BYTES} bytes")
        return content
