"""Plain causal attention through the flash-attn package, where it is installed and supports the call.

The backward pass is always the deterministic one. It takes a little more time and memory; without it q's gradient is
summed in an order that changes from run to run, and no run could be reproduced bit for bit.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; N = B * T.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

OLDEST_VERSION = "2.7"
"""First version whose functions are registered torch operators, so that torch.compile can trace them. pyproject.toml
requires the same version."""

_MAX_HEAD_DIM = 256
MAX_DOCUMENTS = 65_535
"""flash-attn maps documents to the second axis of the CUDA grid, and this is that axis' largest size."""


def assume_constant_result(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # all that the decorator of torch does
    return function


def unavailable_reason(q_BTHD: Tensor) -> str | None:
    """Why :func:`flash_attention` cannot run for this q; None if it can. Imports flash-attn only if all else fits."""
    if q_BTHD.device.type != "cuda":
        return f"it needs an NVIDIA GPU, but q is on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, but q is {q_BTHD.dtype}"
    if q_BTHD.shape[3] > _MAX_HEAD_DIM:
        return f"it supports head dims up to {_MAX_HEAD_DIM}, but q has shape {tuple(q_BTHD.shape)}"
    return _device_unavailable_reason(q_BTHD.device.index)


@assume_constant_result
def _device_unavailable_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it is used on NVIDIA GPUs only, and this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs compute capability 8.0, but the GPU has {major}.{minor}"
    return _package_unavailable_reason()


@functools.cache
def _package_unavailable_reason() -> str | None:
    """Warns once per process if flash-attn is installed but unusable: whoever installed it expects it to be used."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if TorchVersion(version) < OLDEST_VERSION:
        problem = f"flash-attn {version} is installed, but {OLDEST_VERSION} or newer is needed"
    else:
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401

            return None
        except Exception as error:  # an extension built for another PyTorch can raise anything
            problem = f"flash-attn {version} is installed, but importing it fails: {type(error).__name__}: {error}"
    warnings.warn(
        f"{problem}. Plain attention uses PyTorch's scaled_dot_product_attention instead. Build flash-attn for "
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
    max_documents: int = MAX_DOCUMENTS,
) -> Tensor | None:
    """Arguments as :func:`dcscale.ops.attention`, already checked -> [B, T, H, D] in q's dtype.

    Returns None if flash-attn cannot express the documents. It takes them as separate packed sequences, so each
    document must be one contiguous run of positions (checked as: ids never decrease along a row) and every position
    must have a query (query_offset of 0). Rows made by dcscale.data satisfy both. All rows together must have at most
    ``max_documents`` documents.
    """
    from flash_attn import flash_attn_func

    # flash-attn aligns the last query with the last key, so drop the keys after it.
    end = query_offset + q_BTHD.shape[1]
    k_BSGD, v_BSGD = k_BSGD[:, :end], v_BSGD[:, :end]
    # flash-attn's window counts the keys left of the query, without the query itself; -1 is unlimited.
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
    return _attend_by_document(q_BTHD, k_BSGD, v_BSGD, document_ids_BS[:, :end], options, max_documents)


# The number of documents becomes a shape: a device sync that would break the graph. This is torch.compiler.disable,
# but imports torch._dynamo at the first call and not here.
@torch._disable_dynamo
def _attend_by_document(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, ids_BT: Tensor, options: dict[str, Any], max_documents: int
) -> Tensor | None:
    previous_BT, next_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    # Compared, not subtracted: the difference of two ids may overflow their dtype. Each row starts a document.
    starts_N = F.pad(previous_BT != next_BT, (1, 0), value=True).flatten()
    cu_seqlens = F.pad(starts_N.nonzero().flatten(), (0, 1), value=len(starts_N)).int()
    max_seqlen, decreases = torch.stack([cu_seqlens.diff().max(), (previous_BT > next_BT).any()]).tolist()
    # Where ids decrease, a document may reappear later in its row.
    if decreases or len(cu_seqlens) - 1 > max_documents:
        return None
    from flash_attn import flash_attn_varlen_func

    q_NHD, k_NGD, v_NGD = (x.flatten(0, 1) for x in (q_BTHD, k_BTGD, v_BTGD))
    out_NHD = flash_attn_varlen_func(q_NHD, k_NGD, v_NGD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out_NHD.unflatten(0, ids_BT.shape)
