"""Find the files to read: what format each has, which name tells its documents apart, and what is given twice.

The name of a document decides its split and, with the seed, its place in the order, so it is unique over everything
that is given and does not depend on where that is. It is the path of its file below the folder that was given, with
the line or row. If several files and folders are given, the end of the given path precedes it, as short as tells all of
them apart: ``en/part-0.jsonl:17`` and ``fr/part-0.jsonl:17`` for ``/data/en/part-0.jsonl`` and
``/data/fr/part-0.jsonl``.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

from dcscale.data.errors import DataError
from dcscale.data.prepare.json_files import is_array, without_packing

JSON, PARQUET, TEXT = FORMATS = ("json", "parquet", "text")
_PACKINGS = ("", ".gz", ".zst")
_SUFFIXES = {
    JSON: tuple(suffix + packing for suffix in (".jsonl", ".ndjson", ".json") for packing in _PACKINGS),
    PARQUET: (".parquet",),
    TEXT: (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".tex"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt"),
        *(".scala", ".swift", ".cs", ".fs", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r"),
        *(".jl", ".hs", ".ml", ".clj", ".ex", ".erl", ".lisp", ".el", ".f90", ".zig", ".dart", ".sql", ".sh", ".bash"),
    ),
}
"""Format -> suffixes, in lower case, of the files that have it without question."""
DEFAULT_SUFFIXES = {JSON: _SUFFIXES[JSON], PARQUET: _SUFFIXES[PARQUET], TEXT: (".txt",)}
"""Format -> which files of folders have it if no suffixes are given."""
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".arrow")
"""Suffixes of what is never text."""
_EXAMPLES = 3
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    name: str
    """What precedes the line or row in the names of its documents; forward slashes separate folders."""
    bytes: int
    """Size on disk."""
    mtime_ns: int
    """Time of the last modification, in nanoseconds."""
    format: str
    """One of ``FORMATS``."""
    is_array: bool = False
    """For JSON, whether it holds one array rather than lines."""


@dataclass
class NotRead:
    """What is in the folders and is not read."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Suffix, or another reason, -> number of files."""
    examples: list[Path] = field(default_factory=list)
    """The first files of the first kinds."""

    def add(self, path: Path, kind: str) -> None:
        if kind not in self.kinds and len(self.examples) < _EXAMPLES:
            self.examples.append(path)
        self.kinds[kind] += 1

    def __str__(self) -> str:
        total, common = self.kinds.total(), self.kinds.most_common(10)
        kinds = [f"{kind} {count:,}" for kind, count in common]
        if others := total - sum(count for _, count in common):
            kinds.append(f"others {others:,}")
        files = "file" if total == 1 else "files"
        return f"{total:,} {files}, such as {', '.join(map(str, self.examples))} ({', '.join(kinds)})"


def find_files(
    inputs: Sequence[str | Path],
    *,
    suffixes: Sequence[str] | None = None,
    format: str | None = None,
    exclude: Sequence[str] = (),
    ignore: Sequence[Path] = (),
) -> tuple[list[SourceFile], NotRead]:
    """List the files of ``inputs`` in the given order; a folder gives its files at any depth, sorted by path.

    Args:
        inputs: files and folders. Links to folders inside a folder are not followed.
        suffixes: which files of a folder to read, such as ``.py``, in upper or lower case; None: ``DEFAULT_SUFFIXES``.
        format: the format of all files, one of ``FORMATS``; None: by the suffix of each, which must be one of JSON
            lines, Parquet, or of files that are plain text or source code.
        exclude: shell-style patterns; files and folders below an input whose name matches one are left out.
        ignore: folders that are left out like these, given by their path.

    Returns:
        The files, and what of the folders is not read, without what was excluded.

    Raises:
        DataError: an input does not exist or has no matching file, a file has a format that is not read, or the same
            data is given twice.
    """
    for suffix in suffixes or ():
        if not suffix.startswith("."):
            raise DataError(f"--suffix {suffix}: must begin with a dot, such as .{suffix.lstrip('*.')}")
    chosen = DEFAULT_SUFFIXES if format is None else {format: DEFAULT_SUFFIXES[format]}
    wanted = tuple(suffix.lower() for suffix in suffixes or sum(chosen.values(), ()))
    entries = list(map(Path, inputs))
    for entry in entries:
        if not (entry.is_file() or entry.is_dir()):
            raise DataError(f"{entry}: is neither a file nor a folder; check the path")
    not_read, by_entry = NotRead(), []
    for entry, prefix in zip(entries, _prefixes(entries)):
        paths = [entry]
        if entry.is_dir():
            paths = _without_links(sorted(_walk(entry, wanted, exclude, ignore, not_read)), not_read)
            if not paths:
                raise DataError(
                    f"{entry}: no file in it ends in {', '.join(wanted)}; name the right ones with --suffix"
                    + (f". Not read: {not_read}" if not_read.kinds else "")
                )
        by_entry.append([_source_file(entry, path, prefix, format) for path in paths])
    files = [file for found in by_entry for file in found]
    _check_given_once(files)
    _check_copied_folders(entries, by_entry)
    _check_copied_files([file for file in files if file.format != TEXT and file.bytes])
    return files, not_read


def _prefixes(entries: Sequence[Path]) -> list[str]:
    """What precedes the names of the files of each input."""
    if len(entries) == 1 and entries[0].is_dir():
        return [""]
    parts = [Path(os.path.abspath(entry)).parts for entry in entries]
    for number, entry in enumerate(entries):
        if parts[number] in parts[:number]:
            raise DataError(f"{entry}: is given twice, so its text would be trained on twice; name it once")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def _walk(
    folder: Path, suffixes: tuple[str, ...], exclude: Sequence[str], ignore: Sequence[Path], not_read: NotRead
) -> Iterator[Path]:
    """The files of a folder with one of the suffixes; adds the others to ``not_read``."""

    def kept(names: list[str]) -> list[str]:
        return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in exclude))

    def raise_unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable, or use --exclude")

    ignored = {os.path.realpath(path) for path in ignore}
    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        links = [name for name in kept(folders) if os.path.islink(os.path.join(parent, name))]
        real = os.path.realpath(parent)
        # In place, so that os.walk does not enter the others.
        folders[:] = [name for name in kept(folders) if name not in links and os.path.join(real, name) not in ignored]
        for name in links:
            not_read.add(Path(parent, name), "link to a folder")
        for name in kept(names):
            path = Path(parent, name)
            if not path.is_file():
                not_read.add(path, "not a file")
            elif name.lower().endswith(suffixes):
                yield path
            else:
                not_read.add(path, _kind(path))


def _kind(path: Path) -> str:
    """The suffix of a file in lower case, with that of what is packed in it: ``.txt.gz``."""
    suffixes = Path(path.name.lower()).suffixes
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in _PACKED else suffixes[-1:]) or "no suffix"


def _source_file(entry: Path, path: Path, prefix: str, format: str | None) -> SourceFile:
    below = "" if path == entry else path.relative_to(entry).as_posix()
    status, found = path.stat(), _format_of(path, format)
    name = "/".join(filter(None, (prefix, below)))
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, found, found == JSON and is_array(path))


def _format_of(path: Path, given: str | None) -> str:
    name = path.name.lower()
    found = given or next((known for known, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)
    if name.endswith(_PACKED) and (found != JSON or without_packing(name) == name):
        raise DataError(f"{path}: is compressed or an archive, of which only .gz and .zst of JSON are read; unpack it")
    if found is None:
        raise DataError(
            f"{path}: its suffix is not that of JSON lines, of Parquet, or of plain text or source code; write it as "
            f"JSON lines, leave it out with --exclude, or read every file as one text, as it is, with --format text"
        )
    return found


# -- what is given twice -----------------------------------------------------------------------------------------------


def _file_id(path: Path) -> object:
    """Equal for all names of a file: for hard links, links and mounts."""
    status = path.stat()
    # Some network file systems give no number.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _without_links(paths: Sequence[Path], not_read: NotRead) -> list[Path]:
    """Each file of a folder once, in the same order: by the first name that is not a link, or else by the first."""
    names: dict[object, list[Path]] = defaultdict(list)
    for path in paths:
        names[_file_id(path)].append(path)
    links = set()
    for same in names.values():
        if len(same) > 1:
            links.update(sorted(same, key=os.path.islink)[1:])
    for path in sorted(links):
        not_read.add(path, "another name of a file")
    return [path for path in paths if path not in links]


def _check_given_once(files: Sequence[SourceFile]) -> None:
    first: dict[object, SourceFile] = {}
    for file in files:
        other = first.setdefault(_file_id(file.path), file)
        if other is not file:
            raise DataError(
                f"{file.path}: is given twice, first as {other.path}, so it would be trained on twice; give it once"
            )


def _check_copied_folders(entries: Sequence[Path], files: Sequence[Sequence[SourceFile]]) -> None:
    """Refuse two folders with the same files. Single texts may be equal, as licences and empty files of code are."""
    folders = defaultdict(list)
    for entry, found in zip(entries, files):
        if entry.is_dir() and len(entries) > 1:
            listing = tuple((file.path.relative_to(entry), file.bytes) for file in found)
            folders[listing].append(entry)
    for listing, same in folders.items():
        for entry, other in combinations(same, 2):
            if all(filecmp.cmp(entry / path, other / path, shallow=False) for path, _ in listing):
                raise DataError(
                    f"{other}: is a copy of {entry}, so its text would be trained on twice; leave one of them out"
                )


def _check_copied_files(files: Sequence[SourceFile]) -> None:
    """Refuse copies among files that hold many documents. Reads little, and only of files of the same size."""
    by_name: dict[Path, SourceFile] = {}
    by_size = defaultdict(list)
    for file in files:
        name = file.path.name  # in its own case: A.jsonl and a.jsonl are two files
        unpacked = file.path.with_name(name[: len(without_packing(name.lower()))])
        if (other := by_name.setdefault(unpacked, file)) is not file:
            raise DataError(
                f"{file.path}: is by its name {other.path} in another packing, so its text would be trained on twice; "
                f"leave one of them out with --exclude, or rename it"
            )
        by_size[file.bytes].append(file)
    for size, same in by_size.items():
        by_ends = defaultdict(list)
        for file in same if len(same) > 1 else ():
            with open(file.path, "rb") as raw:
                start = raw.read(_COMPARED_BYTES)
                raw.seek(max(0, size - _COMPARED_BYTES))
                end = raw.read()
            is_single = file.format == JSON and not file.is_array and start == end and b"\n" not in start.strip()
            if not is_single:  # a line in a file of its own may be equal to others, as a text may
                by_ends[hashlib.sha256(start + end).digest()].append(file.path)
        for path, other in (pair for paths in by_ends.values() for pair in combinations(paths, 2)):
            if filecmp.cmp(path, other, shallow=False):
                raise DataError(
                    f"{other}: is a copy of {path}, so its text would be trained on twice; leave one of them out, for "
                    f"example with --exclude"
                )
