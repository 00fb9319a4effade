"""Packing: the documents of a window one after another, and sequences of fixed length cut from them.

Axes: N sequences, L tokens a sequence (inputs and targets each).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class Window:
    """Documents in their final order."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""

    ends: np.ndarray
    """End of each document in ``tokens``, int64 [documents]."""


def pack_window(documents: list[np.ndarray], order: np.ndarray) -> Window:
    """Put ``documents`` one after another in the given ``order`` [documents]."""
    ordered = [documents[i] for i in order.tolist()]
    lengths = np.fromiter(map(len, ordered), dtype=np.int64, count=len(ordered))
    return Window(np.concatenate(ordered), np.cumsum(lengths))


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, one a row."""

    tokens_NL1: np.ndarray
    """int64 [N, L + 1]; inputs are all but the last, targets all but the first. Padding is end-of-document tokens."""

    targets_NL: np.ndarray
    """int64 [N, L]; ``IGNORED`` in padding and, under the document mask, where a new document begins."""

    document_ids_NL: np.ndarray | None
    """int32 [N, L]: number of the input's document in its row, from 0; padding counts as one. None without mask."""


class SequenceBuffer:
    """Builds ``count`` sequences of ``length`` targets each; rows that get no tokens are padding as a whole."""

    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self._tokens_NL1 = np.full((count, length + 1), pad_id, dtype=np.int64)
        self._begins_NL1 = np.zeros((count, length + 1), dtype=bool)
        self._filled_N = np.zeros(count, dtype=np.int64)

    def append(self, row: int, window: Window, start: int, stop: int) -> None:
        """Add tokens [start, stop) of ``window`` to a row."""
        filled = int(self._filled_N[row])
        self._tokens_NL1[row, filled : filled + stop - start] = window.tokens[start:stop]
        # Documents begin where others end, and where a window begins.
        first, last = np.searchsorted(window.ends, (start, stop), side="left")
        begins = window.ends[first:last] - start + filled
        self._begins_NL1[row, begins] = True
        self._begins_NL1[row, filled] |= start == 0
        self._filled_N[row] = filled + stop - start

    def finish(self, document_mask: bool) -> Sequences:
        """The sequences, with targets and document ids."""
        columns = np.arange(self._tokens_NL1.shape[1])
        self._begins_NL1 |= columns == self._filled_N[:, None]
        ignored_NL = columns[1:] >= self._filled_N[:, None]
        if document_mask:
            ignored_NL |= self._begins_NL1[:, 1:]
        targets_NL = np.where(ignored_NL, IGNORED, self._tokens_NL1[:, 1:])
        document_ids_NL = None
        if document_mask:
            self._begins_NL1[:, 0] = False
            document_ids_NL = np.cumsum(self._begins_NL1[:, :-1], axis=1, dtype=np.int32)
        return Sequences(self._tokens_NL1, targets_NL, document_ids_NL)
