"""What a checkpoint's model computes: the logits of a few fixed tokens, saved with it and compared when it is loaded.

Sizes and checksums tell whether files are those that were written; this tells whether the model made of them is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dcscale.checkpoint.layout import PROBE, CheckpointError

ROWS, TOKENS = 2, 320
"""Longer than the windows of the presets, so that these count too."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference that passes for rounding, by the type computed in: ||a - b|| / ||a|| over all logits. The same
code on the same kind of device gives the same bits; another attention backend or another GPU does not."""


@dataclass(frozen=True)
class Probe:
    """Tokens, and what a model made of them. Axes: B rows, T tokens, V vocabulary."""

    input_ids_BT: Tensor
    """int64."""
    positions_B: Tensor
    """int64: the one token of each row whose logits count."""
    logits_BV: Tensor
    """float32."""
    dtype: torch.dtype
    """That the model computed in."""
    device: str
    """Kind of device it was computed on: ``cpu`` or ``cuda``."""

    def to_bytes(self) -> bytes:
        tensors = {"input_ids": self.input_ids_BT, "positions": self.positions_B, "logits": self.logits_BV}
        return save(tensors, {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device})

    def difference(self, other: Probe) -> str | None:
        """How ``other``, of the same tokens, differs by more than rounding, in words; None if it does not."""
        limit = max(LIMITS[self.dtype], LIMITS[other.dtype])
        old, new = self.logits_BV.double(), other.logits_BV.double()
        error = float((new - old).norm() / old.norm().clamp(min=1e-30))
        if error <= limit:  # false for NaN
            return None
        return (
            f"the logits of its probe batch differ by {error:.1e} of their norm, at most {limit:.0e} is rounding "
            f"({_kind(self)} there, {_kind(other)} here)"
        )

    def comparable(self, other: Probe) -> bool:
        """Whether the same type was used on the same kind of device, so that a difference is a fault."""
        return (self.dtype, self.device) == (other.dtype, other.device)


def _kind(probe: Probe) -> str:
    return f"{str(probe.dtype).removeprefix('torch.')} on {probe.device}"


def probe_tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] of new probes, always the same, and whose logits count: one far from the start, one near it."""
    ids = torch.randint(vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([TOKENS // 4, TOKENS - 1])


def take_probe(
    forward: Callable[..., Tensor], tokens: tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device
) -> Probe:
    """What ``forward``, a DCFormer's, makes of tokens and positions. Under ZeRO-3 all ranks must call it together."""
    ids, positions = tokens
    # A compiled model would be compiled anew for this shape.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = forward(ids.to(device), logits_at_B=positions.to(device))
    return Probe(ids, positions, logits.float().cpu(), dtype, device.type)


def read_probe(checkpoint: Path) -> Probe | None:
    """The probe of a checkpoint, or None: those of earlier versions and converted models have none.

    Raises:
        CheckpointError: it is there and cannot be read.
    """
    path = checkpoint / PROBE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            ids, positions, logits = (file.get_tensor(name) for name in ("input_ids", "positions", "logits"))
            said = file.metadata() or {}
        types = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
        return Probe(ids, positions, logits, types[said["dtype"]], said["device"])
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def check_model(forward: Callable[..., Tensor], checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Compares a loaded model with the probe of its checkpoint, if that has one and the type has a limit.

    Raises:
        CheckpointError: the model computes something else. With another type or kind of device it is only a warning.
    """
    saved = read_probe(checkpoint)
    if saved is None or dtype not in LIMITS:
        return
    here = take_probe(forward, (saved.input_ids_BT, saved.positions_B), dtype, device)
    if problem := saved.difference(here):
        text = f"{checkpoint}: the model does not compute what it did when it was saved: {problem}"
        if saved.comparable(here):
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=2)
