"""Decoding cache: keys, values and the key-side compose weights of earlier tokens.

The query-side compose weights (q1, q2, qg) are needed for new tokens only and are not kept. A layer with a window keeps
window - 1 positions, because the next query brings its own key; other layers keep all. Buffers have spare positions and
grow by a quarter, so that a long text is copied about four times in total, whatever the number of tokens per call.

Axes in names: B batch, T new tokens, S positions that these tokens may see (they are the last T of them), G key/value
heads, D head width, F frequencies of the rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcscale.ops import ComposeWeights, rope_table

_KEY_SIDE = ("k1", "k2", "kg")
MIN_SPARE = 64
"""Default minimum of spare positions of a new buffer."""


class LayerCache:
    """Earlier positions of one layer: k (after qk-norm and RoPE) and v [B, S, G, D], and k1, k2 [B, S, R, H] and kg
    [B, S, H] of ``pre`` and ``post``, those that the model has.

    Args:
        window: number of keys that a query sees, including its own; None for all previous keys.
        min_spare: minimum number of spare positions of a new buffer.
    """

    def __init__(self, window: int | None, *, min_spare: int = MIN_SPARE):
        self.length = 0
        """Number of positions so far, including those that are no longer kept."""
        self._window, self._min_spare = window, min_spare
        self._buffers: dict[str, Tensor] = {}
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
        new = {"k": k_BTGD, "v": v_BTGD}
        for stage, weights in (("pre", pre), ("post", post)):
            if weights is not None:
                new |= {f"{stage}.{name}": x for name, x in weights.tensors().items() if name in _KEY_SIDE}
        self._check(new)
        seen = self._append(new)
        pre, post = (
            None if weights is None else weights._replace(**{name: seen.get(f"{stage}.{name}") for name in _KEY_SIDE})
            for stage, weights in (("pre", pre), ("post", post))
        )
        return seen["k"], seen["v"], pre, post

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
                buffer = x.new_empty(x.shape[0], keep + max(keep // 4, self._min_spare), *x.shape[2:])
                buffer[:, :keep] = x[:, x.shape[1] - keep :]
                self._buffers[name] = buffer
            self._start, self._end = 0, keep
        self._start = self._end - self._max_kept(self._end - self._start)
        return seen

    def _max_kept(self, positions: int) -> int:
        """How many of ``positions`` a later query may see."""
        return positions if self._window is None else min(positions, self._window - 1)

    def _check(self, new: dict[str, Tensor]) -> None:
        held, got = (
            {name: (x.shape[:1], x.shape[2:], x.dtype, x.device) for name, x in tensors.items()}
            for tensors in (self._buffers, new)
        )
        if held and held != got:
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
    ):
        if padding is not None and min(padding, default=-1) < 0:
            raise ValueError(f"padding is {list(padding)}, but must list an integer of at least 0 for each row")
        self.layers = [LayerCache(window, min_spare=min_spare) for window in windows]
        self.padding_B = None if padding is None else torch.tensor(padding, dtype=torch.int64, device=device)
        self._max_padding = 0 if padding is None else max(padding)

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
        # One table from the earliest position of any row. With padding, each row picks its positions from it.
        first = self.length - self._max_padding
        cos, sin = rope_table(self._max_padding + tokens, dim, base, device, offset=first, scale=scale)
        if self.padding_B is None:
            return cos, sin
        entry_BT = (self._max_padding - self.padding_B)[:, None] + torch.arange(tokens, device=device)
        return cos[entry_BT], sin[entry_BT]

    def document_ids(self, tokens: int, device: torch.device) -> Tensor | None:
        """int32 [B, length + tokens]: padding is a document of its own; None if there is none."""
        if self.padding_B is None:
            return None
        return (torch.arange(self.length + tokens, device=device) >= self.padding_B[:, None]).int()
