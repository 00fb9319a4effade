"""Pack documents into rows of a fixed length when shards are built: which fragments of documents fill which row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from dcscale.data.errors import DataError

Row = list[tuple[int, int, int]]
"""Fragments of documents in a row: (document, first token, end)."""


def pack_best_fit(lengths: Iterable[int], row_tokens: int) -> list[Row]:
    """Distribute documents over rows of at most ``row_tokens`` tokens, best-fit decreasing.

    A document that is longer than a row is cut into fragments that overlap by one token, which is the last target of
    one and the first input of the next. Fragments are placed longest first, each into the row that it fills best, so
    that documents are cut only where they must be and little of a row stays empty (Ding et al., "Fewer Truncations
    Improve Language Modeling", 2024).

    Args:
        lengths: tokens of each document [documents].
        row_tokens: tokens of a row, inputs and targets: the sequence length + 1.

    Returns:
        The rows, ordered by their first document; the caller pads rows that are not full.

    Raises:
        DataError: ``row_tokens`` is below 2, or a document has no tokens.
    """
    rows: list[Row] = []
    rows_by_free: dict[int, list[Row]] = defaultdict(list)
    # Bit n is set while rows_by_free[n] is not empty, so the best fit is the lowest set bit from `length` on.
    free_bits = 0
    longest_first = sorted(_fragments(lengths, row_tokens), key=lambda fragment: fragment[1] - fragment[2])
    for document, start, stop in longest_first:
        length = stop - start
        fitting = free_bits >> length
        if fitting:
            # x & -x isolates the lowest set bit of x.
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits ^= 1 << free
        else:
            free, row = row_tokens, []
            rows.append(row)
        row.append((document, start, stop))
        if free > length:
            rows_by_free[free - length].append(row)
            free_bits |= 1 << (free - length)
    return sorted(sorted(row) for row in rows)


def pack_one_per_row(lengths: Iterable[int], row_tokens: int) -> list[Row]:
    """One row for each document, or for each fragment of a longer one; arguments as :func:`pack_best_fit`."""
    return [[fragment] for fragment in _fragments(lengths, row_tokens)]


def _fragments(lengths: Iterable[int], row_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield the documents in fragments (document, first token, end) of at most ``row_tokens`` tokens."""
    if row_tokens < 2:
        raise DataError(f"row_tokens is {row_tokens}, but must be at least 2: an input and its target")
    for document, length in enumerate(map(int, lengths)):
        if length < 1:
            raise DataError(f"document {document} has {length} tokens, but must have at least 1")
        # Overlap by one token: every token of a document but its first is a target exactly once.
        for start in range(0, max(length - 1, 1), row_tokens - 1):
            yield document, start, min(start + row_tokens, length)
