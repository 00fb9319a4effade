"""Packing: the documents of a block one after another, and the sequences of fixed length cut from them.

Either documents follow each other without a gap and are cut where a sequence ends (concatenate and split), or the
shards consist of packed rows, which are sequences already; see :mod:`dcscale.data.prepare.packing`.

Axes: N sequences; n of them, consecutive ones of a slot; L tokens per sequence (inputs and targets each).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.stream.order import Placement

IGNORED = -100
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class ShuffleBlock:
    """Documents of some shards in shuffled order."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""

    ends: np.ndarray
    """End of each document in ``tokens``, int64 [documents]."""

    is_placeholder: np.ndarray | None = None
    """Whether a token is a placeholder for one of a skipped shard, bool [tokens]; None if none is."""

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that were skipped when the block was built."""


def pack_block(documents: list[np.ndarray], order: np.ndarray) -> ShuffleBlock:
    """Put ``documents`` one after another in the given ``order`` [documents]."""
    ordered = [documents[i] for i in order.tolist()]
    # Not np.concatenate: it releases the GIL after each document and then has to wait for the other threads.
    return ShuffleBlock(np.frombuffer(b"".join(ordered), documents[0].dtype), _ends(ordered))


def pack_rows(documents: list[np.ndarray], order: np.ndarray, row_tokens: int) -> ShuffleBlock:
    """Put the rows that ``documents`` form one after another in the given ``order`` [rows]."""
    rows_NR = np.concatenate(documents).reshape(-1, row_tokens)
    ends = _ends(documents)
    row = (ends - 1) // row_tokens
    # argsort(order) is the inverse permutation: the new position of each row, with which its documents move.
    return ShuffleBlock(rows_NR[order].reshape(-1), np.sort(ends + (np.argsort(order)[row] - row) * row_tokens))


def fills_rows(documents: list[np.ndarray], row_tokens: int) -> bool:
    """Whether a document ends at the end of every row."""
    ends = _ends(documents)
    return np.count_nonzero(ends % row_tokens == 0) * row_tokens == ends[-1]


def _ends(documents: list[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)))


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, one per row."""

    tokens_NL1: np.ndarray
    """int32 [N, L + 1]; inputs are all but the last, targets all but the first. Padding is end-of-document tokens."""

    targets_NL: np.ndarray
    """int32 [N, L]; ``IGNORED`` in padding, in placeholders and, with the document mask, where a document begins."""

    padding_N: np.ndarray
    """int32 [N]: how many inputs are padding: what fills packed rows and the last sequence of an epoch, placeholders
    of skipped shards, and rows beyond the last sequence."""

    document_ids_NL: np.ndarray | None = None
    """int32 [N, L]: index of the input's document in its row, from 0; a row beyond the last sequence counts as one
    document. None without the document mask."""

    skipped: dict[int, tuple[SkippedShard, ...]] = field(default_factory=dict)
    """By row, the shards that were skipped when the row's blocks were built."""

    def split(self, sizes: Iterable[int]) -> Iterator[Sequences]:
        """Views of the given numbers of consecutive rows."""
        begin, ids_NL = 0, self.document_ids_NL
        for size in sizes:
            end = begin + size
            yield Sequences(
                self.tokens_NL1[begin:end],
                self.targets_NL[begin:end],
                self.padding_N[begin:end],
                None if ids_NL is None else ids_NL[begin:end],
                {row - begin: shards for row, shards in self.skipped.items() if begin <= row < end},
            )
            begin = end


class SequenceBuffer:
    """Assembles ``count`` sequences of ``length`` targets each. Rows that get no tokens are all padding."""

    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self._tokens_NL1, self._pad_id = np.empty((count, length + 1), dtype=np.int32), pad_id
        self._filled_N = np.zeros(count, dtype=np.int32)
        self._is_packed_N = np.zeros(count, dtype=bool)
        none = np.zeros(0, dtype=np.int64)
        # (rows_n, column, stride, document starts) of each placement. The empty entry keeps np.concatenate working
        # where there are no placements.
        self._starts = [(none, 0, 1, none)]
        self._is_placeholder_NL1: np.ndarray | None = None
        self._skipped: dict[int, tuple[SkippedShard, ...]] = {}

    def append(self, placement: Placement, block: ShuffleBlock, stride: int) -> None:
        """Copy the tokens of a placement into their rows; the tokens of each row must be appended in order.

        Args:
            placement: which tokens, and where to.
            block: the block of the placement.
            stride: tokens from one row's to the next row's.
        """
        rows_n, column, start, stop = placement.rows_n, placement.column, placement.start, placement.stop
        width = stop - start

        def put(to_NL1: np.ndarray, of: np.ndarray) -> None:
            # A strided view [n, width] of the block: consecutive sequences without a loop, overlapping by a token.
            size = of.itemsize
            view = np.ndarray((len(rows_n), width), of.dtype, of, start * size, (stride * size, size))
            to_NL1[:, column : column + width][rows_n] = view

        self._filled_N[rows_n] = column + width
        self._is_packed_N[rows_n] = stride == self._tokens_NL1.shape[1]  # else neighbours share a token
        put(self._tokens_NL1, block.tokens)
        if block.is_placeholder is not None:
            if self._is_placeholder_NL1 is None:
                self._is_placeholder_NL1 = np.zeros(self._tokens_NL1.shape, dtype=bool)
            put(self._is_placeholder_NL1, block.is_placeholder)
        if block.skipped:
            for row in rows_n.tolist():
                self._skipped[row] = (*self._skipped.get(row, ()), *block.skipped)
        # A document starts where another ends, and where a block begins.
        last = stop + (len(rows_n) - 1) * stride
        starts = block.ends[block.ends.searchsorted(start) : block.ends.searchsorted(last)] - start
        self._starts.append((rows_n, column, stride, np.append(0, starts) if start == 0 else starts))

    def finish(self, document_mask: bool) -> Sequences:
        """The sequences, with targets and, if ``document_mask``, document ids."""
        width = self._tokens_NL1.shape[1]
        targets_NL1 = self._tokens_NL1.copy()
        for row in np.flatnonzero(self._filled_N < width).tolist():
            filled = int(self._filled_N[row])
            self._tokens_NL1[row, filled:] = self._pad_id
            targets_NL1[row, filled:] = IGNORED
            self._starts.append((np.array([row]), filled, width, np.array([0])))
        padding_N = np.maximum(width - 1 - self._filled_N, 0)
        if self._is_placeholder_NL1 is not None:
            targets_NL1[self._is_placeholder_NL1] = IGNORED
            padding_N += self._is_placeholder_NL1[:, :-1].sum(axis=1, dtype=np.int32)
        document_ids_NL = None
        if document_mask:
            # The first token of a document cannot be predicted from the document before it.
            starts = self._document_starts()
            targets_NL1.reshape(-1)[starts] = IGNORED
            starts_NL1 = np.zeros(targets_NL1.shape, dtype=bool)
            starts_NL1.reshape(-1)[starts] = True
            packed_n = np.flatnonzero(self._is_packed_N)
            if len(packed_n):
                # A packed row is filled up with documents of one token.
                is_filler_nL = starts_NL1[packed_n, :-1] & starts_NL1[packed_n, 1:]
                padding_N[packed_n] += is_filler_nL.sum(axis=1, dtype=np.int32)
            starts_NL1[:, 0] = False
            # id = document starts in the row so far, without that of column 0
            document_ids_NL = np.cumsum(starts_NL1[:, :-1], axis=1, dtype=np.int32)
        return Sequences(self._tokens_NL1, targets_NL1[:, 1:], padding_N, document_ids_NL, self._skipped)

    def _document_starts(self) -> np.ndarray:
        """Positions of the tokens at which documents start, in the flattened rows.

        A token that two sequences share is the last target of one and the first input of the other. It is returned for
        the former: in the latter it does not matter whether it starts a document.
        """
        rows, columns, strides, starts = zip(*self._starts)
        width, part = self._tokens_NL1.shape[1], np.repeat(np.arange(len(starts)), list(map(len, starts)))
        start, stride = np.concatenate(starts), np.array(strides)[part]
        # The sequence of its placement that a start is in, and that sequence's row.
        nth = np.maximum(start - (width - stride), 0) // stride
        row = np.concatenate(rows)[np.cumsum([0, *map(len, rows)])[part] + nth]
        return row * width + np.array(columns)[part] + start - nth * stride
