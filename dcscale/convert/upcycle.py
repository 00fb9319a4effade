"""Tensors of plain Transformers, as the transformers library names them, as a DCFormer that computes the same.

The weights of compose are made here so that it is the identity and yet learns ("upcycling", the term of Komatsuzaki et
al., arXiv 2212.05055, for mixtures of experts): the gates' dd and the half of qkw that makes w2 are zero, so each
branch adds q2^T (q1 x) = 0 and a gate tanh(0) = 0, exactly. dw1 and the half of qkw that makes w1 are drawn as for a
new model (:mod:`dcscale.models.init`). At the first step dd and the w2 half get gradients, as the latents q1 x are not
zero; from the second on dw1 and the w1 half do too.

Letters: E model width, H heads, D head width, R rank.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dcscale.config.schema import ModelConfig
from dcscale.convert.recipe import LeftOut, Plan, Recipe
from dcscale.convert.tensors import WEIGHT_DTYPES
from dcscale.convert.upstream import parameter_shapes
from dcscale.models.init import initial_values

_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "attention.q": "model.layers.{}.self_attn.q_proj",
    "attention.k": "model.layers.{}.self_attn.k_proj",
    "attention.v": "model.layers.{}.self_attn.v_proj",
    "attention.out": "model.layers.{}.self_attn.o_proj",
    "attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn.gate": "model.layers.{}.mlp.gate_proj",
    "ffn.up": "model.layers.{}.mlp.up_proj",
    "ffn.down": "model.layers.{}.mlp.down_proj",
}
_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "attention_norm": "gpt_neox.layers.{}.input_layernorm",
    "ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "attention.q": "gpt_neox.layers.{}.attention.query_key_value",
    "attention.k": "gpt_neox.layers.{}.attention.query_key_value",
    "attention.v": "gpt_neox.layers.{}.attention.query_key_value",
    "attention.out": "gpt_neox.layers.{}.attention.dense",
    "ffn.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "ffn.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
_BUFFERS = re.compile(
    r"(model|gpt_neox)\.(layers\.\d+\.(self_attn|attention)\.)?(rotary_emb\.inv_freq|bias|masked_bias)"
)
"""Masks and frequencies that old versions of transformers saved."""

_PARAMETER = re.compile(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)")


def source_module(part: str, family: str, names: Collection[str]) -> str:
    """Name of the source's module, with {} for the layer, that has a part such as ``output`` or ``attention.q``."""
    if family == "gpt_neox":
        # Version 5 of transformers calls it lm_head, as all others.
        return "lm_head" if part == "output" and "lm_head.weight" in names else _NEOX[part]
    return _LLAMA[part]


def plan_upcycle(
    config: ModelConfig, family: str, biases: Collection[str], dtypes: Mapping[str, torch.dtype], seed: int
) -> Plan:
    """The plan for a source of this family as a model of ``config``.

    Args:
        biases: of qkv, out and ffn, those that the source has.
        dtypes: of the source's tensors, by name.
        seed: of the compose weights.
    """
    recipes: list[Recipe] = []
    expected: dict[str, tuple[int, ...]] = {}
    # A new tensor has the type of the source's; where they are several, one that holds the values of all.
    dtype = functools.reduce(
        torch.promote_types,
        [dtype for dtype in dict.fromkeys(dtypes.values()) if dtype in WEIGHT_DTYPES] or [torch.float32],
    )
    for name, shape in parameter_shapes(config).items():
        if ".compose." in name:
            recipes.append(_fresh(name, shape, config, dtype, seed))
            continue
        layer, part, kind = _PARAMETER.fullmatch(name).groups()
        if kind == "bias" and not _has_bias(part, biases):
            how = "zero: the source has none"
            recipes.append(Recipe(name, (), how, make=functools.partial(torch.zeros, shape, dtype=dtype)))
            continue
        source = f"{source_module(part, family, dtypes).format(layer)}.{kind}"
        if family == "gpt_neox" and part in ("attention.q", "attention.k", "attention.v"):
            expected[source] = (3 * shape[0], *shape[1:])
            number = "qkv".index(part[-1])
            how = f"of each head's query, key and value, part {number}"
            recipes.append(Recipe(name, (source,), how, make=functools.partial(_of_fused, config.heads, number)))
        else:
            expected[source] = shape
            recipes.append(Recipe(name, (source,)))
    left_out = {name: LeftOut("a mask or a table of RoPE") for name in dtypes if _BUFFERS.fullmatch(name)}
    if config.tied_embeddings:
        source = f"{source_module('output', family, dtypes)}.weight"
        left_out[source] = LeftOut("the embedding is the output matrix too")
        expected[source] = (config.vocab_size, config.dim)
    return Plan(recipes, expected, left_out)


def _has_bias(part: str, biases: Collection[str]) -> bool:
    """Whether the source has a bias in a part of the model that has one here; LayerNorm always has."""
    if part.endswith("norm"):
        return True
    if part.startswith("ffn."):
        return "ffn" in biases
    return ("out" if part == "attention.out" else "qkv") in biases


def _of_fused(heads: int, number: int, fused: Tensor) -> Tensor:
    """Queries, keys or values [H*D, ...] of GPT-NeoX's rows, which are [H, 3, D]."""
    return fused.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1)


def _fresh(name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int) -> Recipe:
    """A tensor of compose at the identity."""
    kind = name.rpartition(".")[2]

    def make() -> Tensor:
        if kind == "dd":
            return torch.zeros(shape, dtype=dtype)
        values = initial_values(name, torch.Size(shape), config, seed)
        if kind == "qkw":
            values[:, :, config.compose.rank :] = 0
        return values.to(dtype)

    how = {
        "dd": "zero: gates of 0",
        "qkw": f"new, seed {seed}; zero where it makes w2, so that compose is the identity",
        "dw1": f"new, seed {seed}",
    }
    return Recipe(name, (), how[kind], make=make)
