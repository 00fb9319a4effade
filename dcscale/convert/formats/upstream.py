"""Upstream's tensors as dcscale has them, and back.

Beside other names there are four differences: wqkv holds q, k and v; dw1, qkw and dd have an axis of one group and
always all four branches; a model without qk-norm lacks its scales on both sides; and dw_m = [dw1 | dd] and qkw_m repeat
dw1, dd and qkw. Upstream's PyTorch training changes the copies only, its conversion from JAX the originals only, so
a file says by its values which of them was trained: see :func:`find_truth`.

Letters: E model width, H heads, C = 4 branches, K = 4*H hidden width of a branch, R = 2.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from dcscale.config.schema import ModelConfig
from dcscale.convert.errors import ConversionError
from dcscale.convert.tensor_files import TensorFiles
from dcscale.convert.tensor_map import DroppedTensor, Plan, TensorRule
from dcscale.models import DCFormer
from dcscale.models.dcmha import active_branches

BRANCHES = (("pre", "query"), ("pre", "key"), ("post", "query"), ("post", "key"))
"""Upstream's axis C."""

_RANK = 2
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
"""Cosines of [dw1 | dd] and dw_m from which, and up to which, in absolute value, they count as one trained from the
other, and as independent. Independent ones of n values have about n**-0.5, so that 4 of these are the least bounds."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in DCFormer(config).named_parameters()}


def full(config: ModelConfig) -> ModelConfig:
    """The model with everything that upstream always has: compose of all branches, and an output matrix."""
    compose = replace(
        config.compose, rank=_RANK, pre=True, post=True, query_wise=True, key_wise=True, low_rank=True, gates=True
    )
    return replace(config, attention="dcmha", compose=compose, tied_embeddings=False)


def find_truth(files: TensorFiles) -> tuple[str | None, str]:
    """Which of dw1, dd, qkw (``original``) and dw_m, qkw_m (``merged``) was trained, and how that is known.

    None where there is neither, or where the values do not decide.
    """
    suffix = ".dyn_w_proj.dw_m"
    found = sorted(name[: -len("dw_m")] for name in files.shapes if name.endswith(suffix))
    if not found:
        return "original", "there are no merged copies"
    verdicts: dict[str, list[str]] = {}
    for prefix in found:
        verdicts.setdefault(_truth_of_layer(files, prefix), []).append(prefix.split(".")[1])
    if len(verdicts) > 1:
        if verdicts.keys() == {"equal", "merged"}:
            return "merged", "the merged copies are trained from the originals, or equal them"
        layers = "; ".join(f"{verdict} in layers {', '.join(numbers)}" for verdict, numbers in verdicts.items())
        return None, f"the layers disagree: {layers}"
    verdict = next(iter(verdicts))
    return {
        "equal": ("original", "the merged copies equal the originals"),
        "merged": ("merged", "the merged copies were trained from the originals: by upstream's PyTorch code"),
        "original": ("original", "the merged copies are left-over initialisation or zero: converted from JAX"),
        "only merged": ("merged", "there are only the merged copies"),
        "undecided": (None, "the merged copies are neither equal, nor clearly related, nor clearly unrelated"),
    }[verdict]


def _truth_of_layer(files: TensorFiles, prefix: str) -> str:
    if prefix + "dw1" not in files.shapes or prefix + "dd" not in files.shapes:
        return "only merged"
    original = torch.cat([files.read(prefix + "dw1").flatten(1), files.read(prefix + "dd").flatten(1)], dim=1).double()
    merged = files.read(prefix + "dw_m").double()
    if original.shape != merged.shape:
        return "undecided"
    if torch.equal(original, merged):
        if prefix + "qkw" not in files.shapes or prefix + "qkw_m" not in files.shapes:
            return "equal"
        same = torch.equal(files.read(prefix + "qkw").flatten(), files.read(prefix + "qkw_m").flatten())
        return "equal" if same else "undecided"
    if not merged.any():
        return "original"
    cosine = float((original * merged).sum() / (original.norm() * merged.norm()))
    noise = 4 * original.numel() ** -0.5
    if cosine >= max(RELATED, noise):
        return "merged"
    return "original" if abs(cosine) <= max(UNRELATED, noise) else "undecided"


def plan_import(config: ModelConfig, names: Collection[str], truth: str, query_wise: bool = False) -> Plan:
    """The plan for upstream's tensors ``names`` as a model of ``config``.

    ``truth``: see :func:`find_truth`. ``query_wise``: key-wise branches may be left out whatever they hold; all other
    parts of compose that are off must be zero.
    """
    recipes = []
    for name in parameter_shapes(config):
        if match := _QKV.fullmatch(name):
            recipes.append(_import_qkv(name, *match.groups(), config, names))
        elif match := _COMPOSE.fullmatch(name):
            recipes.append(_import_compose(name, *match.groups(), config, truth, query_wise))
        else:
            source = upstream_name(name, config)
            recipes.append(TensorRule(name, (source,)))
    expected = upstream_shapes(config)
    used = {source for recipe in recipes for source in recipe.sources}
    left_out = {}
    for name in expected.keys() - used:
        if name == "output.weight":
            left_out[name] = DroppedTensor("the embedding is the output matrix too")
        elif name.endswith((".dw_m", ".qkw_m", ".dw1", ".dd", ".qkw")):
            if config.attention == "mha":
                left_out[name] = DroppedTensor("use_dcmha is false")
            elif name.endswith("_m") == (truth == "merged"):
                left_out[name] = DroppedTensor(
                    "this part of compose is off", ("is not zero", lambda tensor: not tensor.any())
                )
            else:
                left_out[name] = DroppedTensor(f"the {truth} tensors are the trained ones")
        elif name.endswith(("pre_proj.w", "post_proj.w", ".sw")):
            left_out[name] = DroppedTensor("the identity", ("is a static head projection", _is_identity_or_zero))
    for name in names:
        if re.fullmatch(r"layers\.\d+\.attention\.kv_cache\.\w+", name):
            left_out[name] = DroppedTensor("a cache")
    return Plan(recipes, expected, left_out)


def plan_export(config: ModelConfig, dtype: torch.dtype) -> Plan:
    """The plan for a model of ``config`` as upstream's tensors, all in ``dtype``, the merged copies equal."""
    recipes = []
    heads = config.heads
    for name in parameter_shapes(full(config)):
        if match := _QKV.fullmatch(name):
            if match[2] == "q":
                sources = tuple(name.replace(".q.", f".{part}.") for part in "qkv")
                target = f"layers.{match[1]}.attention.wqkv.{match[3]}"
                recipes.append(TensorRule(target, sources, "one after the other", make=lambda *parts: torch.cat(parts)))
        elif match := _COMPOSE.fullmatch(name):
            if match[2] == "dw1":
                recipes += _export_compose(match[1], config, dtype)
        elif name == "output.weight" and config.tied_embeddings:
            recipes.append(TensorRule(name, ("embedding.weight",), "tied"))
        else:
            recipes.append(TensorRule(upstream_name(name, config), (name,)))
    for layer in range(config.layers):
        for stage in ("pre", "post"):
            name = f"layers.{layer}.attention.dyn_w_proj.{stage}_proj.w"
            recipes.append(TensorRule(name, (), "the identity", make=lambda: torch.eye(heads, dtype=dtype)[None]))
    return Plan(recipes, parameter_shapes(config), {})


def upstream_name(name: str, config: ModelConfig) -> str:
    """Upstream's name of a parameter that it has as it is."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".ffn.up.", ".feed_forward.w1." if config.ffn == "gelu" else ".feed_forward.w3.")


def upstream_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All tensors that upstream's file for such a model may have, but caches; wq, wk and wv for wqkv included."""
    e, h, c, k = config.dim, config.heads, len(BRANCHES), 2 * _RANK * config.heads
    shapes = {}
    own = parameter_shapes(full(config))
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
        return TensorRule(name, (f"{prefix}w{part}.{kind}",))
    width = config.head_dim or config.dim // config.heads
    sizes = [heads * width for heads in (config.heads, *2 * [config.kv_heads or config.heads])]
    start = sum(sizes[: "qkv".index(part)])
    rows = (start, start + sizes["qkv".index(part)])
    return TensorRule(name, (f"{prefix}wqkv.{kind}",), f"rows {rows[0]} to {rows[1] - 1}", rows)


def branch_numbers(config: ModelConfig) -> list[int]:
    """Indices on upstream's axis C of the branches that are on."""
    return [BRANCHES.index(branch) for branch in active_branches(config.compose)]


def _import_compose(name: str, layer: str, kind: str, config: ModelConfig, truth: str, query_wise: bool) -> TensorRule:
    prefix = f"layers.{layer}.attention.dyn_w_proj."
    branches, heads = branch_numbers(config), config.heads
    # Branches that are taken, or whose values do not matter.
    free = torch.tensor([i in branches or (query_wise and side == "key") for i, (_, side) in enumerate(BRANCHES)])
    k = 2 * _RANK * heads
    merged = truth == "merged"
    source = prefix + ({"dw1": "dw_m", "dd": "dw_m", "qkw": "qkw_m"}[kind] if merged else kind)

    def refuse_unless_zero(rest: Tensor) -> None:
        if rest.any():
            raise ConversionError(
                f"{source} is not zero in parts of compose that its config.json's key dcscale says are off: it was "
                "trained by other code since; remove that key to have all of compose"
            )

    def make(tensor: Tensor) -> Tensor:
        if kind == "qkw":
            tensor = tensor.reshape(len(BRANCHES), k, 2 * _RANK, heads)
            refuse_unless_zero(tensor[~free])
            return tensor[branches]
        tensor = tensor.flatten(1)
        columns = {"dw1": free.repeat_interleave(k), "dd": free.repeat_interleave(heads)}
        if merged:
            both = [columns["dw1"] & config.compose.low_rank, columns["dd"] & config.compose.gates]
            refuse_unless_zero(tensor[:, ~torch.cat(both)])
            tensor = tensor[:, : len(BRANCHES) * k] if kind == "dw1" else tensor[:, len(BRANCHES) * k :]
        else:
            refuse_unless_zero(tensor[:, ~columns[kind]])
        picked = tensor.unflatten(1, (len(BRANCHES), -1))[:, branches]
        return picked if kind == "dw1" else picked.flatten(1)

    some = "" if len(branches) == len(BRANCHES) else f", branches {', '.join(map(str, branches))} of its 0 to 3"
    return TensorRule(name, (source,), f"reshaped{some}", make=make)


def _export_compose(layer: str, config: ModelConfig, dtype: torch.dtype) -> list[TensorRule]:
    """The five tensors of one layer. Branches and parts that are off are zero, which composes with the identity."""
    e, h, c, k = config.dim, config.heads, len(BRANCHES), 2 * _RANK * config.heads
    own, prefix = f"blocks.{layer}.attention.compose.", f"layers.{layer}.attention.dyn_w_proj."
    dcmha = config.attention == "dcmha"
    branches = branch_numbers(config) if dcmha else []
    low_rank, gates = dcmha and config.compose.low_rank, dcmha and config.compose.gates

    def spread(shape: tuple[int, ...], axis: int, *tensors: Tensor) -> Tensor:
        result = torch.zeros(shape, dtype=dtype)
        for tensor in tensors:
            picked = tensor.to(dtype).reshape(*shape[:axis], len(branches), *shape[axis + 1 :])
            result.index_copy_(axis, torch.tensor(branches), picked)
        return result

    def dw_m(*tensors: Tensor) -> Tensor:
        dw1 = spread((e, c, k), 1, *(tensors[:1] if low_rank else ()))
        dd = spread((e, c, h), 1, *(tensors[-1:] if gates else ()))
        return torch.cat([dw1.flatten(1), dd.flatten(1)], dim=1)

    dw1 = (own + "dw1",) if low_rank else ()
    qkw = (own + "qkw",) if low_rank else ()
    dd = (own + "dd",) if gates else ()
    how = "reshaped" if len(branches) == c else "reshaped, zero where compose is off"
    return [
        TensorRule(prefix + "dw1", dw1, how, make=lambda *t: spread((e, c, k), 1, *t)[:, None]),
        TensorRule(prefix + "qkw", qkw, how, make=lambda *t: spread((c, k, 2 * _RANK, h), 0, *t)[None]),
        TensorRule(prefix + "dd", dd, how, make=lambda *t: spread((e, c, h), 1, *t).flatten(1)[:, None]),
        TensorRule(prefix + "dw_m", dw1 + dd, "[dw1 | dd]", make=dw_m),
        TensorRule(prefix + "qkw_m", qkw, "qkw", make=lambda *t: spread((c, k, 2 * _RANK, h), 0, *t).flatten(2)),
    ]


def _is_identity_or_zero(tensor: Tensor) -> bool:
    return not tensor.any() or bool((tensor == torch.eye(tensor.shape[-1], dtype=tensor.dtype)).all())
