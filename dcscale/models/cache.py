"""What attention needs of earlier tokens to go on from them: keys, values, and the compose weights by key.

The compose weights by query (q1, q2, qg) belong to new tokens only and are not kept. A layer with a window keeps
window - 1 positions, as the next query brings its own key, and a few more until it moves them; other layers keep all.
Buffers have room for more than they hold and grow by a quarter, so a long text is copied about four times in all,
however many tokens it grew by at a time.

Axes in names: B batch, T new tokens, S positions that these tokens may see (they are the last T of them), G key/value
heads, D head width, F frequencies of the rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcscale.ops import ComposeWeights, rope_table

_BY_KEY = ("k1", "k2", "kg")
LEAST_ROOM = 64
"""Fewest positions that a buffer has room for beyond those it keeps, whenever it is made."""


class LayerCache:
    """The earlier positions of one layer: k (turned by RoPE, after qk-norm) and v [B, S, G, D], and of ``pre`` and
    ``post`` what is there of k1, k2 [B, S, R, H] and kg [B, S, H].

    ``window``: keys a query sees, itself included; None sees all before it.
    """

    def __init__(self, window: int | None):
        self.length = 0
        """Positions so far, kept or not."""
        self._window = window
        self._buffers: dict[str, Tensor] = {}
        self._start = self._end = 0  # of what is kept, in the buffers

    @property
    def bytes(self) -> int:
        """Memory of the buffers, room for later positions included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def extend(
        self, k_BTGD: Tensor, v_BTGD: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None
    ) -> tuple[Tensor, Tensor, ComposeWeights | None, ComposeWeights | None]:
        """Keep new positions; return k, v, pre and post with all positions S that a query at these may see.

        What is returned holds until the next call. Raises ValueError for tensors that do not continue those before.
        """
        new = {"k": k_BTGD, "v": v_BTGD}
        for stage, weights in (("pre", pre), ("post", post)):
            if weights is not None:
                new |= {f"{stage}.{name}": x for name, x in weights.tensors().items() if name in _BY_KEY}
        self._check(new)
        seen = self._append(new)
        pre, post = (
            None if weights is None else weights._replace(**{name: seen.get(f"{stage}.{name}") for name in _BY_KEY})
            for stage, weights in (("pre", pre), ("post", post))
        )
        return seen["k"], seen["v"], pre, post

    def _append(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = new["k"].shape[1]
        self.length += tokens
        if self._buffers and self._end + tokens <= self._buffers["k"].shape[1]:
            for name, x in new.items():
                self._buffers[name][:, self._end : self._end + tokens] = x
            self._end += tokens
            seen = {name: buffer[:, self._start : self._end] for name, buffer in self._buffers.items()}
        else:
            seen = new
            if self._end > self._start:
                seen = {
                    name: torch.cat([self._buffers[name][:, self._start : self._end], x], dim=1)
                    for name, x in new.items()
                }
            keep = self._most_kept(seen["k"].shape[1])
            for name, x in seen.items():
                buffer = x.new_empty(x.shape[0], keep + max(keep // 4, LEAST_ROOM), *x.shape[2:])
                buffer[:, :keep] = x[:, x.shape[1] - keep :]
                self._buffers[name] = buffer
            self._start, self._end = 0, keep
        self._start = self._end - self._most_kept(self._end - self._start)
        return seen

    def _most_kept(self, positions: int) -> int:
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
                f"the cache holds {held}, but is to go on with {got}: it goes on only with the model and the rows that "
                f"it began with; make a new one"
            )


class DecodingCache:
    """The earlier tokens of a batch of texts, for :meth:`DCFormer.forward`, which appends to it; made by
    :meth:`DCFormer.new_cache`.

    ``windows``: keys a query sees, by layer.
    ``padding``: how many of each row's first positions are padding, so that texts of different lengths end together;
    None for no padding. Nothing but padding sees padding, and a row's positions count from its first token after it,
    so a row gets the results that it would get alone.
    """

    def __init__(self, windows: Sequence[int | None], padding: Sequence[int] | None, device: torch.device):
        if padding is not None and min(padding, default=-1) < 0:
            raise ValueError(f"padding is {list(padding)}, but must have a number of 0 or more for each row")
        self.layers = [LayerCache(window) for window in windows]
        self.padding_B = None if padding is None else torch.tensor(padding, dtype=torch.int64, device=device)
        self._most_padding = 0 if padding is None else max(padding)

    @property
    def length(self) -> int:
        """Positions so far, padding included."""
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1:
            raise RuntimeError(
                f"the cache's layers have seen {sorted(lengths)} positions, as an earlier call failed halfway: "
                f"make a new one"
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
        """:func:`rope_table` for the next ``tokens`` positions: [T, F], or [B, T, F] where there is padding."""
        first = self.length - self._most_padding
        cos, sin = rope_table(self._most_padding + tokens, dim, base, device, offset=first, scale=scale)
        if self.padding_B is None:
            return cos, sin
        entry_BT = (self._most_padding - self.padding_B)[:, None] + torch.arange(tokens, device=device)
        return cos[entry_BT], sin[entry_BT]

    def document_ids(self, tokens: int, device: torch.device) -> Tensor | None:
        """int32 [B, length + tokens]: padding is a document of its own; None where there is none."""
        if self.padding_B is None:
            return None
        return (torch.arange(self.length + tokens, device=device) >= self.padding_B[:, None]).int()
