"""Read the text column of Parquet files by row groups. The only file that imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dcscale.data.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 256
"""Rows whose texts are in memory at a time."""


class RowGroups(NamedTuple):
    """Consecutive row groups of a file."""

    groups: range
    first_row: int
    """Number of the first row in the file, from 0."""
    rows: int


def split_row_groups(path: Path, column: str, chunk_bytes: int) -> Iterator[RowGroups]:
    """Divide a file between row groups, into parts of at most ``chunk_bytes`` bytes of all columns, or one row group.

    Reads only the footer.

    Raises:
        DataError: pyarrow or the column is missing, the column is not text, or the file cannot be read.
    """
    with _open(path, column) as file:
        first = row = rows = size = 0
        for number in range(file.num_row_groups):
            # Not the size of the column: with a corrupt footer, asking for it crashes the process.
            group = file.metadata.row_group(number)
            if rows and size + group.total_byte_size > chunk_bytes:
                yield RowGroups(range(first, number), row, rows)
                first, row, rows, size = number, row + rows, 0, 0
            rows += group.num_rows
            size += group.total_byte_size
        if rows:
            yield RowGroups(range(first, file.num_row_groups), row, rows)
        if row + rows != file.metadata.num_rows:
            raise ValueError(f"its row groups hold {row + rows} rows instead of {file.metadata.num_rows}")


def read_column(path: Path, column: str, groups: range, rows: int) -> Iterator[bytes | None]:
    """Yield the texts of row groups as stored bytes, None for null; a few rows are in memory at a time.

    Raises:
        DataError: as :func:`split_row_groups`, or a page is corrupt, or the groups do not hold ``rows`` rows.
    """
    found = 0
    with _open(path, column) as file:
        import pyarrow

        for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(groups), columns=[column], use_threads=False):
            found += batch.num_rows
            # As bytes, since to_pylist on strings would raise at the first that is not UTF-8.
            yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()
        if found != rows:
            raise ValueError(f"row groups {groups.start} to {groups.stop - 1} hold {found} rows instead of {rows}")


@contextmanager
def _open(path: Path, column: str) -> Iterator[ParquetFile]:
    """Yield the file after checking that its column is text; errors of pyarrow in the body become DataError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile  # optional: other inputs need no pyarrow
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs the pyarrow package, which is not installed; install it with "
            f"'pip install pyarrow', or give the text as .jsonl"
        ) from error
    try:
        with open(path, "rb") as raw:  # pyarrow itself opens only paths that are UTF-8
            file = ParquetFile(raw, page_checksum_verification=True)
            _check_column(path, file.schema_arrow, column)
            yield file
    except DataError:  # also a ValueError, but its message is complete
        raise
    # With a corrupt footer, pyarrow raises nearly anything.
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}; replace the file") from error


def _check_column(path: Path, schema, column: str) -> None:
    import pyarrow

    fields = [schema.field(i) for i in schema.get_all_field_indices(column)]
    if len(fields) != 1:
        raise DataError(
            f"{path}: must have one column {column!r}, but its columns are {schema.names}; "
            f"name the right one with --text-field"
        )
    kind = fields[0].type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    # null: no row of this file has a text
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise DataError(
            f"{path}: column {column!r} is {fields[0].type}, but must be a string; name another one with --text-field, "
            f"or store the text as a string"
        )
