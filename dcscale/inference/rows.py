"""Token ids of different lengths as one batch.

Rows are filled up on the right: attention is causal, so that nothing that counts sees the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcscale.data import DataError

Told = Callable[[int, int], None]
"""Gets how much is done, and of how much."""


def padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    """int64 [B, T], T of the longest row."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises DataError for a token that the model does not have."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {largest}, but the model has {vocab_size} tokens: name the tokenizer "
            "that it was trained with by --tokenizer"
        )
