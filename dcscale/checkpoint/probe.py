"""Probe of a checkpoint: logits of a few fixed tokens, saved with it and compared when it is loaded.

Sizes and checksums show that the files are unchanged. The probe shows that the model loaded from them still computes
the same function, for example after a change of the code.
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
"""Size of the probe batch. Longer than the sliding windows of the presets, so that these are tested too."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative difference ||a - b|| / ||a|| over all logits that rounding explains, by compute dtype. The same code
on the same kind of device reproduces the bits; another attention backend or another GPU does not."""


@dataclass(frozen=True)
class Probe:
    """Tokens and the logits of a model for them. Axes: B rows, T tokens, V vocabulary."""

    input_ids_BT: Tensor
    """int64."""
    positions_B: Tensor
    """int64: index of the token in each row whose logits are kept."""
    logits_BV: Tensor
    """float32."""
    dtype: torch.dtype
    """Dtype that the model computed in."""
    device: str
    """Type of the device: ``cpu`` or ``cuda``."""

    def to_bytes(self) -> bytes:
        """Content of ``probe.safetensors``."""
        tensors = {"input_ids": self.input_ids_BT, "positions": self.positions_B, "logits": self.logits_BV}
        return save(tensors, {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device})

    def difference(self, other: Probe) -> str | None:
        """Describes the difference to a probe of the same tokens if it is larger than rounding; else returns None."""
        limit = max(LIMITS[self.dtype], LIMITS[other.dtype])
        old, new = self.logits_BV.double(), other.logits_BV.double()
        error = float((new - old).norm() / old.norm().clamp(min=1e-30))
        if error <= limit:  # false for NaN
            return None
        return (
            f"the logits of its probe batch differ by {error:.1e} of their norm, rounding explains at most {limit:.0e} "
            f"(saved with {_kind(self)}, loaded with {_kind(other)})"
        )

    def comparable(self, other: Probe) -> bool:
        """Whether dtype and kind of device are the same, so that a difference is an error and not just suspicious."""
        return (self.dtype, self.device) == (other.dtype, other.device)


def _kind(probe: Probe) -> str:
    return f"{str(probe.dtype).removeprefix('torch.')} on {probe.device}"


def probe_tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    """The fixed batch of new probes: token ids [B, T], and the position [B] in each row whose logits are kept."""
    ids = torch.randint(vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([TOKENS // 4, TOKENS - 1])  # one position early in its row, one at the end


def take_probe(
    forward: Callable[..., Tensor], tokens: tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device
) -> Probe:
    """Computes the probe of a model. Under ZeRO-3 all ranks must call it together.

    Args:
        forward: forward of a DCFormer.
        tokens: token ids and positions, as :func:`probe_tokens` returns them.
        dtype: dtype that ``forward`` computes in.
        device: device of the model.
    """
    ids, positions = tokens
    # torch.compile would compile the blocks once more for this shape.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = forward(ids.to(device), logits_at_B=positions.to(device))
    return Probe(ids, positions, logits.float().cpu(), dtype, device.type)


def read_probe(checkpoint: Path) -> Probe | None:
    """The probe of a checkpoint, or None if there is none: converted models have none.

    Raises:
        CheckpointError: the file exists but cannot be read.
    """
    path = checkpoint / PROBE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            ids, positions, logits = (file.get_tensor(name) for name in ("input_ids", "positions", "logits"))
            metadata = file.metadata() or {}
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
        return Probe(ids, positions, logits, dtypes[metadata["dtype"]], metadata["device"])
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def check_model(forward: Callable[..., Tensor], checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Compares a loaded model with the probe of its checkpoint, if there is one and ``LIMITS`` has the dtype.

    Warns if the logits differ with another dtype or kind of device than they were saved with.

    Raises:
        CheckpointError: the logits differ with the same dtype and kind of device.
    """
    saved = read_probe(checkpoint)
    if saved is None or dtype not in LIMITS:
        return
    loaded = take_probe(forward, (saved.input_ids_BT, saved.positions_B), dtype, device)
    if problem := saved.difference(loaded):
        text = f"{checkpoint}: the loaded model computes other logits than when it was saved: {problem}"
        if saved.comparable(loaded):
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=2)
