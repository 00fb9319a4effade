"""Translates upstream's ``config.json`` of DCFormer and DCPythia to settings of dcscale, and back.

Upstream is Caiyun-AI/DCFormer. Settings that only control how its code runs (caches, chunks, checkpointing) are
ignored. Settings of dcscale that upstream's config does not have are written under the key ``dcscale``, which upstream
ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from dcscale.config import Config
from dcscale.config.schema import ComposeConfig, ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.settings import HARMLESS, check_known
from dcscale.convert.tensor_map import checked_config

FAMILIES = {"dcformer": "DCFormer", "dcpythia": "DCPythia"}
"""Name of the class by ``model_type``."""

# The defaults of upstream's config classes: a config.json may leave out settings that have them.
_DEFAULTS: dict[str, Any] = {
    "block_size": 2048,
    "vocab_size": 32000,
    "n_layer": 32,
    "n_head": 32,
    "n_local_heads": -1,
    "dim": 2560,
    "intermediate_size": None,
    "norm_eps": 1e-5,
    "use_dcmha": True,
    "use_qk_norm": False,
    "window_size": 256,
    "window_type": None,
    "query_wise": False,
    "tie_word_embeddings": False,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "dcformer": {"rope_base": 500000, "mgate": False, "mgate_dim": 44},
    "dcpythia": {"rope_base": 10000, "use_parallel_residual": True, "use_linear_bias": True, "rotary_pct": 0.25},
}
_READ_ELSEWHERE = ("head_dim", "use_sw", "dcscale")
_HARMLESS = HARMLESS | {"is_training", "prefill_pad", "q_chunk_size", "use_gradient_checkpointing"}
"""How upstream's code runs: caches, chunks, checkpointing."""

_PATTERNS = {"LG": "LG", "LGLL": "LGLL", "LGL6": "LGLLLLLL"}
"""Local (L) and global (G) layers of one period, by ``window_type``; null is LG."""

_WINDOW_OF_PATTERNS = 256
"""If ``window_type`` is set, upstream's code uses this as ``window_size``."""

_EXTRA_FIELDS = ("qk_norm_eps",)
"""Fields of ``model``, besides compose, that upstream's config does not have."""


@dataclass(frozen=True)
class UpstreamConfig:
    """``family`` is upstream's model_type, ``config`` the same model in dcscale, ``notes`` what the user should
    know."""

    family: str
    config: Config
    notes: list[str]


def read_upstream(
    settings: Mapping[str, Any], *, tied: bool = False, gelu: str | None = None, local_keys: int | None = None
) -> UpstreamConfig:
    """Translates upstream's settings.

    Args:
        tied: whether the output matrix is the embedding.
        gelu: GELU of the compose projection, ``tanh`` or ``erf``; None uses what dcscale has written under its key, or
            else tanh, as in the released weights.
        local_keys: keys that a query of a local layer sees; None uses ``window_size``.

    Raises:
        ConversionError: a setting is invalid or has no counterpart in dcscale; the message names it.
    """
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(f"model_type is {family!r}, but must be {' or '.join(FAMILIES)}")
    known = {**_DEFAULTS, **_FAMILY_DEFAULTS[family]}
    check_known(settings, {*known, *_READ_ELSEWHERE}, harmless=_HARMLESS)
    s = {**known, **{key: value for key, value in settings.items() if key in known}}
    extra = _extra_settings(settings)
    # Checked before they are used in arithmetic below. All other values are checked with dcscale's config.
    for key in ("dim", "n_head", "n_layer", "vocab_size", "block_size"):
        if type(s[key]) is not int or s[key] < 1:
            raise ConversionError(f"{key} is {s[key]!r}, but must be an integer of at least 1")
    if s["dim"] % s["n_head"]:
        raise ConversionError(f"n_head {s['n_head']} does not divide dim {s['dim']}")
    for key in ("use_dcmha", "query_wise", "mgate", "tie_word_embeddings"):
        if type(s.get(key, False)) is not bool:
            raise ConversionError(f"{key} is {s[key]!r}, but must be true or false")
    notes = _notes(settings, s)
    compose = {**extra.get("compose", {})}
    if gelu is not None:
        compose["gelu"] = gelu
    if s["query_wise"]:  # upstream's decoding then ignores the key side
        compose["key_wise"] = False
    pythia = family == "dcpythia"
    model = {
        "attention": "dcmha" if s["use_dcmha"] else "mha",
        "vocab_size": s["vocab_size"],
        "layers": s["n_layer"],
        "dim": s["dim"],
        "heads": s["n_head"],
        "kv_heads": None if s["n_local_heads"] in (-1, s["n_head"]) else s["n_local_heads"],
        "ffn": "gelu" if pythia else "swiglu",
        "ffn_dim": _ffn_dim(family, s),
        "multi_gate": s["mgate_dim"] if s.get("mgate") else None,
        "norm": "layernorm" if pythia else "rmsnorm",
        "norm_eps": s["norm_eps"],
        "qk_norm": s["use_qk_norm"],
        "bias": s.get("use_linear_bias", False),
        "parallel_residual": s.get("use_parallel_residual", False),
        "rope_base": s["rope_base"],
        "rope_fraction": s.get("rotary_pct", 1.0),
        "windows": _windows(s, local_keys),
        "tied_embeddings": tied,
        **{name: extra[name] for name in _EXTRA_FIELDS if name in extra},
        "compose": compose,
    }
    return UpstreamConfig(family, checked_config(model, s["block_size"], "upstream's config"), notes)


def write_upstream(config: Config) -> UpstreamConfig:
    """Chooses the family of a model, and checks that upstream's code can compute it.

    Raises:
        ConversionError: it cannot; the message lists all settings that differ.
    """
    model = config.model
    family = "dcpythia" if model.norm == "layernorm" else "dcformer"
    # Value, or values, that upstream's code has; the last of several is the one to name in a message.
    wanted: dict[str, Any] = {"compose.rank": 2} if model.attention == "dcmha" else {}
    wanted |= {"kv_heads": (None, model.heads), "head_dim": (None, model.dim / model.heads)}
    wanted |= {"qkv_bias": (model.bias, False), "rope_scaling.kind": "none"}
    if family == "dcformer":
        wanted |= {"ffn": "swiglu", "bias": False, "parallel_residual": False, "rope_fraction": 1.0}
    else:
        wanted |= {"ffn": "gelu"}
    problems = []
    for name, allowed in wanted.items():
        value = attrgetter(name)(model)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if value not in choices:
            problems.append(f"model.{name} is {value!r}, upstream's {FAMILIES[family]} only has {choices[-1]!r}")
    if model.heads % 2:
        problems.append(f"model.heads is {model.heads}, upstream only has rank 2 for even numbers of heads")
    if _window_type(model) is None:
        patterns = ", ".join(_PATTERNS)
        problems.append(
            f"model.windows is {model.windows}, upstream has {patterns} with one window, or no window at all"
        )
    if problems:
        raise ConversionError("upstream cannot represent this model: " + "; ".join(problems))
    notes = []
    if model.attention == "dcmha" and model.compose.gelu == "tanh":
        notes.append("upstream's PyTorch code uses erf GELU in the compose projection, this model uses tanh")
    if model.qk_norm and model.qk_norm_eps != 1e-6:
        notes.append(f"upstream's PyTorch code uses 1e-6 for qk_norm_eps, this model uses {model.qk_norm_eps}")
    window_type, window = _window_type(model)
    if window_type is not None and window != _WINDOW_OF_PATTERNS:
        notes.append(
            f"upstream's code uses windows of {_WINDOW_OF_PATTERNS} with {window_type}, this model uses {window}"
        )
    return UpstreamConfig(family, config, notes)


def upstream_settings(
    upstream: UpstreamConfig, torch_dtype: str, tokenizer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        upstream: from :func:`write_upstream`.
        torch_dtype: the tensors' type by torch's name, such as ``bfloat16``.
        tokenizer: as in a checkpoint's state.json.
    """
    model = upstream.config.model
    window_type, window = _window_type(model)
    settings: dict[str, Any] = {
        "architectures": [FAMILIES[upstream.family]],
        "model_type": upstream.family,
        "torch_dtype": torch_dtype,
        "vocab_size": model.vocab_size,
        "block_size": upstream.config.data.sequence_length,
        "dim": model.dim,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_local_heads": model.heads,
        "head_dim": model.dim // model.heads,
        "intermediate_size": model.ffn_dim,
        "norm_eps": model.norm_eps,
        "rope_base": model.rope_base,
        "use_qk_norm": model.qk_norm,
        "use_dcmha": model.attention == "dcmha",
        "query_wise": False,
        "window_type": window_type,
        "window_size": window,
        "tie_word_embeddings": model.tied_embeddings,
        "is_training": False,
    }
    if upstream.family == "dcformer":
        settings |= {"mgate": model.multi_gate is not None, "mgate_dim": model.multi_gate or 44}
    else:
        settings |= {"use_parallel_residual": model.parallel_residual, "use_linear_bias": model.bias}
        settings |= {"rotary_pct": model.rope_fraction}
    if tokenizer is not None:
        settings["eos_token_id"] = tokenizer["eos_id"]
    settings["dcscale"] = {**{name: getattr(model, name) for name in _EXTRA_FIELDS}, "compose": asdict(model.compose)}
    if tokenizer is not None and tokenizer["spec"] == "byte":
        settings["dcscale"]["tokenizer"] = "byte"
    return settings


def _extra_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What dcscale has written under its own key, checked."""
    extra = settings.get("dcscale", {})
    allowed = {*_EXTRA_FIELDS, "compose", "tokenizer"}
    if not isinstance(extra, dict) or extra.keys() - allowed or not isinstance(extra.get("compose", {}), dict):
        raise ConversionError(f"its key dcscale is {extra!r}, but may only have the keys {', '.join(sorted(allowed))}")
    unknown = extra.get("compose", {}).keys() - {field.name for field in fields(ComposeConfig)}
    if unknown:
        raise ConversionError(f"its key dcscale.compose has the unknown keys {', '.join(sorted(unknown))}")
    return extra


def _notes(settings: Mapping[str, Any], s: Mapping[str, Any]) -> list[str]:
    if settings.get("use_sw"):
        raise ConversionError("use_sw is set: dcscale has no static head projection")
    notes = []
    if not s["use_dcmha"]:
        notes.append("use_dcmha is false: a plain Transformer, as in upstream's training (its inference does compose)")
    if settings.get("head_dim", s["dim"] // s["n_head"]) != s["dim"] // s["n_head"]:
        notes.append(f"head_dim is {settings['head_dim']}, but upstream uses dim / n_head = {s['dim'] // s['n_head']}")
    if s["query_wise"]:
        notes.append("query_wise is set: only the query side composes, as in upstream's decoding, not its training")
    if s["window_type"] is not None and s["window_size"] != _WINDOW_OF_PATTERNS:
        notes.append(
            f"window_size {s['window_size']} is used; with window_type {s['window_type']} upstream's code ignores it "
            f"and uses {_WINDOW_OF_PATTERNS}"
        )
    return notes


def _ffn_dim(family: str, s: Mapping[str, Any]) -> int:
    if s["intermediate_size"] is not None:
        return s["intermediate_size"]
    # DCFormer: 8/3 of dim, rounded up to a multiple of 256.
    return 4 * s["dim"] if family == "dcpythia" else -(-(8 * s["dim"] // 3) // 256) * 256


def _windows(s: Mapping[str, Any], local_keys: int | None) -> list[int | None]:
    kind, window = s["window_type"], s["window_size"]
    if kind is not None and (not isinstance(kind, str) or kind not in _PATTERNS):
        raise ConversionError(f"window_type is {kind!r}, but must be {', '.join(_PATTERNS)} or null")
    if window is None:
        if kind is not None or local_keys is not None:
            raise ConversionError(
                f"window_size is null, so no layer is local: window_type is {kind!r}, but must be null, and "
                "--local-keys must be left out"
            )
        return [None]
    pattern = _PATTERNS[kind or "LG"]
    keys = window if local_keys is None else local_keys
    return [keys if layer == "L" else None for layer in pattern[: s["n_layer"]]]


def _window_type(model: ModelConfig) -> tuple[str | None, int | None] | None:
    """Upstream's (window_type, window_size) for a model; None if upstream has no such pattern of windows."""
    layers = [model.windows[layer % len(model.windows)] for layer in range(model.layers)]
    if layers == [None] * model.layers:
        return None, None
    for kind, pattern in _PATTERNS.items():
        if layers == [layers[0] if pattern[i % len(pattern)] == "L" else None for i in range(model.layers)]:
            return (None if kind == "LG" else kind), layers[0]
    return None
