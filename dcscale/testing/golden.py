"""Reads what the official DCFormer and DCPythia code computed, under this project's names.

A case is a folder with upstream's ``config.json``, its weights ``model.safetensors`` and ``io.safetensors``:
inputs, outputs, and gradients under ``grad.<upstream name>``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dcscale.config.schema import ModelConfig
from dcscale.convert.upstream import plan_import
from dcscale.convert.upstream_config import read_upstream

_GRADIENT = "grad."


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
    read = read_upstream(settings, gelu=gelu, local_keys=visible_keys)
    return _load(folder, read.config.model, prefix="")


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
    values = load_file(folder / "io.safetensors")
    gradients = [name for name in values if name.startswith(_GRADIENT) and name != "grad.x"]
    gradients = {prefix + name.removeprefix(_GRADIENT): values.pop(name) for name in gradients}
    weights = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return GoldenCase(config, _renamed(weights, config), _renamed(gradients, config), values)


def _renamed(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What upstream's tensors give under this project's names; of a part of a model, or gradients, a part."""
    plan = plan_import(config, tensors, "original")
    recipes = [recipe for recipe in plan.recipes if tensors.keys() >= set(recipe.sources)]
    return {recipe.name: recipe.cook(lambda name, rows: tensors[name][slice(*(rows or (None,)))]) for recipe in recipes}
