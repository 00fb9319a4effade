"""Which keys a query sees: a band of positions around its own, and of those the keys of its document.

Positions count from the first key of a call; its query i is at position ``query_offset + i``. Where the two sequences
are unrelated (cross attention) there is neither causality nor a window, so every query sees every key.

Axes in names: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def band(window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """(behind, ahead): a query at position p sees the keys p - behind ... p + ahead; None for no limit.

    A window of W means the W keys up to and including the query's own position, and without causality as many after
    it: |t - s| < W.
    """
    behind = None if window is None else window - 1
    return behind, 0 if causal else behind


def key_range(first: int, last: int, window: int | None, causal: bool, keys: int) -> tuple[int, int]:
    """The smallest range [start, end) that holds every key visible to the queries at positions first..last.

    ``keys`` is the number of keys of the call.
    """
    behind, ahead = band(window, causal)
    start = 0 if behind is None else max(0, first - behind)
    return start, keys if ahead is None else min(keys, last + ahead + 1)


def most_keys(queries: range, chunk: int, window: int | None, causal: bool, keys: int) -> int:
    """Length of the longest :func:`key_range` among chunks of ``chunk`` of the queries at these positions."""
    ranges = (
        key_range(first, min(first + chunk, queries.stop) - 1, window, causal, keys)
        for first in range(queries.start, queries.stop, chunk)
    )
    return max(end - start for start, end in ranges)


def visible_pairs(length: int, window: int | None, causal: bool = True) -> int:
    """Number of (query, key) pairs with the key visible to the query, in one document of ``length`` tokens."""
    behind, ahead = (length - 1 if side is None else min(side, length - 1) for side in band(window, causal))
    # A full row of the band for each query, less the triangles that stick out before the first and after the last key.
    return length * (behind + 1 + ahead) - behind * (behind + 1) // 2 - ahead * (ahead + 1) // 2


def visible_keys(
    queries: range,
    keys: range,
    window: int | None,
    causal: bool,
    document_ids_BS: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The attention mask between two ranges of positions: True where the query sees the key.

    Args:
        queries: positions of the T queries.
        keys: positions of the S keys.
        window: as in :func:`band`.
        causal: as in :func:`band`.
        document_ids_BS: integers, one for each key of the whole call (indexed by position); None for one document.
        device: where the mask is created.

    Returns:
        bool [T, S], or [B, T, S] with document ids; None if every query sees every key, so that no mask is needed.
    """
    seen = None
    behind, ahead = band(window, causal)
    # Build only the parts of the mask that exclude anything: a key too far after the first query, or too far before the
    # last one.
    hides_later = ahead is not None and keys[-1] - queries[0] > ahead
    hides_earlier = behind is not None and queries[-1] - keys[0] > behind
    if hides_later or hides_earlier:
        distance_TS = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
            keys.start, keys.stop, device=device
        )
        seen = distance_TS >= -ahead
        if hides_earlier:
            seen &= distance_TS <= behind
    if document_ids_BS is not None:
        query_ids_BT = document_ids_BS[:, queries.start : queries.stop]
        key_ids_BS = document_ids_BS[:, keys.start : keys.stop]
        same_BTS = query_ids_BT[:, :, None] == key_ids_BS[:, None, :]
        seen = same_BTS if seen is None else same_BTS & seen
    return seen
