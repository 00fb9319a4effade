"""Read documents from files and folders, in an order that depends on nothing but the inputs.

A text file is one document; each line of a JSONL file is one, and each row of a Parquet file. :func:`find_files` lists
the files, :func:`split_into_chunks` divides them into chunks of similar size without decoding anything, and
:func:`read_documents` decodes one chunk. So the expensive part can run in any process, and the numbering of documents
does not depend on it.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from dcscale.data.errors import DataError
from dcscale.data.prepare.parquet import read_column, split_row_groups

try:  # optional: in the standard library from Python 3.14 on
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None

DEFAULT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 1 << 22
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_READ_ERRORS = (OSError, EOFError, zlib.error, *([zstd.ZstdError] if zstd else []))
_UNSUPPORTED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".arrow")


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    name: str
    """Path relative to the input folder, with forward slashes; the file's name where the input is a file."""
    bytes: int
    """Size on disk."""
    mtime_ns: int
    """Time of the last modification, in nanoseconds."""

    @property
    def is_jsonl(self) -> bool:
        return self.name.lower().endswith(_JSONL)

    @property
    def is_parquet(self) -> bool:
        return self.name.lower().endswith(".parquet")


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of the corpus: whole text files, lines of a JSONL file, or row groups of a Parquet file."""

    files: list[SourceFile]
    first_document: int
    """Number of its first document in the corpus; blank lines and documents that are left out keep their number."""
    documents: int
    """How many document numbers it covers, those of blank lines included."""
    bytes: int
    """Bytes on disk that it accounts for, for progress."""
    first_line: int = 0
    """Number of its first line or row in the file, from 1."""
    lines: list[bytes] = field(default_factory=list)
    """Undecoded lines of a JSONL file."""
    row_groups: range = range(0)
    """Row groups of a Parquet file."""


@dataclass(frozen=True)
class Document:
    """A text and its origin."""

    number: int
    """Its number in the corpus."""
    name: str
    """Name of its file, followed by ``:LINE`` for JSONL or ``:ROW`` for Parquet, from 1."""
    text: str | None
    """None if it could not be decoded, with ``skip_undecodable``."""


def find_files(
    inputs: Sequence[str | Path], *, suffixes: Sequence[str] = DEFAULT_SUFFIXES, exclude: Sequence[str] = ()
) -> list[SourceFile]:
    """List the files of ``inputs`` in the given order; a folder gives its files at any depth, sorted by path.

    Args:
        inputs: files, read whatever their suffix, and folders. Links to folders inside a folder are not followed.
        suffixes: which files of a folder to read, such as ``.py``.
        exclude: shell-style patterns; files and folders below an input whose name matches one are left out.

    Raises:
        DataError: an input does not exist or has no matching file, a file is given twice, or a file has a compression
            or format that is not supported.
    """
    files: list[SourceFile] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            # By path components: sorting the joined strings would order "a-.txt" before "a/z.txt".
            found = sorted(_walk(entry, tuple(suffixes), exclude), key=lambda file: file.name.split("/"))
            if not found:
                raise DataError(
                    f"{entry}: no file in it ends in {', '.join(suffixes)}; name the right ones with --suffix"
                )
            files += found
        elif entry.is_file():
            files.append(_source_file(entry, entry.name))
        else:
            raise DataError(f"{entry}: is neither a file nor a folder; check the path")
    seen: set[str] = set()
    for file in files:
        path = os.path.abspath(file.path)
        if path in seen:
            raise DataError(f"{file.path}: is given twice, so its text would be trained on twice; name it once")
        seen.add(path)
        if not file.is_jsonl and file.name.lower().endswith(_UNSUPPORTED_SUFFIXES):
            raise DataError(f"{file.path}: this kind of file is not supported; unpack it, or write it as .jsonl.gz")
    return files


def _walk(folder: Path, suffixes: tuple[str, ...], exclude: Sequence[str]) -> Iterator[SourceFile]:
    def kept(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in exclude)

    def raise_unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable, or use --exclude")

    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        folders[:] = filter(kept, folders)  # in place, so that os.walk does not enter excluded folders
        for name in filter(kept, names):
            path = Path(parent, name)
            if name.endswith(suffixes) and path.is_file():
                yield _source_file(path, path.relative_to(folder).as_posix())


def _source_file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def split_into_chunks(
    files: Sequence[SourceFile], *, text_field: str = "text", chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Divide files into chunks of about ``chunk_bytes`` bytes of text, in order; row groups are never divided.

    Raises:
        DataError: a JSONL file cannot be read or unpacked, or a Parquet file has no text in column ``text_field``.
    """
    number = size = 0
    batch: list[SourceFile] = []
    for file in files:
        is_text = not (file.is_jsonl or file.is_parquet)
        # Small text files share a chunk; any other file, or one too many, ends it.
        if batch and not (is_text and size + file.bytes <= chunk_bytes):
            yield Chunk(batch, number, len(batch), size)
            number, size, batch = number + len(batch), 0, []
        if is_text:
            batch.append(file)
            size += file.bytes
            continue
        if file.is_jsonl:
            chunks = _split_lines(file, number, chunk_bytes)
        else:
            chunks = _split_rows(file, number, text_field, chunk_bytes)
        for chunk in chunks:
            yield chunk
            number += chunk.documents
    if batch:
        yield Chunk(batch, number, len(batch), size)


def _split_lines(file: SourceFile, number: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a JSONL file whose first line is document ``number`` of the corpus."""
    first_line, read = 1, 0
    try:
        with open(file.path, "rb") as raw, _decompressed(file, raw) as lines:
            while batch := lines.readlines(chunk_bytes):
                # Progress counts bytes on disk, so it follows the position in the compressed file.
                position = raw.tell()
                yield Chunk(
                    [file], number + first_line - 1, len(batch), position - read, first_line=first_line, lines=batch
                )
                first_line, read = first_line + len(batch), position
    except _READ_ERRORS as error:
        raise DataError(
            f"{file.path}: cannot be read after line {first_line - 1}: {error}; replace the file"
        ) from error


def _decompressed(file: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    name = file.name.lower()
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".zst"):
        if zstd is None:
            raise DataError(
                f"{file.path}: reading .zst needs the backports.zstd package, which is not installed; install it with "
                f"'pip install backports.zstd', or give the text as .jsonl.gz"
            )
        # Accept files written with `zstd --long=31`; by default, windows larger than --long=27 are refused.
        return zstd.open(raw, options={zstd.DecompressionParameter.window_log_max: 31})
    return raw


def _split_rows(file: SourceFile, number: int, text_field: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a Parquet file whose first row is document ``number`` of the corpus."""
    parts = list(split_row_groups(file.path, text_field, chunk_bytes))
    rows = sum(part.rows for part in parts)
    for part in parts:
        # Share of the file in proportion to the rows; the difference of rounded ends adds up to the file's size.
        begin, end = (file.bytes * row // rows for row in (part.first_row, part.first_row + part.rows))
        yield Chunk(
            [file],
            number + part.first_row,
            part.rows,
            end - begin,
            first_line=part.first_row + 1,
            row_groups=part.groups,
        )


def read_documents(chunk: Chunk, *, text_field: str = "text", skip_undecodable: bool = False) -> Iterator[Document]:
    """Decode the documents of a chunk as strict UTF-8, with line ends unchanged.

    Args:
        chunk: a chunk from :func:`split_into_chunks`.
        text_field: field of a JSONL object, or column of a Parquet file, that holds the text.
        skip_undecodable: yield a document whose text is not UTF-8 with text None, instead of raising.

    Raises:
        DataError: a file cannot be read or is not UTF-8, or a line is not a JSON object with the text; the message
            names the file and the line.
    """
    file = chunk.files[0]
    if chunk.lines:
        for i, line in enumerate(chunk.lines):
            if line.strip():
                where = f"{file.path}, line {chunk.first_line + i}"
                text = _decode(where, line, skip_undecodable)
                if text is not None:
                    text = _text_of(where, text, text_field, skip_undecodable)
                yield Document(chunk.first_document + i, f"{file.name}:{chunk.first_line + i}", text)
    elif chunk.row_groups:
        for i, data in enumerate(read_column(file.path, text_field, chunk.row_groups, chunk.documents)):
            where = f"{file.path}, row {chunk.first_line + i}"
            if data is None:
                raise DataError(
                    f"{where}: {text_field!r} is null, but must be text; remove rows without text from the file"
                )
            text = _decode(where, data, skip_undecodable)
            yield Document(chunk.first_document + i, f"{file.name}:{chunk.first_line + i}", text)
    else:
        for i, file in enumerate(chunk.files):
            try:
                data = file.path.read_bytes()
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read: {error.strerror}; make it readable") from error
            yield Document(chunk.first_document + i, file.name, _decode(str(file.path), data, skip_undecodable))


def _decode(where: str, data: bytes, skip: bool) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if skip:
            return None
        raise DataError(
            f"{where}: byte {error.start} is {data[error.start]:#04x}, which is not UTF-8; convert the file, leave it "
            f"out with --exclude, or leave out all such documents with --skip-undecodable"
        ) from error


def _text_of(where: str, line: str, text_field: str, skip: bool) -> str | None:
    """The text in a line of JSONL; None if it is not encodable, with ``skip``."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}; correct or remove the line") from error
    if not isinstance(content, dict) or not isinstance(content.get(text_field), str):
        found = f"has {sorted(content) if isinstance(content, dict) else type(content).__name__}"
        if isinstance(content, dict) and text_field in content:
            found = f"the field is {json.dumps(content[text_field])[:60]}"
        raise DataError(
            f"{where}: must be an object whose field {text_field!r} is a string, but {found}; "
            f"name the right field with --text-field"
        )
    text = content[text_field]
    try:
        text.encode()  # JSON may escape a lone surrogate, which is valid in a str but not in UTF-8
    except UnicodeEncodeError as error:
        if skip:
            return None
        raise DataError(
            f"{where}: character {error.start} of {text_field!r} is half of a surrogate pair, which is not valid text; "
            f"correct or remove the line, or leave out all such documents with --skip-undecodable"
        ) from error
    return text
