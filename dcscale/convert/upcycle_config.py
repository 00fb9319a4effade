"""``config.json`` of plain Transformers, as the transformers library writes it, as settings of dcscale.

The settings are those of transformers' classes LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig and GPTNeoXConfig,
in the layouts of versions 4 and 5 (``rope_theta`` and ``rope_scaling``; ``rope_parameters``). A setting that changes
what the network computes is taken over or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dcscale.config import Config
from dcscale.convert.errors import ConversionError
from dcscale.convert.settings import checked_config

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gpt_neox": "GPT-NeoX"}
"""``model_type`` and the family's name."""

CHOSEN = ("attention", "backend", "scratch_mib", "windows", "compose")
"""Settings and sections of ``model`` that a person may choose: all else follows from the source's weights."""

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
"""Settings that are read, with what transformers takes where one is not there; None where there is no such value."""

WITHOUT_MEANING = {
    *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("is_decoder", "is_encoder_decoder", "classifier_dropout", "output_hidden_states", "output_attentions"),
    *("return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
}
"""Settings that do not change the logits of a causal language model."""

_ACTIVATIONS = {"swiglu": ("silu", "swish"), "gelu": ("gelu",)}
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}


@dataclass(frozen=True)
class Upcycled:
    """``config`` of the model, and the parts of the source's layers that have biases, of qkv, out and ffn."""

    config: Config
    biases: frozenset[str]
    notes: list[str]


def read_config(settings: Mapping[str, Any], *, tied: bool, overrides: Iterable[str] = ()) -> Upcycled:
    """What the settings of a plain Transformer mean, and compose beside them.

    Args:
        tied: whether the output matrix is the embedding.
        overrides: ``key=value`` below ``model``, of ``CHOSEN``.

    Raises:
        ConversionError: a setting has no counterpart in dcscale's network; the message names it.
    """
    family = settings["model_type"]
    known = _KNOWN[family]
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
        "qkv_bias": biases == {"qkv"},
        "parallel_residual": neox and s["use_parallel_residual"],
        **_rope(family, s),
        "windows": source_windows,
        "tied_embeddings": tied,
    }
    overrides = list(overrides)
    refused = [text for text in overrides if text.partition("=")[0].split(".")[0] not in CHOSEN]
    if refused:
        raise ConversionError(
            f"--model {', '.join(refused)}: only {', '.join(CHOSEN[:-1])} and compose.* may be chosen; all else "
            "follows from the source's weights"
        )
    config = checked_config(
        model, s["max_position_embeddings"], f"its {FAMILIES[family]} config", (f"model.{text}" for text in overrides)
    )
    notes = _notes(settings, s, biases)
    if config.model.windows != source_windows:
        notes.append(
            f"windows are {config.model.windows} as asked, the source has {source_windows}: other logits than the "
            "source's for texts that are longer"
        )
    return Upcycled(config, biases, notes)


def _check(family: str, s: Mapping[str, Any]) -> None:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = [
        f"{key} is {s[key]!r}, but must be a whole number from 1"
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
        problems.append(f"hidden_act is {s['hidden_act']!r}, but dcscale's {ffn} has {allowed} only")
    for key in ("rope_parameters", "rope_scaling"):
        value = s[key] or {}
        if not isinstance(value, dict) or any(isinstance(part, (dict, list)) for part in value.values()):
            problems.append(f"{key} is {value!r}: only one kind of RoPE for all layers can be expressed")
    if s["original_max_position_embeddings"] is not None:
        problems.append("original_max_position_embeddings is set outside rope_parameters: move it into them")
    if s["quantization_config"] is not None:
        problems.append("quantization_config is set: only weights that are not quantized are read")
    if problems:
        raise ConversionError("its config cannot be used: " + "; ".join(problems))


def _biases(family: str, s: Mapping[str, Any]) -> frozenset[str]:
    if family == "qwen2":
        return frozenset({"qkv"})
    attention = {"qkv", "out"} if s.get("attention_bias") else set()
    return frozenset(attention | ({"ffn"} if family == "gpt_neox" or s.get("mlp_bias") else set()))


def _windows(family: str, s: Mapping[str, Any]) -> list[int | None]:
    """Keys a query sees by layer, as the shortest pattern that repeats; transformers counts the query's own too."""
    window, types, layers = s.get("sliding_window"), s.get("layer_types"), s["num_hidden_layers"]
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(kind not in _ATTENTION_TYPES for kind in types):
            raise ConversionError(
                f"layer_types is {types!r}, but must list {' or '.join(_ATTENTION_TYPES)} for each of {layers} layers"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if family == "mistral" and not all(sliding):
            raise ConversionError(f"layer_types is {types!r}: transformers' Mistral has the same window in every layer")
    elif family == "mistral":
        sliding = [window is not None] * layers
    elif s.get("use_sliding_window"):
        if type(s["max_window_layers"]) is not int:
            raise ConversionError(f"max_window_layers is {s['max_window_layers']!r}, but must be a whole number")
        sliding = [window is not None and layer >= s["max_window_layers"] for layer in range(layers)]
    else:
        sliding = [False] * layers
    if any(sliding) and (type(window) is not int or window < 1):
        raise ConversionError(f"sliding_window is {window!r}, but layers need it: it must be a whole number from 1")
    windows = [window if local else None for local in sliding]
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
    # Version 5 may have the base in rope_parameters beside a rope_scaling of version 4.
    parameters = {**(s["rope_parameters"] or {}), **given}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise ConversionError(f"its RoPE is of type {kind!r}: dcscale has {', '.join(_ROPE_TYPES)} only")
    rotated = parameters.get("partial_rotary_factor", s[fraction])
    if family != "gpt_neox" and rotated != 1:
        raise ConversionError(
            f"partial_rotary_factor is {rotated!r}: transformers' {FAMILIES[family]} turns whole heads"
        )
    scaling: dict[str, Any] = {"kind": _ROPE_TYPES[kind]}
    if kind != "default":
        scaling["factor"] = _required(given, "factor", kind)
    if kind == "llama3":
        scaling |= {key: _required(given, key, kind) for key in ("low_freq_factor", "high_freq_factor")}
        scaling["original_length"] = given.get("original_max_position_embeddings", s["max_position_embeddings"])
    return {
        "rope_base": parameters.get("rope_theta", s[base]),
        "rope_fraction": rotated,
        "rope_scaling": scaling,
    }


def _required(given: Mapping[str, Any], key: str, kind: str) -> Any:
    if key not in given:
        raise ConversionError(f"its RoPE of type {kind!r} has no {key}: {dict(given)!r}")
    return given[key]


def _notes(settings: Mapping[str, Any], s: Mapping[str, Any], biases: frozenset[str]) -> list[str]:
    notes = []
    added = sorted({"qkv", "out", "ffn"} - biases) if biases & {"out", "ffn"} else []
    if added:
        notes.append(f"biases of {' and '.join(added)}, which the source does not have, begin at zero")
    dropouts = [f"{key}={s[key]}" for key in ("attention_dropout", "hidden_dropout") if s.get(key)]
    if dropouts:
        notes.append(f"dcscale has no dropout: {', '.join(dropouts)} is left out")
    unknown = [f"{key}={value!r}" for key, value in settings.items() if key not in s and key not in WITHOUT_MEANING]
    if unknown:
        notes.append(
            f"settings that transformers' code of this family does not read were left out: {', '.join(unknown)}"
        )
    return notes
