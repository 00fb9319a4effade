"""Which keys a query sees. Positions count from the first key; query i of a call is at position ``query_offset + i``.

Axes in names: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_range(first: int, last: int, window: int | None) -> tuple[int, int]:
    """The smallest range [start, end) with every key that queries at positions first..last may see.

    A window of W means the W keys up to and including the query's own position.
    """
    return (0 if window is None else max(0, first - window + 1)), last + 1


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, among ``length`` positions of one document."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def visible_keys(
    queries: range, keys: range, window: int | None, document_ids_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where the query at a position in ``queries`` sees the key at a position in ``keys``.

    bool, [T, S], or [B, T, S] with document ids; None where all see all.
    """
    seen = None
    causal = keys[-1] > queries[0]
    windowed = window is not None and keys[0] <= queries[-1] - window
    if causal or windowed:
        age_TS = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
            keys.start, keys.stop, device=device
        )
        seen = age_TS >= 0
        if windowed:
            seen &= age_TS < window
    if document_ids_BS is not None:
        query_ids_BT = document_ids_BS[:, queries.start : queries.stop]
        key_ids_BS = document_ids_BS[:, keys.start : keys.stop]
        same_BTS = query_ids_BT[:, :, None] == key_ids_BS[:, None, :]
        seen = same_BTS if seen is None else same_BTS & seen
    return seen
