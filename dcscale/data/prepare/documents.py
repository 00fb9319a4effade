"""Read documents from files, in an order that depends on nothing but the files.

A text file is one document; each line of a JSON lines file is one, each element of a JSON array, and each row of a
Parquet file. :func:`split_into_chunks` divides the files into chunks of similar size without decoding anything, and
:func:`read_documents` decodes one chunk. So the expensive part can run in any process, and the numbering of documents
does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from dcscale.data.bad_rows import BadRow, decode_text, text_of_json
from dcscale.data.errors import DataError
from dcscale.data.prepare.json_files import read_batches
from dcscale.data.prepare.parquet import read_column, split_row_groups
from dcscale.data.prepare.sources import JSON, PARQUET, TEXT, SourceFile

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of the corpus: whole text files, rows of a JSON file, or row groups of a Parquet file."""

    files: list[SourceFile]
    first_document: int
    """Number of its first document in the corpus; blank lines and documents that are left out keep their number."""
    documents: int
    """How many document numbers it covers, those of blank lines included."""
    bytes: int
    """Bytes on disk that it accounts for, for progress."""
    first_row: int = 0
    """Number of its first line, element or row in the file, from 1."""
    rows: list[bytes] = field(default_factory=list)
    """Undecoded lines or elements of a JSON file."""
    row_groups: range = range(0)
    """Row groups of a Parquet file."""


@dataclass(frozen=True)
class Document:
    """A text and its origin."""

    number: int
    """Its number in the corpus."""
    name: str
    """Tells it apart from all others, see :mod:`dcscale.data.prepare.sources`: the name of its file, followed by
    ``:ROW`` for JSON and Parquet, from 1."""
    text: str | None
    """None if the row is bad, with ``skip_bad_rows``."""
    bad_row: str = ""
    """Why there is no text."""


def split_into_chunks(
    files: Sequence[SourceFile], *, text_field: str = "text", chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Divide files into chunks of about ``chunk_bytes`` bytes of text, in order; row groups are never divided.

    Raises:
        DataError: a JSON file cannot be read, unpacked or divided, or a Parquet file has no text in column
            ``text_field``.
    """
    number = size = 0
    batch: list[SourceFile] = []
    for file in files:
        # Small text files share a chunk; any other file, or one too many, ends it.
        if batch and not (file.format == TEXT and size + file.bytes <= chunk_bytes):
            yield Chunk(batch, number, len(batch), size)
            number, size, batch = number + len(batch), 0, []
        if file.format == TEXT:
            batch.append(file)
            size += file.bytes
            continue
        if file.format == JSON:
            chunks = _split_json(file, number, chunk_bytes)
        else:
            chunks = _split_parquet(file, number, text_field, chunk_bytes)
        for chunk in chunks:
            yield chunk
            number += chunk.documents
    if batch:
        yield Chunk(batch, number, len(batch), size)


def _split_json(file: SourceFile, number: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of a JSON file whose first row is document ``number`` of the corpus."""
    row, read = 0, 0
    for rows, position in read_batches(file.path, file.is_array, chunk_bytes):
        # Progress counts bytes on disk, so it follows the position in the compressed file.
        yield Chunk([file], number + row, len(rows), position - read, first_row=row + 1, rows=rows)
        row, read = row + len(rows), position


def _split_parquet(file: SourceFile, number: int, text_field: str, chunk_bytes: int) -> Iterator[Chunk]:
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
            first_row=part.first_row + 1,
            row_groups=part.groups,
        )


def read_documents(chunk: Chunk, *, text_field: str = "text", skip_bad_rows: bool = False) -> Iterator[Document]:
    """Decode the documents of a chunk as strict UTF-8, with line ends unchanged.

    A byte order mark at the beginning of a file is removed.

    Args:
        chunk: a chunk from :func:`split_into_chunks`.
        text_field: field of a JSON object, or column of a Parquet file, that holds the text.
        skip_bad_rows: yield a document without text for a row that cannot be used, instead of raising.

    Raises:
        DataError: a file cannot be read, or a row has no valid text; the message names the file and the row.
    """
    for offset, where, name, read in _rows(chunk, text_field):
        try:
            text, reason = read(), ""
        except BadRow as bad:
            if not skip_bad_rows:
                raise DataError(f"{where}: {bad}, or leave out such rows with --on-bad-row skip") from bad
            text, reason = None, bad.reason
        yield Document(chunk.first_document + offset, name, text, reason)


def _rows(chunk: Chunk, text_field: str) -> Iterator[tuple[int, str, str, Callable[[], str]]]:
    """(number in the chunk, place for messages, name, function that decodes it or raises BadRow) of each document."""
    file = chunk.files[0]
    if file.format == TEXT:
        for offset, file in enumerate(chunk.files):
            yield offset, str(file.path), file.name, partial(_read_text, file)
        return
    if file.format == PARQUET:
        unit, read, rows = "row", _text_of_cell, read_column(file.path, text_field, chunk.row_groups, chunk.documents)
    else:
        unit, read, rows = "element" if file.is_array else "line", text_of_json, chunk.rows
    for offset, row in enumerate(rows):
        number = chunk.first_row + offset
        if file.format == PARQUET or row.strip():  # blank lines hold no document
            yield offset, f"{file.path}, {unit} {number}", f"{file.name}:{number}", partial(read, row, text_field)


def _read_text(file: SourceFile) -> str:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}; make it readable") from error
    return decode_text(data).removeprefix("\ufeff")


def _text_of_cell(data: bytes | None, column: str) -> str:
    if data is None:
        raise BadRow("null text", f"{column!r} is null")
    return decode_text(data)
