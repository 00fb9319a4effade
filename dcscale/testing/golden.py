"""Reads what the official DCFormer and DCPythia code computed, under this project's names.

A case is a folder with upstream's ``config.json``, its weights ``model.safetensors`` and ``io.safetensors``:
inputs, outputs, and gradients under ``grad.<upstream name>``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dcscale.config.schema import ComposeConfig, ModelConfig

_GRADIENT = "grad."
_REDUNDANT = ("dw_m", "qkw_m", "pre_proj.w", "post_proj.w")
"""Merged copies of dw1, dd and qkw, and the static matrix that no model uses."""


@dataclass
class GoldenCase:
    """``weights`` and ``gradients`` by this project's names, ``values`` the other tensors by their own."""

    config: ModelConfig
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


def load_model_case(folder: Path, *, visible_keys: int, gelu: str) -> GoldenCase:
    """A case of a whole model. ``visible_keys`` of local layers and ``gelu`` are what the case's README states."""
    settings = json.loads((folder / "config.json").read_text())
    pattern = {None: "LG", "LGLL": "LGLL"}[settings["window_type"]]
    pythia = settings["model_type"] == "dcpythia"
    config = ModelConfig(
        vocab_size=settings["vocab_size"],
        layers=settings["n_layer"],
        dim=settings["dim"],
        heads=settings["n_head"],
        kv_heads=settings["n_local_heads"],
        head_dim=settings["head_dim"],
        ffn="gelu" if pythia else "swiglu",
        ffn_dim=settings["intermediate_size"],
        multi_gate=settings["mgate_dim"] if settings.get("mgate") else None,
        norm="layernorm" if pythia else "rmsnorm",
        norm_eps=settings["norm_eps"],
        qk_norm=settings["use_qk_norm"],
        bias=settings.get("use_linear_bias", False),
        parallel_residual=settings.get("use_parallel_residual", False),
        rope_base=settings["rope_base"],
        rope_fraction=settings.get("rotary_pct", 1.0),
        windows=[visible_keys if kind == "L" else None for kind in pattern],
        compose=ComposeConfig(gelu=gelu),
    )
    return _load(folder, config, prefix="")


def load_attention_case(folder: Path) -> GoldenCase:
    """A case of one attention layer of upstream JAX: weights are named as those of block 0."""
    settings = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        layers=1,
        dim=settings["dim"],
        heads=settings["n_head"],
        head_dim=settings["head_dim"],
        qk_norm=settings["use_qk_norm"],
        qk_norm_eps=settings["qk_norm_eps"],
        rope_base=settings["rope_base"],
        windows=[settings["window_size"]],
    )
    return _load(folder, config, prefix="layers.0.attention.")


def _load(folder: Path, config: ModelConfig, prefix: str) -> GoldenCase:
    case = GoldenCase(config, {}, {}, {})
    for name, tensor in load_file(folder / "model.safetensors").items():
        case.weights.update(_renamed(prefix + name, tensor, config))
    for name, tensor in load_file(folder / "io.safetensors").items():
        if name.startswith(_GRADIENT) and name != "grad.x":
            case.gradients.update(_renamed(prefix + name.removeprefix(_GRADIENT), tensor, config))
        else:
            case.values[name] = tensor
    return case


def _renamed(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Upstream's tensor ``name`` as this project has it: renamed, wqkv in three, without the axis of one group."""
    if name.endswith(_REDUNDANT):
        return {}
    for pattern, replacement in (
        (r"^tok_embeddings\.", "embedding."),
        (r"^layers\.", "blocks."),
        (r"_norm\.scale$", "_norm.weight"),
        (r"\.wo\.", ".out."),
        (r"\.feed_forward\.w1\.", ".ffn.up." if config.ffn == "gelu" else ".ffn.gate."),
        (r"\.feed_forward\.w2\.", ".ffn.down."),
        (r"\.feed_forward\.w3\.", ".ffn.up."),
        (r"\.feed_forward\.mg\.", ".ffn.multi_gate."),
        (r"\.dyn_w_proj\.", ".compose."),
    ):
        name = re.sub(pattern, replacement, name)
    if ".wqkv." in name:
        rows = [heads * config.head_dim for heads in (config.heads, *2 * [config.kv_heads or config.heads])]
        return {name.replace("wqkv", part): rows for part, rows in zip("qkv", tensor.split(rows))}
    if ".compose." in name:
        tensor = tensor.squeeze(0) if name.endswith("qkw") else tensor.squeeze(1)
    return {name: tensor}
