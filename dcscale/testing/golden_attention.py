"""Reads what the official code computed for one attention layer, and makes the inputs it was given.

Upstream's heads stand before the tokens, [B, N, T, D], and so do those of the files; here they stand after them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcscale.testing.attention import AttentionInputs

_UPSTREAM = {"q1": "qw1", "q2": "qw2", "qg": "qdd", "k1": "kw1", "k2": "kw2", "kg": "kdd"}
_STREAMS = ["q", "k", "v", "cot"]
_WEIGHT_STREAMS = [f"{stage}.{name}" for stage in ("pre", "post") for name in ("q1", "q2", "k1", "k2", "qg", "kg")]
_FIRST_WEIGHT_STREAM = 10
_PROBE = {"seed": 424242, "stream": 99}


@dataclass
class GoldenAttention:
    """``stored``: results in float32, by the names of :meth:`AttentionInputs.run`, at the positions ``rows`` or at all.
    ``checksums``: of the float64 results, by the same names; see :func:`checksums`.
    ``stored_inputs``: empty where only rows are stored."""

    inputs: AttentionInputs
    stored: dict[str, Tensor]
    rows: list[int] | None
    checksums: dict[str, dict[str, float]]
    stored_inputs: dict[str, Tensor]


def golden_names(folder: Path) -> list[str]:
    """The cases of a folder."""
    return [entry["name"] for entry in json.loads((folder / "index.json").read_text())]


def load_golden_attention(folder: Path, name: str) -> GoldenAttention:
    """The case ``name`` of a folder."""
    entry = next(e for e in json.loads((folder / "index.json").read_text()) if e["name"] == name)
    batch, heads, tokens, head_dim = (entry[axis] for axis in "BNTD")
    present = [weight for weight in _WEIGHT_STREAMS if entry[weight.split(".")[0]]]

    tensors = {}
    for stream, tensor in enumerate(_STREAMS):
        tensors[tensor] = _heads_after_tokens(_fill(entry["seed"], stream, (batch, heads, tokens, head_dim)))
    for stream, weight in enumerate(_WEIGHT_STREAMS, _FIRST_WEIGHT_STREAM):
        if weight in present:
            tensors[weight] = _weight(entry["seed"], stream, weight[-1], (batch, tokens, heads))
    inputs = AttentionInputs(tensors, tensors.pop("cot"), {"window": entry["window"]})

    file = load_file(folder / f"{name}.safetensors")
    stored_names = {"out": "o", **{tensor: f"d{_upstream(tensor)}" for tensor in ["q", "k", "v", *present]}}
    suffix = "" if entry["rows"] is None else ".rows"
    stored, stored_inputs = {}, {}
    for ours, theirs in stored_names.items():
        stored[ours] = _heads_after_tokens(file[theirs + suffix]) if "." not in ours else file[theirs + suffix]
        if entry["rows"] is None and ours != "out":
            original = file[_upstream(ours)]
            stored_inputs[ours] = _heads_after_tokens(original) if "." not in ours else original
    sums = {ours: entry["checksums"][theirs] for ours, theirs in stored_names.items()}
    return GoldenAttention(inputs, stored, entry["rows"], sums, stored_inputs)


def checksums(name: str, result: Tensor) -> dict[str, float]:
    """The three numbers that the index holds of a float64 result, computed in upstream's layout."""
    if "." not in name:
        result = result.transpose(1, 2)
    probe = _fill(_PROBE["seed"], _PROBE["stream"], tuple(result.shape))
    return {
        "sum_abs": result.abs().sum().item(),
        "probe": (result * probe).sum().item(),
        "max_abs": result.abs().max().item(),
    }


def _upstream(name: str) -> str:
    stage, _, weight = name.partition(".")
    return f"{stage}_{_UPSTREAM[weight]}" if weight else name


def _heads_after_tokens(x_BNTD: Tensor) -> Tensor:
    return x_BNTD.transpose(1, 2)


def _weight(seed: int, stream: int, kind: str, shape: tuple[int, int, int]) -> Tensor:
    batch, tokens, heads = shape
    if kind == "g":
        return (_fill(seed, stream, shape) / 2).clamp(-0.96875, 0.96875)
    weight = _fill(seed, stream, (batch, tokens, 2, heads))
    return weight * 2.0 ** round(float(np.log2(0.5 / np.sqrt(heads)))) if kind == "2" else weight


def _fill(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """About N(0, 1) in multiples of 1/32, below 3.5: a hash of the index, of which four bytes are added up."""
    with np.errstate(over="ignore"):
        bits = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(6364136223846793005)
        bits += np.uint64(seed) * np.uint64(1442695040888963407) + np.uint64(stream) * np.uint64(3935559000370003845)
        bits += np.uint64(1013904223)
        for _ in range(2):
            bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            bits ^= bits >> np.uint64(29)
    total = sum(((bits >> np.uint64(shift)) & np.uint64(255)).astype(np.float64) for shift in (8, 20, 36, 52))
    return torch.from_numpy((np.round((total - 510.0) / 147.8 * 32) / 32).reshape(shape))
