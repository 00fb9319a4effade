"""The state of a build on disk: an interrupted build goes on where it stopped, and a finished one appears at once.

    .OUTPUT.building/
        lock              held by the process that builds OUTPUT
        IDENTITY/         one build, by the hash of all that decides its result
            identity.json
            journal       a line for each chunk that was spooled and each shard that was written; nothing else counts
            spool/        see dcscale.data.prepare.shuffle
            result/       becomes OUTPUT
        replaced/         the OUTPUT that was there before, between two renames

A build with other arguments or inputs than the interrupted one starts in a folder of its own and leaves that one alone;
whichever is complete first becomes OUTPUT, and all state is removed.

Going on reads the text that was done already once more, if it was not all of it, but does not tokenise it.

A process may be killed at any moment. As to a crash of the machine, shards are made durable before their line is
written; spool files are not, but are checked when they are used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.prepare.shuffle import SpooledChunk, WrittenShard
from dcscale.data.shards.manifest import ShardInfo
from dcscale.files import sync_folder, write_json


def state_folder(output: Path) -> Path:
    """Where the state of building ``output`` lies."""
    return output.with_name(f".{output.name}.building")


class Journal:
    """The state of the build of ``output``; a context manager that keeps other processes out.

    State in which nothing is noted is removed on leaving; other state stays until :meth:`publish`.

    Args:
        output: folder that is to be made.
        identity: all that decides the result, as JSON values.

    Raises:
        DataError: another process builds ``output``.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self._output, self._identity = output, identity
        self._root = state_folder(output)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = self._root / digest[:16]
        self.spool, self.result = self.folder / "spool", self.folder / "result"
        self._replaced = self._root / "replaced"
        self.chunks: dict[int, SpooledChunk] = {}
        """The chunks that are complete, by number."""
        self.all_spooled = False
        """Whether these are all chunks."""
        self.shards: dict[str, dict[str, WrittenShard]] = defaultdict(dict)
        """Part -> name -> shard that is complete, in the order in which they were planned."""
        self.complete = False
        """Whether ``result`` is all that ``output`` is to be."""

    def __enter__(self) -> Journal:
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._root / "lock", "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(
                f"{self._root / 'lock'}: cannot be locked ({error.strerror}): another process is making this output, "
                f"or the file system has no locks; wait for it, or give another output"
            ) from error
        if self._replaced.exists() and not self._output.exists():
            self._replaced.rename(self._output)
        shutil.rmtree(self._replaced, ignore_errors=True)
        notes, whole = self._read_journal()
        if ["complete", None] in notes and not self.result.exists():  # published, and killed before the state was gone
            shutil.rmtree(self.folder)
            notes, whole = [], 0
        self.spool.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "identity.json", self._identity)
        self._journal = open(self.folder / "journal", "ab")
        self._journal.truncate(whole)
        for kind, value in notes:
            self._take(kind, value)
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()
        if not self.started:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not any(child.is_dir() for child in self._root.iterdir()):
            shutil.rmtree(self._root)
        self._lock.close()

    @property
    def started(self) -> bool:
        """Whether anything was done."""
        return bool(self.chunks or self.all_spooled)

    def add_chunk(self, chunk: SpooledChunk) -> None:
        self._note("chunk", chunk)

    def add_shard(self, part: str, shard: WrittenShard) -> None:
        self._note("shard", [part, asdict(shard.info), *shard[1:]])

    def end_spooling(self) -> None:
        self._note("spooled")

    def end(self) -> None:
        self._note("complete")

    def differences_of_others(self) -> list[str]:
        """What sets other builds of the same output, which were interrupted too, apart from this one."""
        found = []
        for path in sorted(self._root.glob("*/identity.json")):
            if path.parent != self.folder:
                other = json.loads(path.read_bytes())
                names = sorted(other.keys() | self._identity.keys())
                pairs = [(name, other.get(name), self._identity.get(name)) for name in names]
                differences = [f"{name} {then!r} (now {now!r})" for name, then, now in pairs if then != now]
                found.append(f"{path.parent}: {', '.join(differences)}")
        return found

    def publish(self) -> None:
        """Put the result in its place, and remove all state; an earlier result is put aside first, or back."""
        if self._output.exists():
            self._output.rename(self._replaced)
        try:
            self.result.rename(self._output)
        except OSError:
            if self._replaced.exists():
                self._replaced.rename(self._output)
            raise
        sync_folder(self._output.parent)
        for folder in self._root.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def _read_journal(self) -> tuple[list[Any], int]:
        """(the lines that were written wholly, their bytes)"""
        path, notes, whole = self.folder / "journal", [], 0
        content = path.read_bytes() if path.exists() else b""
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            try:
                notes.append(json.loads(line))
            except ValueError:  # after a crash of the machine
                break
            whole += len(line) + 1
        return notes, whole

    def _note(self, kind: str, value: Any = None) -> None:
        self._journal.write(json.dumps([kind, value]).encode() + b"\n")
        self._journal.flush()
        self._take(kind, value)

    def _take(self, kind: str, value: Any) -> None:
        if kind == "chunk":
            chunk = SpooledChunk(*value)
            self.chunks[chunk.number] = chunk
        elif kind == "shard":
            part, info, *rest = value
            self.shards[part][info["name"]] = WrittenShard(ShardInfo(**info), *rest)
        elif kind == "spooled":
            self.all_spooled = True
        else:
            self.complete = True
