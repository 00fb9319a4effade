"""Defects of one data file, and whether a reader detects them."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcscale.bench.data import elastic, probe
from dcscale.bench.data.corpus import Corpus
from dcscale.bench.data.probe import written
from dcscale.bench.data.reader import Settings

KINDS = ("dcscale", "webdataset", "torchdata", "mosaic", "mosaic-hashed", "litdata", "flat")
_METADATA_FILES = ("manifest.json", "index.json")
_MAGIC_OFFSET = 257
"""Offset of the magic number in a tar header."""


class DoesNotApplyError(Exception):
    """The format cannot have this defect."""


@dataclass(frozen=True)
class Target:
    """The file that gets a defect, and where."""

    file: Path
    row: bytes
    """Some tokens in the middle of the data."""

    rows: list[bytes]
    """All rows of the data."""

    other: Path | None
    """Another file of the same type, or None."""

    @property
    def is_tar(self) -> bool:
        """Whether the file is a tar."""
        return self.file.suffix == ".tar"

    def read(self) -> tuple[bytearray, int]:
        """(the file's bytes, the offset of ``row`` in them)."""
        data = bytearray(self.file.read_bytes())
        return data, data.find(self.row)


def bit_flip(target: Target) -> None:
    """Flip one bit of a token."""
    data, at = target.read()
    data[at] ^= 1
    target.file.write_bytes(data)


def cut_between(target: Target) -> None:
    """Truncate the file at the end of a tar member, or of a row."""
    data, at = target.read()
    target.file.write_bytes(data[: _header_offset(data, at) if target.is_tar else _row_offset(target, data, at)])


def cut_within(target: Target) -> None:
    """Truncate the file inside a sample's tokens."""
    data, at = target.read()
    target.file.write_bytes(data[:at])


def missing(target: Target) -> None:
    """Delete the file."""
    target.file.unlink()


def swapped(target: Target) -> None:
    """Replace the file by a copy of another one."""
    if target.other is None:
        raise DoesNotApplyError("there is only one file")
    shutil.copyfile(target.other, target.file)


def zeroed_header(target: Target) -> None:
    """Zero the header of a tar member, or everything before the first row."""
    data, at = target.read()
    start, stop = 0, min(found for row in target.rows if (found := data.find(row)) >= 0) if not target.is_tar else 0
    if target.is_tar:
        start = _header_offset(data, at)
        stop = start + tarfile.BLOCKSIZE
    # A file that starts with its first row, like the flat one, has no header.
    if stop == 0:
        raise DoesNotApplyError("it has no header")
    data[start:stop] = bytes(stop - start)
    target.file.write_bytes(data)


DEFECTS: Mapping[str, Callable[[Target], None]] = {
    "bit flip": bit_flip,
    "cut between samples": cut_between,
    "cut within a sample": cut_within,
    "missing": missing,
    "swapped": swapped,
    "zeroed header": zeroed_header,
}


def check(
    kind: str, say: Callable[[str], None], defects: Iterable[str] = tuple(DEFECTS), timeout: float = 60
) -> list[dict[str, Any]]:
    """Read an epoch with each defect in the middle shard, on one rank without workers; returns a row for each."""
    corpus, rows = elastic.corpus(), []
    with tempfile.TemporaryDirectory() as temporary:
        intact = written(kind, corpus, Path(temporary, "intact"))
        try:
            expected, _ = read(kind, intact, timeout)
        except probe.ProbeError as error:
            return [{"kind": kind, "defect": defect, "outcome": "not run", "error": str(error)} for defect in defects]
        # Each defect gets its own copy of the intact data.
        for defect in defects:
            row = {"kind": kind, "defect": defect}
            corrupt = Path(temporary, defect.replace(" ", "-"))
            shutil.copytree(intact, corrupt)
            try:
                inject(defect, corrupt, corpus)
                found, logged = read(kind, corrupt, timeout)
            except DoesNotApplyError as error:
                row |= {"outcome": "does not apply", "error": str(error)}
            except probe.ProbeError as error:
                row |= {"outcome": "found", "error": str(error)}
            else:
                row |= {"error": logged, **compare(expected, found, logged)}
            rows.append(row)
            say(f"  {kind}, {defect}: {row['outcome']}")
    return rows


def compare(expected: Counter, found: Counter, logged: str | None = None) -> dict[str, Any]:
    """Compare the rows of an epoch without an exception with the expected ones.

    The outcome is "no harm"; "silent": rows are missing or wrong; or "logged only": the same, but an error was printed,
    for example by a thread, which the training loop does not notice.
    """
    fewer, other = expected.total() - found.total(), (found - expected).total()
    outcome = "no harm" if found == expected else "logged only" if logged else "silent"
    return {"outcome": outcome, "rows": expected.total(), "fewer": fewer, "other": other}


def inject(defect: str, folder: Path, corpus: Corpus) -> None:
    """Apply a defect to the file with the middle of the data, at that position."""
    middle = corpus.rows(len(corpus.ends) // 2)[elastic.ROWS // 2]
    # Without the ends of the row: in formats with one document per member they may be in other members.
    row = middle[len(middle) // 4 : len(middle) // 2].tobytes()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _METADATA_FILES)
    # A defect must hit exactly one file, so the row must be unique.
    holders = [path for path in files if path.read_bytes().find(row) >= 0]
    if len(holders) != 1:
        raise RuntimeError(f"{folder}: {len(holders)} files contain the row for the defect, expected 1")
    others = [path for path in files if path != holders[0] and path.suffix == holders[0].suffix]
    rows = [each.tobytes() for shard in range(len(corpus.ends)) for each in corpus.rows(shard)]
    DEFECTS[defect](Target(holders[0], row, rows, others[0] if others else None))


def read(kind: str, folder: Path, timeout: float) -> tuple[Counter, str | None]:
    """The rows of an epoch, and the last error that was printed but not raised.

    Without shuffling, if the reader supports it. A reader that packs yields different rows after a defect.
    """
    settings = Settings(str(folder), elastic.LENGTH, elastic.GLOBAL_BATCH, slots=12, shuffle=False)
    result = probe.run("rows", kind, settings, timeout=timeout)
    return sum(elastic.join([result["rows"]]), Counter()), result["logged"]


def _row_offset(target: Target, data: bytearray, at: int) -> int:
    """Offset of the complete row that contains ``target.row``."""
    return next(data.find(row) for row in target.rows if target.row in row)


def _header_offset(data: bytearray, at: int) -> int:
    """Offset of the header of the tar member that contains byte ``at``."""
    return data.rfind(b"ustar", 0, at) - _MAGIC_OFFSET
