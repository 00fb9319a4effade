"""Plain Transformers of the transformers library, converted to a DCFormer that computes the same.

Settings are those of transformers' classes LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig and GPTNeoXConfig, in
the layouts of versions 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``). A setting that changes what
the network computes is either translated or refused.

The weights of compose are created here so that compose starts as the identity and can still learn ("upcycling", a term
of Komatsuzaki et al., arXiv 2212.05055, for mixtures of experts). The gates' dd and the half of qkw that makes w2 are
zero, so each branch adds exactly q2^T (q1 x) = 0 and a gate of tanh(0) = 0. dw1 and the half of qkw that makes w1 are
drawn as for a new model (:mod:`dcscale.models.init`). In the first step dd and the w2 half get gradients, because q1 x
is not zero; from the second step on dw1 and the w1 half do too.

Letters: E model width, H heads, D head width, R rank.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.config import Config
from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.settings import check_known
from dcscale.convert.tensor_files import WEIGHT_DTYPES, open_tensors
from dcscale.convert.tensor_map import (
    DroppedTensor,
    Format,
    Imported,
    Plan,
    Source,
    TensorRule,
    check_layer_count,
    checked_config,
    embeddings_are_tied,
    model_type_of,
    parameter_shapes,
    read_config_json,
)
from dcscale.models.init import initial_values

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gpt_neox": "GPT-NeoX"}
"""Name of the family by ``model_type``."""

SELECTABLE = ("attention", "backend", "scratch_mib", "windows", "compose")
"""Settings and sections of ``model`` that the user may choose: all others follow from the source's weights."""

_COMMON: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "original_max_position_embeddings": None,
    "quantization_config": None,
}
_LLAMA = {
    **_COMMON,
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
_QWEN = {**_LLAMA, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_KNOWN: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "head_dim": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": {**_QWEN, "head_dim": None},
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "mistral": {
        **_LLAMA,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
        "layer_types": None,
    },
    "gpt_neox": {
        **_COMMON,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout": 0.0,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
    },
}
"""Settings that are read, with transformers' defaults; None for those that have no default."""

# Values of hidden_act, by dcscale's model.ffn.
_ACTIVATIONS = {"swiglu": ("silu", "swish"), "gelu": ("gelu",)}
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}
"""dcscale's model.rope_scaling.kind, by transformers' rope_type."""
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Upcycled:
    """Translated settings of a plain Transformer.

    Attributes:
        config: of the DCFormer.
        biases: the parts of a layer that have biases in the source: some of qkv, out and ffn.
        notes: what the user should know.
    """

    config: Config
    biases: frozenset[str]
    notes: list[str]


def read_config(settings: Mapping[str, Any], *, tied: bool, overrides: Iterable[str] = ()) -> Upcycled:
    """Translates the settings of a plain Transformer, and adds those of compose.

    Args:
        tied: whether the output matrix is the embedding.
        overrides: ``key=value`` without ``model.``, for keys in ``SELECTABLE``.

    Raises:
        ConversionError: a setting is invalid or has no counterpart in dcscale; the message names it.
    """
    family = settings["model_type"]
    known = _KNOWN[family]
    check_known(settings, known)
    s = {**known, **{key: value for key, value in settings.items() if key in known}}
    _check(family, s)
    neox = family == "gpt_neox"
    heads, dim = s["num_attention_heads"], s["hidden_size"]
    biases = _biases(family, s)
    eps = s["layer_norm_eps"] if neox else s["rms_norm_eps"]
    source_windows = _windows(family, s)
    model = {
        "vocab_size": s["vocab_size"],
        "layers": s["num_hidden_layers"],
        "dim": dim,
        "heads": heads,
        "kv_heads": None if s.get("num_key_value_heads") in (None, heads) else s["num_key_value_heads"],
        "head_dim": None if s.get("head_dim") in (None, dim / heads) else s["head_dim"],
        "ffn": "gelu" if neox else "swiglu",
        "ffn_dim": s["intermediate_size"],
        "norm": "layernorm" if neox else "rmsnorm",
        "norm_eps": eps,
        "qk_norm": family == "qwen3",
        "qk_norm_eps": eps,
        "bias": bool(biases & {"out", "ffn"}),
        "qkv_bias": biases == {"qkv"},  # bias includes these
        "parallel_residual": neox and s["use_parallel_residual"],
        **_rope(family, s),
        "windows": source_windows,
        "tied_embeddings": tied,
    }
    overrides = list(overrides)
    refused = [text for text in overrides if text.partition("=")[0].split(".")[0] not in SELECTABLE]
    if refused:
        raise ConversionError(
            f"--model {', '.join(refused)}: only {', '.join(SELECTABLE[:-1])} and compose.* may be chosen; all other "
            "settings follow from the source's weights"
        )
    config = checked_config(
        model, s["max_position_embeddings"], f"its {FAMILIES[family]} config", (f"model.{text}" for text in overrides)
    )
    notes = _notes(settings, s, biases)
    if config.model.windows != source_windows:
        notes.append(
            f"windows are {config.model.windows} as requested, the source has {source_windows}: the logits differ from "
            "the source's for texts longer than a window"
        )
    return Upcycled(config, biases, notes)


def _check(family: str, s: Mapping[str, Any]) -> None:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = [
        f"{key} is {s[key]!r}, but must be an integer of at least 1"
        for key in (*sizes, "max_position_embeddings")
        if type(s[key]) is not int or s[key] < 1
    ]
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_parallel_residual", "use_sliding_window")
    problems += [
        f"{key} is {s[key]!r}, but must be true or false" for key in switches if type(s.get(key, False)) is not bool
    ]
    ffn = "gelu" if family == "gpt_neox" else "swiglu"
    if s["hidden_act"] not in _ACTIVATIONS[ffn]:
        allowed = " or ".join(map(repr, _ACTIVATIONS[ffn]))
        problems.append(f"hidden_act is {s['hidden_act']!r}, but dcscale's {ffn} only has {allowed}")
    for key in ("rope_parameters", "rope_scaling"):
        value = s[key] or {}
        if not isinstance(value, dict) or any(isinstance(part, (dict, list)) for part in value.values()):
            problems.append(f"{key} is {value!r}: only the same RoPE for all layers is supported")
    if s["rope_parameters"] and s["rope_scaling"] and s["rope_parameters"] != s["rope_scaling"]:
        # transformers would ignore the first, also its rope_theta.
        problems.append("rope_parameters and rope_scaling are both set, and differ: leave one out")
    if s["original_max_position_embeddings"] is not None:
        problems.append("original_max_position_embeddings is set outside rope_parameters: move it into them")
    if s["quantization_config"] is not None:
        problems.append("quantization_config is set: quantized weights cannot be read")
    if problems:
        raise ConversionError("its config cannot be used: " + "; ".join(problems))


def _biases(family: str, s: Mapping[str, Any]) -> frozenset[str]:
    if family == "qwen2":  # fixed in transformers' code, not a setting
        return frozenset({"qkv"})
    attention = {"qkv", "out"} if s.get("attention_bias") else set()
    return frozenset(attention | ({"ffn"} if family == "gpt_neox" or s.get("mlp_bias") else set()))


def _windows(family: str, s: Mapping[str, Any]) -> list[int | None]:
    """Keys that a query sees, by layer, as the shortest repeated pattern; as in transformers, it includes its own."""
    window, types, layers = s.get("sliding_window"), s.get("layer_types"), s["num_hidden_layers"]
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(kind not in _ATTENTION_TYPES for kind in types):
            raise ConversionError(
                f"layer_types is {types!r}, but must list {' or '.join(_ATTENTION_TYPES)} for each of {layers} layers"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if family == "mistral" and not all(sliding):
            raise ConversionError(f"layer_types is {types!r}: transformers' Mistral has the same window in every layer")
        if family != "mistral" and any(sliding) and not s["use_sliding_window"]:
            raise ConversionError(f"layer_types is {types!r}, but use_sliding_window is false: change one of them")
    elif family == "mistral":
        sliding = [window is not None] * layers
    elif s.get("use_sliding_window"):
        if type(s["max_window_layers"]) is not int:
            raise ConversionError(f"max_window_layers is {s['max_window_layers']!r}, but must be an integer")
        sliding = [window is not None and layer >= s["max_window_layers"] for layer in range(layers)]
    else:
        sliding = [False] * layers
    if any(sliding) and (type(window) is not int or window < 1):
        raise ConversionError(f"sliding_window is {window!r}, but layers need it: it must be an integer of at least 1")
    windows = [window if local else None for local in sliding]
    # The shortest period: dcscale repeats model.windows over the layers.
    return next(
        windows[:period]
        for period in range(1, layers + 1)
        if all(windows[layer] == windows[layer % period] for layer in range(layers))
    )


def _rope(family: str, s: Mapping[str, Any]) -> dict[str, Any]:
    given = s["rope_scaling"] or s["rope_parameters"] or {}
    base, fraction = (
        ("rotary_emb_base", "rotary_pct") if family == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    )
    # Early versions called rope_type type.
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise ConversionError(f"its RoPE is of type {kind!r}: dcscale only has {', '.join(_ROPE_TYPES)}")
    rotated = given.get("partial_rotary_factor", s[fraction])
    if family != "gpt_neox" and rotated != 1:
        raise ConversionError(
            f"partial_rotary_factor is {rotated!r}: transformers' {FAMILIES[family]} rotates all dimensions of a head"
        )
    if unknown := [f"{key}={value!r}" for key, value in given.items() if not (value is None or key in _ROPE_KEYS)]:
        raise ConversionError(f"its RoPE has settings that dcscale does not know: {', '.join(unknown)}")
    scaling: dict[str, Any] = {"kind": _ROPE_TYPES[kind]}
    if kind != "default":
        scaling["factor"] = _required(given, "factor", kind)
    if kind == "llama3":
        scaling |= {key: _required(given, key, kind) for key in ("low_freq_factor", "high_freq_factor")}
        scaling["original_length"] = given.get("original_max_position_embeddings", s["max_position_embeddings"])
    return {
        "rope_base": given.get("rope_theta", s[base]),
        "rope_fraction": rotated,
        "rope_scaling": scaling,
    }


def _required(given: Mapping[str, Any], key: str, kind: str) -> Any:
    if key not in given:
        raise ConversionError(f"its RoPE of type {kind!r} has no {key}: {dict(given)!r}")
    return given[key]


def _notes(settings: Mapping[str, Any], s: Mapping[str, Any], biases: frozenset[str]) -> list[str]:
    notes = []
    # dcscale has one switch for the biases of all three parts, and one for qkv alone.
    added = sorted({"qkv", "out", "ffn"} - biases) if biases & {"out", "ffn"} else []
    if added:
        notes.append(f"biases of {' and '.join(added)}, which the source does not have, start at zero")
    dropouts = [f"{key}={s[key]}" for key in ("attention_dropout", "hidden_dropout") if s.get(key)]
    if dropouts:
        notes.append(f"dcscale has no dropout: {', '.join(dropouts)} is ignored")
    if settings.get("auto_map"):
        notes.append(
            "auto_map names code of its own, which is not run: the network is transformers' own of this family"
        )
    return notes


# Transformers' names of dcscale's modules; {} is the layer.
_LLAMA_NAMES = {
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
_NEOX_NAMES = {
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


def source_modules(family: str, names: Collection[str]) -> Mapping[str, str]:
    """Names of the source's modules, with {} for the layer, by part, such as ``output`` or ``attention.q``."""
    if family != "gpt_neox":
        return _LLAMA_NAMES
    # Version 5 of transformers calls the output matrix lm_head, as in all other families.
    return {**_NEOX_NAMES, "output": "lm_head"} if "lm_head.weight" in names else _NEOX_NAMES


def plan_upcycle(
    config: ModelConfig,
    modules: Mapping[str, str],
    biases: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    seed: int,
) -> Plan:
    """The plan that makes a model of ``config`` from a plain Transformer.

    Args:
        modules: names of the source's modules, as :func:`source_modules` returns them.
        biases: parts of qkv, out and ffn that have biases in the source.
        dtypes: of the source's tensors, by name.
        seed: of the new compose weights.
    """
    rules: list[TensorRule] = []
    expected: dict[str, tuple[int, ...]] = {}
    # New tensors have the type of the source's tensors; if there are several, one that holds the values of all.
    dtype = functools.reduce(
        torch.promote_types,
        [dtype for dtype in dict.fromkeys(dtypes.values()) if dtype in WEIGHT_DTYPES] or [torch.float32],
    )
    for name, shape in parameter_shapes(config).items():
        if ".compose." in name:
            rules.append(_new_compose(name, shape, config, dtype, seed))
            continue
        layer, part, kind = _PARAMETER.fullmatch(name).groups()
        if kind == "bias" and not _has_bias(part, biases):
            how = "zero: the source has none"
            rules.append(TensorRule(name, (), how, make=functools.partial(torch.zeros, shape, dtype=dtype)))
            continue
        source = f"{modules[part].format(layer)}.{kind}"
        fused = modules["attention.q"] == modules["attention.k"]
        if fused and part in ("attention.q", "attention.k", "attention.v"):
            expected[source] = (3 * shape[0], *shape[1:])
            number = "qkv".index(part[-1])
            how = f"the {('query', 'key', 'value')[number]} rows of each head"
            rules.append(TensorRule(name, (source,), how, make=functools.partial(_split_fused, config.heads, number)))
        else:
            expected[source] = shape
            rules.append(TensorRule(name, (source,)))
    dropped = {name: DroppedTensor("a mask or a table of RoPE") for name in dtypes if _BUFFERS.fullmatch(name)}
    if config.tied_embeddings:
        source = f"{modules['output']}.weight"
        dropped[source] = DroppedTensor("the embedding is also the output matrix")
        expected[source] = (config.vocab_size, config.dim)
    return Plan(rules, expected, dropped)


def _has_bias(part: str, biases: Collection[str]) -> bool:
    """Whether the source has a bias in this part, for a part that has one in dcscale; LayerNorm always has."""
    if part.endswith("norm"):
        return True
    if part.startswith("ffn."):
        return "ffn" in biases
    return ("out" if part == "attention.out" else "qkv") in biases


def _split_fused(heads: int, number: int, fused: Tensor) -> Tensor:
    """The query (0), key (1) or value (2) rows [H*D, ...] of GPT-NeoX's fused matrix, whose rows are [H, 3, D]."""
    return fused.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1)


def _new_compose(name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int) -> TensorRule:
    """Creates a tensor of compose, so that compose is the identity."""
    kind = name.rpartition(".")[2]

    def make() -> Tensor:
        if kind == "dd":
            return torch.zeros(shape, dtype=dtype)
        values = initial_values(name, torch.Size(shape), config, seed)
        if kind == "qkw":
            values[:, :, config.compose.rank :] = 0  # [C, K, 2R, H]: the last R rows make w2
        return values.to(dtype)

    how = {
        "dd": "zero: gates are 0",
        "qkw": f"new, seed {seed}; zero in the half that makes w2, so that compose is the identity",
        "dw1": f"new, seed {seed}",
    }
    return TensorRule(name, (), how[kind], make=make)


def _detect(path: Path) -> Source | None:
    settings = read_config_json(path)
    family = model_type_of(settings, FAMILIES)
    if family is None:
        return None
    return Source("transformers", path, f"{FAMILIES[family]} folder {path}, of transformers", settings)


def _load(source: Source, seed: int = 0, model: Iterable[str] = ()) -> Imported:
    """See ``Format.load``. ``seed``: of the compose weights. ``model``: overrides, see :func:`read_config`."""
    files, settings = open_tensors(source.folder), source.settings
    notes: list[str] = []
    family = settings["model_type"]
    check_layer_count("num_hidden_layers", settings, files)
    modules = source_modules(family, files.shapes)
    embedding, output = (f"{modules[part]}.weight" for part in ("embedding", "output"))
    tied = embeddings_are_tied(settings, files, embedding, output, notes)
    read = read_config(settings, tied=tied, overrides=model)
    plan = plan_upcycle(read.config.model, modules, read.biases, files.dtypes, seed)
    if read.config.model.attention == "dcmha":
        notes.append("compose starts as the identity")
    return Imported(files, read.config, plan, [*notes, *read.notes])


FORMAT = Format(
    name="transformers",
    looks_for=f"config.json with model_type {', '.join(FAMILIES)} (transformers)",
    detect=_detect,
    load=_load,
    options=("seed", "model"),
)
