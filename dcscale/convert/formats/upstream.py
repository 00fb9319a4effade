"""DCFormer and DCPythia of upstream's PyTorch code (Caiyun-AI/DCFormer): its tensors as dcscale's, and back.

Besides the names there are three differences. wqkv holds q, k and v. dw1, qkw and dd have an axis of one group and
always all four branches. And files have dw1, dd and qkw twice: the originals, and merged copies dw_m = [dw1 | dd]
and qkw_m. Upstream's PyTorch training changes only the copies, its conversion from JAX only the originals, so the
values show which of them were trained: see :func:`find_trained_copies`.

Letters: E model width, H heads, C = 4 branches, K = 4*H hidden width of a branch, R = 2 rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.config import Config
from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import upstream_config
from dcscale.convert.tensor_files import TensorFiles, open_tensors
from dcscale.convert.tensor_map import (
    DroppedTensor,
    Exported,
    Format,
    Imported,
    Plan,
    Source,
    TensorRule,
    check_layer_count,
    check_names,
    embeddings_are_tied,
    model_type_of,
    parameter_shapes,
    read_config_json,
)
from dcscale.models.dcmha import active_branches

BRANCHES = (("pre", "query"), ("pre", "key"), ("post", "query"), ("post", "key"))
"""The (stage, side) pairs on upstream's axis C."""

_RANK = 2
# Patterns of dcscale's names, and what they are replaced by in upstream's.
_RENAMES = (
    (r"^embedding\.", "tok_embeddings."),
    (r"^blocks\.", "layers."),
    (r"\.attention\.out\.", ".attention.wo."),
    (r"\.attention\.([qk])_norm\.weight$", r".attention.\1_norm.scale"),
    (r"\.ffn\.gate\.", ".feed_forward.w1."),
    (r"\.ffn\.down\.", ".feed_forward.w2."),
    (r"\.ffn\.multi_gate\.", ".feed_forward.mg."),
)
_QKV = re.compile(r"blocks\.(\d+)\.attention\.([qkv])\.(weight|bias)")
_COMPOSE = re.compile(r"blocks\.(\d+)\.attention\.compose\.(dw1|qkw|dd)")

RELATED, UNRELATED = 0.1, 0.03
"""Bounds for the cosine of [dw1 | dd] and dw_m. From the first one on, dw_m was trained starting from [dw1 | dd]; up to
the second one in absolute value, they are independent. The cosine of n independent values is about n**-0.5, so both
bounds are at least four times that."""


def full_config(config: ModelConfig) -> ModelConfig:
    """The model with everything that upstream always has: compose with all branches, and an output matrix."""
    compose = replace(
        config.compose, rank=_RANK, pre=True, post=True, query_wise=True, key_wise=True, low_rank=True, gates=True
    )
    return replace(config, attention="dcmha", compose=compose, tied_embeddings=False)


def find_trained_copies(files: TensorFiles) -> tuple[str | None, str]:
    """Which tensors were trained: ``original`` (dw1, dd, qkw) or ``merged`` (dw_m, qkw_m); and the reason.

    None if the values do not decide.
    """
    suffix = ".dyn_w_proj.dw_m"
    found = sorted(name[: -len("dw_m")] for name in files.shapes if name.endswith(suffix))
    if not found:
        return "original", "there are no merged copies"
    verdicts: dict[str, list[str]] = {}
    for prefix in found:
        verdicts.setdefault(_verdict_of_layer(files, prefix), []).append(prefix.split(".")[1])
    if len(verdicts) > 1:
        # A layer may not have been changed by a short training.
        if verdicts.keys() == {"equal", "merged"}:
            return "merged", "the merged copies were trained from the originals, or equal them"
        layers = "; ".join(f"{verdict} in layers {', '.join(numbers)}" for verdict, numbers in verdicts.items())
        return None, f"the layers disagree: {layers}"
    verdict = next(iter(verdicts))
    return {
        "equal": ("original", "the merged copies equal the originals"),
        "merged": ("merged", "the merged copies were trained from the originals: by upstream's PyTorch code"),
        "original": ("original", "the merged copies are unused initial values or zero: converted from JAX"),
        "only merged": ("merged", "only the merged copies exist"),
        "undecided": (None, "the merged copies are neither equal to the originals, nor clearly related or independent"),
    }[verdict]


def _verdict_of_layer(files: TensorFiles, prefix: str) -> str:
    """How the two copies of one layer are related: a key of the table above."""
    if prefix + "dw1" not in files.shapes or prefix + "dd" not in files.shapes:
        return "only merged"
    original = torch.cat([files.read(prefix + "dw1").flatten(1), files.read(prefix + "dd").flatten(1)], dim=1).double()
    merged = files.read(prefix + "dw_m").double()
    if original.shape != merged.shape:
        return "undecided"
    if torch.equal(original, merged):
        if prefix + "qkw" not in files.shapes or prefix + "qkw_m" not in files.shapes:
            return "equal"
        # Training changes both, so an equal dw_m next to another qkw_m fits neither code.
        same = torch.equal(files.read(prefix + "qkw").flatten(), files.read(prefix + "qkw_m").flatten())
        return "equal" if same else "undecided"
    if not merged.any():  # its cosine would be 0 / 0
        return "original"
    cosine = float((original * merged).sum() / (original.norm() * merged.norm()))
    noise = 4 * original.numel() ** -0.5
    if cosine >= max(RELATED, noise):
        return "merged"
    return "original" if abs(cosine) <= max(UNRELATED, noise) else "undecided"


def plan_import(config: ModelConfig, names: Collection[str], trained: str, query_wise: bool = False) -> Plan:
    """The plan that makes a model of ``config`` from upstream's tensors.

    Args:
        names: of upstream's tensors.
        trained: ``original`` or ``merged``, see :func:`find_trained_copies`.
        query_wise: whether key-wise branches are dropped whatever their values are. All other parts of compose that
            ``config`` switches off must be zero.
    """
    rules = []
    for name in parameter_shapes(config):
        if match := _QKV.fullmatch(name):
            rules.append(_import_qkv(name, *match.groups(), config, names))
        elif match := _COMPOSE.fullmatch(name):
            rules.append(_import_compose(name, *match.groups(), config, trained, query_wise))
        else:
            source = upstream_name(name, config)
            rules.append(TensorRule(name, (source,)))
    expected = upstream_shapes(config)
    used = {source for rule in rules for source in rule.sources}
    dropped = {}
    for name in expected.keys() - used:
        if name == "output.weight":
            dropped[name] = DroppedTensor("the embedding is also the output matrix")
        elif name.endswith((".dw_m", ".qkw_m", ".dw1", ".dd", ".qkw")):
            if config.attention == "mha":
                dropped[name] = DroppedTensor("use_dcmha is false")
            elif name.endswith("_m") == (trained == "merged"):
                # A trained tensor that no rule uses: a part that dcscale's own key in config.json switches off.
                dropped[name] = DroppedTensor(
                    "this part of compose is off", ("is not zero", lambda tensor: not tensor.any())
                )
            else:
                dropped[name] = DroppedTensor(f"the {trained} tensors are the trained ones")
        elif name.endswith(("pre_proj.w", "post_proj.w", ".sw")):
            dropped[name] = DroppedTensor("the identity", ("is a static head projection", _is_identity_or_zero))
    for name in names:
        if re.fullmatch(r"layers\.\d+\.attention\.kv_cache\.\w+", name):
            dropped[name] = DroppedTensor("a cache")
    return Plan(rules, expected, dropped)


def plan_export(config: ModelConfig, dtype: torch.dtype) -> Plan:
    """The plan that makes upstream's tensors from a model of ``config``, all in ``dtype``; the copies are equal."""
    rules = []
    heads = config.heads
    for name in parameter_shapes(full_config(config)):
        if match := _QKV.fullmatch(name):
            if match[2] == "q":
                sources = tuple(name.replace(".q.", f".{part}.") for part in "qkv")
                target = f"layers.{match[1]}.attention.wqkv.{match[3]}"
                rules.append(TensorRule(target, sources, "concatenated", make=lambda *parts: torch.cat(parts)))
        elif match := _COMPOSE.fullmatch(name):
            if match[2] == "dw1":
                rules += _export_compose(match[1], config, dtype)
        elif name == "output.weight" and config.tied_embeddings:
            rules.append(TensorRule(name, ("embedding.weight",), "tied"))
        else:
            rules.append(TensorRule(upstream_name(name, config), (name,)))
    for layer in range(config.layers):
        for stage in ("pre", "post"):
            name = f"layers.{layer}.attention.dyn_w_proj.{stage}_proj.w"
            rules.append(TensorRule(name, (), "the identity", make=lambda: torch.eye(heads, dtype=dtype)[None]))
    return Plan(rules, parameter_shapes(config), {})


def upstream_name(name: str, config: ModelConfig) -> str:
    """Upstream's name of a parameter that both have with the same values."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".ffn.up.", ".feed_forward.w1." if config.ffn == "gelu" else ".feed_forward.w3.")


def upstream_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, except caches, that upstream's file may have, including wq, wk and wv in place of wqkv."""
    e, h, c, k = config.dim, config.heads, len(BRANCHES), 2 * _RANK * config.heads
    shapes = {}
    own = parameter_shapes(full_config(config))
    for name, shape in own.items():
        if match := _QKV.fullmatch(name):
            layer, part, kind = match.groups()
            prefix = f"layers.{layer}.attention."
            shapes[f"{prefix}w{part}.{kind}"] = shape
            rows = sum(own[name.replace(f".{part}.", f".{other}.")][0] for other in "qkv")
            shapes[f"{prefix}wqkv.{kind}"] = (rows, *shape[1:])
        elif not _COMPOSE.fullmatch(name):
            shapes[upstream_name(name, config)] = shape
    compose = {
        "dw1": (e, 1, c, k),
        "qkw": (1, c, k, 2 * _RANK, h),
        "dd": (e, 1, c * h),
        "dw_m": (e, c * k + c * h),
        "qkw_m": (c, k, 2 * _RANK * h),
        "pre_proj.w": (1, h, h),
        "post_proj.w": (1, h, h),
        "sw": (2, h, h),
    }
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.attention.dyn_w_proj.{name}": shape for name, shape in compose.items()}
    return shapes


def _import_qkv(name: str, layer: str, part: str, kind: str, config: ModelConfig, names: Collection[str]) -> TensorRule:
    prefix = f"layers.{layer}.attention."
    if f"{prefix}wqkv.{kind}" not in names and f"{prefix}w{part}.{kind}" in names:
        return TensorRule(name, (f"{prefix}w{part}.{kind}",))  # older files have no wqkv
    width = config.head_dim or config.dim // config.heads
    sizes = [heads * width for heads in (config.heads, *2 * [config.kv_heads or config.heads])]
    start = sum(sizes[: "qkv".index(part)])
    rows = (start, start + sizes["qkv".index(part)])
    return TensorRule(name, (f"{prefix}wqkv.{kind}",), f"rows {rows[0]} to {rows[1] - 1}", rows)


def branch_numbers(config: ModelConfig) -> list[int]:
    """Indices on upstream's axis C of the branches that are switched on."""
    return [BRANCHES.index(branch) for branch in active_branches(config.compose)]


def _import_compose(
    name: str, layer: str, kind: str, config: ModelConfig, trained: str, query_wise: bool
) -> TensorRule:
    prefix = f"layers.{layer}.attention.dyn_w_proj."
    branches, heads = branch_numbers(config), config.heads
    # True for branches whose values may be anything: those that are used, and those that query_wise ignores.
    free = torch.tensor([i in branches or (query_wise and side == "key") for i, (_, side) in enumerate(BRANCHES)])
    k = 2 * _RANK * heads
    merged = trained == "merged"
    source = prefix + ({"dw1": "dw_m", "dd": "dw_m", "qkw": "qkw_m"}[kind] if merged else kind)

    def check_zero(unused: Tensor) -> None:
        if unused.any():
            raise ConversionError(
                f"{source} is not zero in parts of compose that are off according to the key dcscale of its "
                "config.json, so other code has trained it since: remove that key to use all of compose"
            )

    def make(tensor: Tensor) -> Tensor:
        if kind == "qkw":
            tensor = tensor.reshape(len(BRANCHES), k, 2 * _RANK, heads)
            check_zero(tensor[~free])
            return tensor[branches]
        tensor = tensor.flatten(1)  # [E, columns]; those of dw_m are C*K of dw1, then C*H of dd
        columns = {"dw1": free.repeat_interleave(k), "dd": free.repeat_interleave(heads)}
        if merged:
            both = [columns["dw1"] & config.compose.low_rank, columns["dd"] & config.compose.gates]
            check_zero(tensor[:, ~torch.cat(both)])
            tensor = tensor[:, : len(BRANCHES) * k] if kind == "dw1" else tensor[:, len(BRANCHES) * k :]
        else:
            check_zero(tensor[:, ~columns[kind]])
        picked = tensor.unflatten(1, (len(BRANCHES), -1))[:, branches]
        return picked if kind == "dw1" else picked.flatten(1)

    some = "" if len(branches) == len(BRANCHES) else f", branches {', '.join(map(str, branches))} of 0 to 3"
    return TensorRule(name, (source,), f"reshaped{some}", make=make)


def _export_compose(layer: str, config: ModelConfig, dtype: torch.dtype) -> list[TensorRule]:
    """The five tensors of one layer. Branches and parts that are off are zero: they add nothing to the identity."""
    e, h, c, k = config.dim, config.heads, len(BRANCHES), 2 * _RANK * config.heads
    own, prefix = f"blocks.{layer}.attention.compose.", f"layers.{layer}.attention.dyn_w_proj."
    dcmha = config.attention == "dcmha"
    branches = branch_numbers(config) if dcmha else []
    low_rank, gates = dcmha and config.compose.low_rank, dcmha and config.compose.gates

    def fill_branches(shape: tuple[int, ...], axis: int, *tensors: Tensor) -> Tensor:
        """Zeros of ``shape`` with the tensor, if there is one, at the active branches of ``axis``."""
        result = torch.zeros(shape, dtype=dtype)
        for tensor in tensors:
            picked = tensor.to(dtype).reshape(*shape[:axis], len(branches), *shape[axis + 1 :])
            result.index_copy_(axis, torch.tensor(branches), picked)
        return result

    def dw_m(*tensors: Tensor) -> Tensor:
        dw1 = fill_branches((e, c, k), 1, *(tensors[:1] if low_rank else ()))
        dd = fill_branches((e, c, h), 1, *(tensors[-1:] if gates else ()))
        return torch.cat([dw1.flatten(1), dd.flatten(1)], dim=1)

    dw1 = (own + "dw1",) if low_rank else ()
    qkw = (own + "qkw",) if low_rank else ()
    dd = (own + "dd",) if gates else ()
    how = "reshaped" if len(branches) == c else "reshaped, zero where compose is off"
    return [
        TensorRule(prefix + "dw1", dw1, how, make=lambda *t: fill_branches((e, c, k), 1, *t)[:, None]),
        TensorRule(prefix + "qkw", qkw, how, make=lambda *t: fill_branches((c, k, 2 * _RANK, h), 0, *t)[None]),
        TensorRule(prefix + "dd", dd, how, make=lambda *t: fill_branches((e, c, h), 1, *t).flatten(1)[:, None]),
        TensorRule(prefix + "dw_m", dw1 + dd, "[dw1 | dd]", make=dw_m),
        TensorRule(prefix + "qkw_m", qkw, "qkw", make=lambda *t: fill_branches((c, k, 2 * _RANK, h), 0, *t).flatten(2)),
    ]


def _is_identity_or_zero(tensor: Tensor) -> bool:
    return not tensor.any() or bool((tensor == torch.eye(tensor.shape[-1], dtype=tensor.dtype)).all())


def _detect(path: Path) -> Source | None:
    settings = read_config_json(path)
    family = model_type_of(settings, upstream_config.FAMILIES)
    if family is None:
        return None
    return Source("upstream", path, f"upstream {upstream_config.FAMILIES[family]} folder {path}", settings)


def _load(
    source: Source, from_copies: str | None = None, gelu: str | None = None, local_keys: int | None = None
) -> Imported:
    """See ``Format.load``.

    Args:
        from_copies: ``original`` or ``merged``; None decides by the values.
        gelu, local_keys: see :func:`upstream_config.read_upstream`; None chooses by the code that trained the model.
    """
    files, settings = open_tensors(source.folder), source.settings
    found, reason = find_trained_copies(files)
    trained = from_copies or found
    why = reason if trained == found else f"as requested, although {reason}"
    notes = [f"trained tensors of compose: {trained}, {why}"]
    check_layer_count("n_layer", settings, files)
    if trained == "merged" and gelu is None:
        gelu = "erf"
        notes.append("GELU of the compose projection: erf, as in upstream's PyTorch code (--gelu changes it)")
    window = settings.get("window_size", 256)
    if trained == "merged" and local_keys is None and settings["model_type"] == "dcformer" and type(window) is int:
        local_keys = window + 1
        notes.append(
            f"windows: {local_keys} keys, because upstream's PyTorch training uses one more than window_size "
            "(--local-keys changes it)"
        )
    tied = embeddings_are_tied(settings, files, "tok_embeddings.weight", "output.weight", notes)
    read = upstream_config.read_upstream(settings, tied=tied, gelu=gelu, local_keys=local_keys)
    query_wise = settings.get("query_wise") is True
    plan = plan_import(read.config.model, files.shapes, trained or "original", query_wise)
    if trained is None:
        check_names(plan, files)  # missing or misshapen tensors explain more than the message below
        raise ConversionError(
            f"{files.source} does not show whether dw1, dd, qkw or dw_m, qkw_m were trained: {reason}; choose with "
            "--from-copies merged or original"
        )
    byte_tokens = settings.get("dcscale", {}).get("tokenizer") == "byte"
    return Imported(files, read.config, plan, [*notes, *read.notes], byte_tokens)


def _export(config: Config, dtype: torch.dtype, tokenizer: Mapping[str, Any] | None, tokenizer_file: Path) -> Exported:
    written = upstream_config.write_upstream(config)
    settings = upstream_config.upstream_settings(written, str(dtype).removeprefix("torch."), tokenizer)
    return Exported(plan_export(config.model, dtype), settings, written.notes)


FORMAT = Format(
    name="upstream",
    looks_for=f"config.json with model_type {', '.join(upstream_config.FAMILIES)} (upstream)",
    detect=_detect,
    load=_load,
    options=("from_copies", "gelu", "local_keys"),
    export=_export,
)
