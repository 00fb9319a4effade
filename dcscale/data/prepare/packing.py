"""Rows of whole documents, planned when shards are made: which parts of documents fill which row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from dcscale.data.errors import DataError

Row = list[tuple[int, int, int]]
"""Parts of documents in a row: (document, first token, end)."""


def pack_best_fit(lengths: Iterable[int], row_tokens: int) -> list[Row]:
    """Share documents out over rows of at most ``row_tokens`` tokens, best-fit decreasing.

    A document that does not fit into a row is cut; see :func:`_parts`. Parts are placed longest first, each into the
    row that it fills best, so that documents are cut only where they must be and little of a row stays empty
    (Ding et al., "Fewer Truncations Improve Language Modeling", 2024).

    Args:
        lengths: tokens of each document [documents].
        row_tokens: tokens of a row, inputs and targets: the sequence length + 1.

    Returns:
        The rows, by the first document in them; what is left of a row is for the caller to fill.
    """
    rows: list[Row] = []
    by_free: dict[int, list[Row]] = defaultdict(list)
    frees = 0  # bit n is set where by_free[n] has rows, so that the best fit is the lowest bit from the length on
    for document, start, stop in sorted(_parts(lengths, row_tokens), key=lambda part: part[1] - part[2]):
        length = stop - start
        fitting = frees >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = by_free[free].pop()
            if not by_free[free]:
                frees ^= 1 << free
        else:
            free, row = row_tokens, []
            rows.append(row)
        row.append((document, start, stop))
        if free > length:
            by_free[free - length].append(row)
            frees |= 1 << (free - length)
    return sorted(sorted(row) for row in rows)


def pack_one_per_row(lengths: Iterable[int], row_tokens: int) -> list[Row]:
    """A row for each document, or for each part of one that does not fit; see :func:`pack_best_fit`."""
    return [[part] for part in _parts(lengths, row_tokens)]


def _parts(lengths: Iterable[int], row_tokens: int) -> Iterator[tuple[int, int, int]]:
    """The documents in parts of at most ``row_tokens``.

    A part begins with the last token of the one before, which is a target there and an input here: so every token of a
    document but its first is a target exactly once.
    """
    if row_tokens < 2:
        raise DataError(f"row_tokens is {row_tokens}, but must be at least 2: an input and its target")
    for document, length in enumerate(map(int, lengths)):
        if length < 1:
            raise DataError(f"document {document} has {length} tokens, but must have at least 1")
        for start in range(0, max(length - 1, 1), row_tokens - 1):
            yield document, start, min(start + row_tokens, length)
