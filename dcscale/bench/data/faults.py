"""Defects of one shard file, and whether a reader notices them."""

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
_NO_SHARDS = ("manifest.json", "index.json")
_MAGIC = 257
"""Where a tar's header says what it is."""


class DoesNotApplyError(Exception):
    """A defect that the format cannot have."""


@dataclass(frozen=True)
class Place:
    """What is to be damaged."""

    file: Path
    row: bytes
    """Tokens in the file's middle."""

    rows: list[bytes]
    """All tokens, row by row."""

    other: Path | None
    """Another file of the same kind."""

    @property
    def is_tar(self) -> bool:
        return self.file.suffix == ".tar"

    def read(self) -> tuple[bytearray, int]:
        """(the file's bytes, where in them the tokens lie)."""
        data = bytearray(self.file.read_bytes())
        return data, data.find(self.row)


def bit_flip(place: Place) -> None:
    """One bit of a token."""
    data, at = place.read()
    data[at] ^= 1
    place.file.write_bytes(data)


def cut_between(place: Place) -> None:
    """The file ends where a member, or else a row, ended."""
    data, at = place.read()
    place.file.write_bytes(data[: _header(data, at) if place.is_tar else _begin_of_row(place, data, at)])


def cut_within(place: Place) -> None:
    """The file ends inside a sample's tokens."""
    data, at = place.read()
    place.file.write_bytes(data[:at])


def missing(place: Place) -> None:
    """The file is gone."""
    place.file.unlink()


def swapped(place: Place) -> None:
    """The file holds what another one should."""
    if place.other is None:
        raise DoesNotApplyError("there is one file only")
    shutil.copyfile(place.other, place.file)


def zeroed_header(place: Place) -> None:
    """Zeros over the header of a tar's member, or else over all that comes before the first row."""
    data, at = place.read()
    begin, stop = 0, min(found for row in place.rows if (found := data.find(row)) >= 0) if not place.is_tar else 0
    if place.is_tar:
        begin = _header(data, at)
        stop = begin + tarfile.BLOCKSIZE
    if stop == 0:
        raise DoesNotApplyError("it has no header")
    data[begin:stop] = bytes(stop - begin)
    place.file.write_bytes(data)


DEFECTS: Mapping[str, Callable[[Place], None]] = {
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
    """Read an epoch with each defect in the middle shard, on one rank without workers."""
    corpus, rows = elastic.corpus(), []
    with tempfile.TemporaryDirectory() as temporary:
        sound = written(kind, corpus, Path(temporary, "sound"))
        try:
            expected, _ = read(kind, sound, timeout)
        except probe.ProbeError as error:
            return [{"kind": kind, "defect": defect, "outcome": "not run", "error": str(error)} for defect in defects]
        for defect in defects:
            row = {"kind": kind, "defect": defect}
            damaged = Path(temporary, defect.replace(" ", "-"))
            shutil.copytree(sound, damaged)
            try:
                damage(defect, damaged, corpus)
                found, logged = read(kind, damaged, timeout)
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
    """What a reader that raised nothing has handed over: so many rows fewer, and so many that it should not have.

    It is not silent if some thread of it has written an error; but who reads from it sees the epoch end as ever.
    """
    fewer, other = expected.total() - found.total(), (found - expected).total()
    outcome = "no harm" if found == expected else "logged only" if logged else "silent"
    return {"outcome": outcome, "rows": expected.total(), "fewer": fewer, "other": other}


def damage(defect: str, folder: Path, corpus: Corpus) -> None:
    """Damage the file that holds the middle of the data, at the middle of it."""
    middle = corpus.rows(len(corpus.ends) // 2)[elastic.ROWS // 2]
    # Not its ends: a reader that packs may have them in other documents, and so in other members.
    row = middle[len(middle) // 4 : len(middle) // 2].tobytes()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NO_SHARDS)
    holders = [path for path in files if path.read_bytes().find(row) >= 0]
    if len(holders) != 1:
        raise RuntimeError(f"{folder}: {len(holders)} files hold the row that is to be damaged, but one must")
    others = [path for path in files if path != holders[0] and path.suffix == holders[0].suffix]
    rows = [each.tobytes() for shard in range(len(corpus.ends)) for each in corpus.rows(shard)]
    DEFECTS[defect](Place(holders[0], row, rows, others[0] if others else None))


def read(kind: str, folder: Path, timeout: float) -> tuple[Counter, str | None]:
    """The rows of an epoch, and an error that was logged and not raised.

    They are read in the order of the data, where the reader can be asked for that; a reader that packs gives other rows
    from a defect on.
    """
    settings = Settings(str(folder), elastic.LENGTH, elastic.GLOBAL_BATCH, slots=12, shuffle=False)
    result = probe.run("rows", kind, settings, timeout=timeout)
    return sum(elastic.join([result["rows"]]), Counter()), result["logged"]


def _begin_of_row(place: Place, data: bytearray, at: int) -> int:
    """Where the whole row begins that the place is in."""
    return next(data.find(row) for row in place.rows if place.row in row)


def _header(data: bytearray, at: int) -> int:
    """Where the header of the tar's member begins that holds byte ``at``."""
    return data.rfind(b"ustar", 0, at) - _MAGIC
