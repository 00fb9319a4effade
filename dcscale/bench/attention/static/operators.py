"""What torch's own operators move: packing of weights, copies, conversions. No triton, so that it works on any code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcscale.bench.attention.static.cost import Traffic


class TorchOperators(TorchDispatchMode):
    """Hands on the bytes that each operator reads and writes, but for views and new memory.

    Args:
        note: is called for each, in order.
        ignored: names of operators that are counted elsewhere.
    """

    _moving_nothing = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")
    _overwriting = ("copy_", "zero_", "fill_", "zeros_like", "new_zeros")

    def __init__(self, note: Callable[[Traffic], None], ignored: tuple[str, ...] = ()):
        super().__init__()
        self.note, self.ignored = note, (*self._moving_nothing, *ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in self.ignored:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            # What is overwritten, or only has the right shape, comes first and is not read.
            read = inputs[1:] if name in self._overwriting else inputs
            self.note(Traffic(read=sum(x.nbytes for x in read), written=out.nbytes))
        return out
