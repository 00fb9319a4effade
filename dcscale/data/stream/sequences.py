"""Packing: the documents of a window one after another, and sequences of fixed length cut from them.

Either documents follow each other without a gap and are cut wherever a sequence ends (concatenate and split), or the
shards were made of rows, which are sequences already: :mod:`dcscale.data.prepare.packing` says what is
in them.

Axes: N sequences, n of them that follow each other, L tokens a sequence (inputs and targets each).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dcscale.data.shards.skipped import SkippedShard

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


def pack_block(documents: list[np.ndarray], order: np.ndarray) -> Window:
    """Put ``documents`` one after another in the given ``order`` [documents]."""
    ordered = [documents[i] for i in order.tolist()]
    # Not NumPy, which lets other threads run after each document, and then has to wait for them.
    return Window(np.frombuffer(b"".join(ordered), documents[0].dtype), _ends(ordered))


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

    def split(self, sizes: Iterable[int]) -> Iterator[Sequences]:
        """Views of so many rows each."""
        begin, ids_NL = 0, self.document_ids_NL
        for size in sizes:
            end = begin + size
            yield Sequences(
                self.tokens_NL1[begin:end],
                self.targets_NL[begin:end],
                None if ids_NL is None else ids_NL[begin:end],
                {row - begin: shards for row, shards in self.skipped.items() if begin <= row < end},
            )
            begin = end


class SequenceBuffer:
    """Builds ``count`` sequences of ``length`` targets each; rows that get no tokens are padding as a whole."""

    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self._tokens_NL1, self._pad_id = np.empty((count, length + 1), dtype=np.int32), pad_id
        self._filled_N = np.zeros(count, dtype=np.int64)
        none = np.zeros(0, dtype=np.int64)
        self._parts = [(none, 0, 1, none)]  # one there always is, also without rows
        self._lost_NL1: np.ndarray | None = None
        self._skipped: dict[int, tuple[SkippedShard, ...]] = {}

    def append(self, rows_n: np.ndarray, column: int, window: Window, start: int, stop: int, stride: int) -> None:
        """Add tokens [start, stop) of ``window`` to the first of ``rows_n``, from ``column`` on, where its tokens so
        far end; and to each of the others those ``stride`` further than the one before."""
        width = stop - start

        def put(to_NL1: np.ndarray, of: np.ndarray) -> None:
            size = of.itemsize
            parts = np.ndarray((len(rows_n), width), of.dtype, of, start * size, (stride * size, size))
            to_NL1[:, column : column + width][rows_n] = parts

        self._filled_N[rows_n] = column + width
        put(self._tokens_NL1, window.tokens)
        if window.lost is not None:
            if self._lost_NL1 is None:
                self._lost_NL1 = np.zeros(self._tokens_NL1.shape, dtype=bool)
            put(self._lost_NL1, window.lost)
        if window.skipped:
            for row in rows_n.tolist():
                self._skipped[row] = (*self._skipped.get(row, ()), *window.skipped)
        # Documents begin where others end, and where a window begins.
        last = stop + (len(rows_n) - 1) * stride
        begins = window.ends[window.ends.searchsorted(start) : window.ends.searchsorted(last)] - start
        self._parts.append((rows_n, column, stride, np.append(0, begins) if start == 0 else begins))

    def finish(self, document_mask: bool) -> Sequences:
        """The sequences, with targets and document ids."""
        width = self._tokens_NL1.shape[1]
        targets_NL1 = self._tokens_NL1.copy()
        for row in np.flatnonzero(self._filled_N < width).tolist():
            filled = int(self._filled_N[row])
            self._tokens_NL1[row, filled:] = self._pad_id
            targets_NL1[row, filled:] = IGNORED
            self._parts.append((np.array([row]), filled, width, np.array([0])))
        if self._lost_NL1 is not None:
            targets_NL1[self._lost_NL1] = IGNORED
        document_ids_NL = None
        if document_mask:
            begins = self._document_begins()
            targets_NL1.reshape(-1)[begins] = IGNORED
            begins_NL1 = np.zeros(targets_NL1.shape, dtype=bool)
            begins_NL1.reshape(-1)[begins] = True
            begins_NL1[:, 0] = False
            document_ids_NL = np.cumsum(begins_NL1[:, :-1], axis=1, dtype=np.int32)
        return Sequences(self._tokens_NL1, targets_NL1[:, 1:], document_ids_NL, self._skipped)

    def _document_begins(self) -> np.ndarray:
        """Where documents begin, counted through all rows.

        A token that two sequences share is the last target of one, and the first input of the other. It is given for
        the first: in the other it does not matter whether it begins a document.
        """
        rows, columns, strides, begins = zip(*self._parts)
        width, part = self._tokens_NL1.shape[1], np.repeat(np.arange(len(begins)), list(map(len, begins)))
        begin, stride = np.concatenate(begins), np.array(strides)[part]
        nth = np.maximum(begin - (width - stride), 0) // stride
        row = np.concatenate(rows)[np.cumsum([0, *map(len, rows)])[part] + nth]
        return row * width + np.array(columns)[part] + begin - nth * stride
