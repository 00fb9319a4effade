"""Packing: the documents of a window one after another, and sequences of fixed length cut from them.

Either documents follow each other without a gap and are cut wherever a sequence ends (concatenate and split), or the
shards were made of rows, which are sequences already: :func:`pack_best_fit` and :func:`pack_one_per_row` say what lies
in them.

Axes: N sequences, L tokens a sequence (inputs and targets each).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.skipping import SkippedShard

IGNORED = -100
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class Window:
    """Documents in their final order."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""

    ends: np.ndarray
    """End of each document in ``tokens``, int64 [documents]."""

    lost: np.ndarray | None = None
    """Whether a token only stands for one of a shard that was given up, bool [tokens]; None where none does."""

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that were given up when it was made."""


def pack_window(documents: list[np.ndarray], order: np.ndarray) -> Window:
    """Put ``documents`` one after another in the given ``order`` [documents]."""
    ordered = [documents[i] for i in order.tolist()]
    return Window(np.concatenate(ordered), _ends(ordered))


def pack_rows(documents: list[np.ndarray], order: np.ndarray, row_tokens: int) -> Window:
    """Put the rows that ``documents`` make up one after another in the given ``order`` [rows]."""
    rows_NR = np.concatenate(documents).reshape(-1, row_tokens)
    ends = _ends(documents)
    row = (ends - 1) // row_tokens
    return Window(rows_NR[order].reshape(-1), np.sort(ends + (np.argsort(order)[row] - row) * row_tokens))


def fills_rows(documents: list[np.ndarray], row_tokens: int) -> bool:
    """Whether some document ends wherever a row does."""
    ends = _ends(documents)
    return np.count_nonzero(ends % row_tokens == 0) * row_tokens == ends[-1]


def _ends(documents: list[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)))


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, one a row."""

    tokens_NL1: np.ndarray
    """int32 [N, L + 1]; inputs are all but the last, targets all but the first. Padding is end-of-document tokens."""

    targets_NL: np.ndarray
    """int32 [N, L]; ``IGNORED`` in padding, in what was lost and, under the document mask, where a document begins."""

    document_ids_NL: np.ndarray | None = None
    """int32 [N, L]: number of the input's document in its row, from 0; padding counts as one. None without mask."""

    skipped: dict[int, tuple[SkippedShard, ...]] = field(default_factory=dict)
    """By row, the shards of its windows that were given up when these were made."""


class SequenceBuffer:
    """Builds ``count`` sequences of ``length`` targets each; rows that get no tokens are padding as a whole.

    Tokens are numbered through all rows. What is done for each piece is kept small: it is most of the cost of reading.
    """

    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self._tokens_NL1 = np.full((count, length + 1), pad_id, dtype=np.int32)
        self._tokens = self._tokens_NL1.reshape(-1)
        self._filled_N = list(range(0, count * (length + 1), length + 1))
        self._begins: list[np.ndarray] = []
        self._lost: np.ndarray | None = None
        self._skipped: dict[int, tuple[SkippedShard, ...]] = {}

    def append(self, row: int, window: Window, start: int, stop: int) -> None:
        """Add tokens [start, stop) of ``window`` to a row."""
        begin = self._filled_N[row]
        self._filled_N[row] = end = begin + stop - start
        self._tokens[begin:end] = window.tokens[start:stop]
        # Documents begin where others end, and where a window begins.
        ends = window.ends
        self._begins.append(ends[ends.searchsorted(start) : ends.searchsorted(stop)] + (begin - start))
        if start == 0:
            self._begins.append(np.array([begin]))
        if window.lost is not None:
            if self._lost is None:
                self._lost = np.zeros(len(self._tokens), dtype=bool)
            self._lost[begin:end] = window.lost[start:stop]
        if window.skipped:
            self._skipped[row] = (*self._skipped.get(row, ()), *window.skipped)

    def finish(self, document_mask: bool) -> Sequences:
        """The sequences, with targets and document ids."""
        targets_NL1 = self._tokens_NL1.copy()
        targets, width = targets_NL1.reshape(-1), targets_NL1.shape[1]
        for row, filled in enumerate(self._filled_N):
            if filled < (row + 1) * width:
                targets[filled : (row + 1) * width] = IGNORED
                self._begins.append(np.array([filled]))
        if self._lost is not None:
            targets[self._lost] = IGNORED
        document_ids_NL = None
        if document_mask:
            begins = np.concatenate(self._begins)
            targets[begins] = IGNORED
            begins_NL1 = np.zeros_like(targets_NL1)
            begins_NL1.reshape(-1)[begins] = 1
            begins_NL1[:, 0] = 0
            document_ids_NL = np.cumsum(begins_NL1[:, :-1], axis=1, dtype=np.int32)
        return Sequences(self._tokens_NL1, targets_NL1[:, 1:], document_ids_NL, self._skipped)


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
