"""Which keys a query sees: causal, within the window, of the same document.

Positions count from the first key of a call; its query i is at position ``query_offset + i``.

Axes in names: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_range(first: int, last: int, window: int | None) -> tuple[int, int]:
    """The smallest range [start, end) that holds every key visible to the queries at positions first..last.

    A window of W means the W keys up to and including the query's own position; None means all of them.
    """
    return (0 if window is None else max(0, first - window + 1)), last + 1


def visible_pairs(length: int, window: int | None) -> int:
    """Number of (query, key) pairs with the key visible to the query, in one document of ``length`` tokens."""
    window = length if window is None else min(window, length)
    # The first ``window`` queries see 1, 2, ..., window keys, all later ones ``window`` keys.
    return window * (window + 1) // 2 + (length - window) * window


def visible_keys(
    queries: range, keys: range, window: int | None, document_ids_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """The attention mask between two ranges of positions: True where the query sees the key.

    Args:
        queries: positions of the T queries.
        keys: positions of the S keys.
        window: keys that a query sees, itself included; None for no limit.
        document_ids_BS: integers, one for each key of the whole call (indexed by position); None for one document.
        device: where the mask is created.

    Returns:
        bool [T, S], or [B, T, S] with document ids; None if every query sees every key, so that no mask is needed.
    """
    seen = None
    # Build only the parts of the mask that exclude anything: some key after the first query, or before the last
    # query's window.
    causal = keys[-1] > queries[0]
    windowed = window is not None and keys[0] <= queries[-1] - window
    if causal or windowed:
        distance_TS = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
            keys.start, keys.stop, device=device
        )
        seen = distance_TS >= 0
        if windowed:
            seen &= distance_TS < window
    if document_ids_BS is not None:
        query_ids_BT = document_ids_BS[:, queries.start : queries.stop]
        key_ids_BS = document_ids_BS[:, keys.start : keys.stop]
        same_BTS = query_ids_BT[:, :, None] == key_ids_BS[:, None, :]
        seen = same_BTS if seen is None else same_BTS & seen
    return seen
