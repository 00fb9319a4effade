"""Plain causal attention through the flash-attn package, where it is installed and can run.

Its backward pass is asked for in its deterministic form, which takes a little more time and memory: otherwise q's
gradient is summed in an order that changes from run to run, and no run could be repeated bit for bit.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; N = B * T.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

OLDEST_VERSION = "2.7"
"""The first whose functions are operators that torch.compile knows; the same as in pyproject.toml."""

_WIDEST_HEAD = 256
_MOST_DOCUMENTS = 65_535
"""flash-attn gives documents to the second axis of a CUDA grid, which is no longer than this."""


def unavailable_reason(q_BTHD: Tensor) -> str | None:
    """Why :func:`flash_attention` cannot run for this q; None if it can. Imports flash-attn where it comes to that."""
    if q_BTHD.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and q is on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, and q is {q_BTHD.dtype}"
    if q_BTHD.shape[3] > _WIDEST_HEAD:
        return f"it takes heads up to {_WIDEST_HEAD} wide, and q has shape {tuple(q_BTHD.shape)}"
    return _machine_obstacle(q_BTHD.device.index)


@torch.compiler.assume_constant_result
def _machine_obstacle(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it is used on NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs compute capability 8.0, and the GPU has {major}.{minor}"
    return _package_obstacle()


@functools.cache
def _package_obstacle() -> str | None:
    """Who has installed the package wants it: what keeps it from being used is said aloud, once a process."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if TorchVersion(version) < OLDEST_VERSION:
        problem = f"flash-attn {version} is installed, and {OLDEST_VERSION} or newer is needed"
    else:
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401

            return None
        except Exception as error:  # a compiled extension that does not fit this PyTorch fails in any way
            problem = f"flash-attn {version} is installed, but importing it fails: {type(error).__name__}: {error}"
    warnings.warn(
        f"{problem}. Plain attention runs through PyTorch's scaled_dot_product_attention instead. Build flash-attn for "
        f"this PyTorch (pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation flash-attn), "
        f"or uninstall it",
        stacklevel=1,
    )
    return problem


def flash_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    window: int | None,
    scale: float,
    document_ids_BS: Tensor | None,
    query_offset: int,
) -> Tensor | None:
    """Arguments as :func:`dcscale.ops.attention`, already checked -> [B, T, H, D] in q's type.

    None where documents stand in the way. flash-attn knows them only as sequences on their own, so every document must
    be one run of positions, and its queries must be at all of them: ids that never fall along a row, and queries from
    the first position on. The rows that dcscale.data makes are such.
    """
    from flash_attn import flash_attn_func

    # flash-attn's last query is at the last key, and its window does not count the query itself.
    end = query_offset + q_BTHD.shape[1]
    k_BSGD, v_BSGD = k_BSGD[:, :end], v_BSGD[:, :end]
    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1 if window is None else window - 1, 0),
        "deterministic": True,
    }
    if document_ids_BS is None:
        return flash_attn_func(q_BTHD, k_BSGD, v_BSGD, **options)
    if query_offset > 0:
        return None
    return _attend_by_document(q_BTHD, k_BSGD, v_BSGD, document_ids_BS[:, :end], options)


@torch.compiler.disable  # the number of documents is a shape here, so the GPU is waited for, compiled or not
def _attend_by_document(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, ids_BT: Tensor, options: dict[str, Any]
) -> Tensor | None:
    before_BT, after_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    begins_N = F.pad(before_BT != after_BT, (1, 0), value=True).flatten()
    bounds = F.pad(begins_N.nonzero().flatten(), (0, 1), value=len(begins_N)).int()
    longest, falls = torch.stack([bounds.diff().max(), (before_BT > after_BT).any()]).tolist()
    if falls or len(bounds) - 1 > _MOST_DOCUMENTS:
        return None
    from flash_attn import flash_attn_varlen_func

    q_NHD, k_NGD, v_NGD = (x.flatten(0, 1) for x in (q_BTHD, k_BTGD, v_BTGD))
    out_NHD = flash_attn_varlen_func(q_NHD, k_NGD, v_NGD, bounds, bounds, longest, longest, **options)
    return out_NHD.unflatten(0, ids_BT.shape)
