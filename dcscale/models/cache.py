"""Decoding cache: keys, values and the key-side compose weights of earlier tokens.

The query-side compose weights (q1, q2, qg) are needed for new tokens only and are not kept. A layer with a window keeps
window - 1 positions, because the next query brings its own key; other layers keep all. Buffers have spare positions and
grow by a quarter, so that a long text is copied about four times in total, whatever the number of tokens per call.

Axes in names: B batch, T new tokens, S positions that these tokens may see (they are the last T of them), G key/value
heads, D head width, F frequencies of the rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcscale.ops import ComposeWeights, rope_table

_BY_KEY = [f"{stage}.{name}" for stage in ("pre", "post") for name in ("k1", "k2", "kg")]
MIN_SPARE = 64
"""Default minimum of spare positions of a new buffer."""
ROPE_AHEAD = 1024
"""Positions beyond those needed for which the rotary table is computed."""


class LayerCache:
    """Earlier positions of one layer: k (after qk-norm and RoPE) and v [B, S, G, D], and k1, k2 [B, S, R, H] and kg
    [B, S, H] of ``pre`` and ``post``, those that the model has.

    Args:
        window: number of keys that a query sees, including its own; None for all previous keys.
        min_spare: minimum number of spare positions of a new buffer.
        fuse: see :class:`DecodingCache`.
    """

    def __init__(self, window: int | None, *, min_spare: int = MIN_SPARE, fuse: bool = False):
        self.length = 0
        """Number of positions so far, including those that are no longer kept."""
        self.fuse = fuse
        self.fused: Any = None
        """The layer's :class:`dcscale.models.dcmha.FusedProjection`, which the layer makes when it needs it."""
        self._window, self._min_spare = window, min_spare
        self._buffers: dict[str, Tensor] = {}
        self._kinds: dict[str, tuple] = {}
        self._start = self._end = 0  # kept positions in the buffers: [start, end)

    @property
    def bytes(self) -> int:
        """Memory of the buffers, including spare positions."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def extend(
        self, k_BTGD: Tensor, v_BTGD: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None
    ) -> tuple[Tensor, Tensor, ComposeWeights | None, ComposeWeights | None]:
        """Appends new positions; returns k, v, pre and post with all positions S that the new queries may see.

        The result is valid until the next call.

        Raises:
            ValueError: batch size, shapes, dtypes or device differ from those of earlier calls.
        """
        none = ComposeWeights()
        by_key = [*(pre or none)[3:], *(post or none)[3:]]
        # The weights as one tensor [B, T, J, H], where J stacks their ranks: six small copies would take longer.
        parts = [x.unsqueeze(2) if x.dim() == 3 else x for x in by_key if x is not None]
        new = {"k": k_BTGD, "v": v_BTGD}
        if parts:
            new[" + ".join(name for name, x in zip(_BY_KEY, by_key) if x is not None)] = torch.cat(parts, dim=2)
        self._check(new)
        k_BSGD, v_BSGD, *weights_BSJH = self._append(new).values()
        if parts:
            seen = iter(weights_BSJH[0].split_with_sizes([part.shape[2] for part in parts], dim=2))
            by_key = [x if x is None else next(seen) if x.dim() == 4 else next(seen).squeeze(2) for x in by_key]
        pre = None if pre is None else ComposeWeights(*pre[:3], *by_key[:3])
        post = None if post is None else ComposeWeights(*post[:3], *by_key[3:])
        return k_BSGD, v_BSGD, pre, post

    def _append(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The kept and the new positions of every tensor; afterwards at most ``window`` - 1 positions are kept."""
        tokens = new["k"].shape[1]
        self.length += tokens
        if self._buffers and self._end + tokens <= self._buffers["k"].shape[1]:
            # There is space: write in place. A window moves its start, without copying.
            for name, x in new.items():
                self._buffers[name][:, self._end : self._end + tokens] = x
            self._end += tokens
            seen = {name: buffer[:, self._start : self._end] for name, buffer in self._buffers.items()}
        else:
            # Move what is kept to a new, larger buffer. This call's queries may see more than is kept after it.
            seen = new
            if self._end > self._start:
                seen = {
                    name: torch.cat([self._buffers[name][:, self._start : self._end], x], dim=1)
                    for name, x in new.items()
                }
            keep = self._max_kept(seen["k"].shape[1])
            for name, x in seen.items():
                shape = (x.shape[0], keep + max(keep // 4, self._min_spare), *x.shape[2:])
                # The memory order that ops/compose/decode.py wants: k, v [B, G, S, D], weights [B, J, H, S].
                order = (0, 2, 1, 3) if name in ("k", "v") else (0, 2, 3, 1)
                buffer = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
                buffer[:, :keep] = x[:, x.shape[1] - keep :]
                self._buffers[name] = buffer
            self._start, self._end = 0, keep
        self._start = self._end - self._max_kept(self._end - self._start)
        return seen

    def _max_kept(self, positions: int) -> int:
        """How many of ``positions`` a later query may see."""
        return positions if self._window is None else min(positions, self._window - 1)

    def _check(self, new: dict[str, Tensor]) -> None:
        got = {name: (x.shape[:1], x.shape[2:], x.dtype, x.device) for name, x in new.items()}
        held = self._kinds = self._kinds or got
        if held != got:
            held, got = (
                ", ".join(
                    f"{name} [{', '.join(map(str, (*batch, 'S', *rest)))}] {dtype} on {device}"
                    for name, (batch, rest, dtype, device) in kinds.items()
                )
                for kinds in (held, got)
            )
            raise ValueError(
                f"the cache holds {held}, but the new tensors are {got}: a cache can only be used with the model and "
                f"the batch that it was first used with; create a new one"
            )


class DecodingCache:
    """Earlier tokens of a batch, which :meth:`DCFormer.forward` appends to. Created by :meth:`DCFormer.new_cache`.

    A row's positions count from its first token after the padding, and its tokens do not see the padding, so each row
    gets the same results as if it were alone.

    Args:
        windows: number of keys that a query sees, by layer.
        padding: number of padding tokens on the left of each row, for rows of different lengths; None for no padding.
        device: device of the new tokens.
        min_spare: see :class:`LayerCache`.
        fuse: keep a copy of the weights of q, k, v and compose's projection as one matrix a layer, which makes calls
            with few tokens faster. It takes the memory of those weights, and time to make.

    Raises:
        ValueError: ``padding`` is empty or negative.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        padding: Sequence[int] | None,
        device: torch.device,
        *,
        min_spare: int = MIN_SPARE,
        fuse: bool = False,
    ):
        if padding is not None and min(padding, default=-1) < 0:
            raise ValueError(f"padding is {list(padding)}, but must list an integer of at least 0 for each row")
        self.layers = [LayerCache(window, min_spare=min_spare, fuse=fuse) for window in windows]
        self.padding_B = None if padding is None else torch.tensor(padding, dtype=torch.int64, device=device)
        self._max_padding = 0 if padding is None else max(padding)
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of positions so far, including padding.

        Raises:
            RuntimeError: the layers disagree.
        """
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1:
            raise RuntimeError(
                f"the cache's layers have seen {sorted(lengths)} positions, because an earlier call failed: create a "
                f"new cache"
            )
        return lengths.pop()

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        return sum(layer.bytes for layer in self.layers)

    def rope(
        self,
        tokens: int,
        dim: int,
        base: float,
        device: torch.device,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:func:`rope_table` for the next ``tokens`` positions: [T, F], or [B, T, F] if there is padding."""
        # One table from the earliest position of any row, computed for many calls at once.
        start = self.length
        end = start + tokens
        needed = end + self._max_padding
        if self._rope is None or len(self._rope[0]) < needed:
            self._rope = rope_table(needed + ROPE_AHEAD, dim, base, device, offset=-self._max_padding, scale=scale)
        cos, sin = self._rope
        if self.padding_B is None:
            return cos[start:end], sin[start:end]
        # Each row picks its positions.
        entry_BT = (self._max_padding - self.padding_B)[:, None] + torch.arange(start, end, device=device)
        return cos[entry_BT], sin[entry_BT]

    def document_ids(self, tokens: int, device: torch.device) -> Tensor | None:
        """int32 [B, length + tokens]: padding is a document of its own; None if there is none."""
        if self.padding_B is None:
            return None
        return (torch.arange(self.length + tokens, device=device) >= self.padding_B[:, None]).int()
