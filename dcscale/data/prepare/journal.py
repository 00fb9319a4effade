"""The state of a build on disk, so that an interrupted build resumes and a complete one is published atomically.

    .OUTPUT.building/
        lease.json        of the process that builds OUTPUT, see dcscale.lease
        IDENTITY/         one build, named by the hash of everything that decides its result
            identity.json
            journal       one line for each spooled chunk and each written shard; nothing else counts as done
            spool/        see dcscale.data.prepare.shuffle
            result/       becomes OUTPUT
        replaced/         the previous OUTPUT, between two renames

A build whose arguments or inputs differ from those of an interrupted build uses a folder of its own and does not touch
the other one. Whichever is complete first becomes OUTPUT, and then all state is removed.

Resuming the first pass reads the inputs from the start, but does not tokenize again what the journal lists as done.

The process may be killed at any moment. For a crash of the machine, shards are fsynced before their line is written;
spool files are not, but they are verified when they are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.prepare.shuffle import SpooledChunk, WrittenShard
from dcscale.data.shards.manifest import ShardInfo
from dcscale.files import parse_json, publish_folder, read_json, write_json
from dcscale.lease import Lease, LeaseHeldError, LeaseLostError, LeaseTimes


def state_folder(output: Path) -> Path:
    """Folder of the state of building ``output``."""
    return output.with_name(f".{output.name}.building")


@contextlib.contextmanager
def _lease_errors() -> Iterator[None]:
    """Turns errors of the lease into a DataError."""
    try:
        yield
    except (LeaseHeldError, LeaseLostError) as error:
        raise DataError(str(error)) from error


class Journal:
    """The state of the build of ``output``; a context manager that keeps out other processes.

    On exit, state without any entry is removed; other state stays until :meth:`publish`.

    Args:
        output: folder to create.
        identity: everything that decides the result, as JSON values.
        times: of the lease; None: the usual ones.

    Raises:
        DataError: on entering, if another process builds ``output``; later, if another process has taken over the
            build, since this one was suspended.
    """

    def __init__(self, output: Path, identity: dict[str, Any], times: LeaseTimes | None = None) -> None:
        self._output, self._identity = output, identity
        self._root = state_folder(output)
        self._lease = Lease(
            self._root,
            "wait until it has built this output, or give another output",
            print_line=lambda line: print(line, file=sys.stderr),
            remove_folder=True,
            times=times or LeaseTimes(),
        )
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = self._root / digest[:16]
        self.spool, self.result = self.folder / "spool", self.folder / "result"
        self._replaced = self._root / "replaced"
        self.chunks: dict[int, SpooledChunk] = {}
        """The spooled chunks by number."""
        self.all_spooled = False
        """Whether ``chunks`` has all chunks of the inputs."""
        self.shards: dict[str, dict[str, WrittenShard]] = defaultdict(dict)
        """Split -> name -> written shard, in the order of the plan."""
        self.complete = False
        """Whether ``result`` is complete."""

    def __enter__(self) -> Journal:
        with _lease_errors():
            self._lease.acquire()
        try:
            return self._resume()
        except BaseException:
            self._lease.release()
            raise

    def _resume(self) -> Journal:
        if self._replaced.exists() and not self._output.exists():  # killed between the two renames of publish
            self._replaced.rename(self._output)
        shutil.rmtree(self._replaced, ignore_errors=True)
        entries, valid_bytes = self._read()
        if ["complete", None] in entries and not self.result.exists():  # killed after publish, before the cleanup
            shutil.rmtree(self.folder)
            entries, valid_bytes = [], 0
        self.spool.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "identity.json", self._identity)
        self._file = (self.folder / "journal").open("ab")
        self._file.truncate(valid_bytes)
        for kind, value in entries:
            self._apply(kind, value)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        try:
            self._lease.check()
            if not self.started:
                shutil.rmtree(self.folder, ignore_errors=True)
        except LeaseLostError:
            pass  # now the state is that of another process
        finally:
            self._lease.release()

    @property
    def started(self) -> bool:
        """Whether anything is done."""
        return bool(self.chunks or self.all_spooled)

    def add_chunk(self, chunk: SpooledChunk) -> None:
        """Record a chunk that is spooled."""
        self._append("chunk", chunk)

    def add_shard(self, split: str, shard: WrittenShard) -> None:
        """Record a shard that is on disk."""
        self._append("shard", [split, asdict(shard.info), *shard[1:]])

    def mark_all_spooled(self) -> None:
        """Record that ``chunks`` has all chunks of the inputs."""
        self._append("spooled")

    def mark_complete(self) -> None:
        """Record that ``result`` is complete."""
        self._append("complete")

    def other_builds(self) -> list[str]:
        """Other interrupted builds of the same output: folder, and how their identity differs from this one's."""
        found = []
        for path in sorted(self._root.glob("*/identity.json")):
            if path.parent != self.folder:
                try:
                    other = read_json(path)
                except ValueError as error:  # after a crash of the machine
                    found.append(str(error))
                    continue
                names = sorted(other.keys() | self._identity.keys())
                pairs = [(name, other.get(name), self._identity.get(name)) for name in names]
                differences = [f"{name} {then!r} (now {now!r})" for name, then, now in pairs if then != now]
                found.append(f"{path.parent}: {', '.join(differences)}")
        return found

    def publish(self) -> None:
        """Make the result the output, replacing an earlier one, and remove all state."""
        with _lease_errors():
            self._lease.check()
        publish_folder(self.result, self._output, self._replaced)
        for folder in self._root.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def _read(self) -> tuple[list[Any], int]:
        """(complete entries of the journal on disk, their bytes)"""
        path, entries, valid_bytes = self.folder / "journal", [], 0
        content = path.read_bytes() if path.exists() else b""
        # Without an incomplete last line, which a killed process may leave.
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            try:
                entries.append(parse_json(line, path))
            except ValueError:  # after a crash of the machine
                break
            valid_bytes += len(line) + 1
        return entries, valid_bytes

    def _append(self, kind: str, value: Any = None) -> None:
        with _lease_errors():
            self._lease.raise_if_lost()
        self._file.write(json.dumps([kind, value]).encode() + b"\n")
        self._file.flush()
        self._apply(kind, value)

    def _apply(self, kind: str, value: Any) -> None:
        """Update the attributes by one entry."""
        if kind == "chunk":
            chunk = SpooledChunk(*value)
            self.chunks[chunk.number] = chunk
        elif kind == "shard":
            split, info, *rest = value
            self.shards[split][info["name"]] = WrittenShard(ShardInfo(**info), *rest)
        elif kind == "spooled":
            self.all_spooled = True
        else:
            self.complete = True
