"""Plain attention through the packages of FlashAttention, where they are installed and support the call.

The backward pass of a run is always the deterministic one. It takes a little more time and memory; without it q's
gradient is summed in an order that changes from run to run, and no run could be reproduced bit for bit. For the same
reason a run prefers FlashAttention-2 to PyTorch's cuDNN backend, which may be faster: PyTorch has no deterministic
backward pass of it.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; N = B * T.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from dcscale.ops.masks import band, key_range

OLDEST_VERSION = "2.7"
"""First version of flash-attn whose functions are registered torch operators, so that torch.compile can trace them.
pyproject.toml requires the same version."""

MAX_DOCUMENTS = 65_535
"""flash-attn maps documents to the second axis of the CUDA grid, and this is that axis' largest size."""


class Package(NamedTuple):
    """What a package supports, and how it is installed."""

    capabilities: range
    """Major compute capabilities."""
    max_head_dim: int
    """Of the deterministic backward pass."""
    install: str


_REPOSITORY = "git+https://github.com/Dao-AILab/flash-attention"
PACKAGES = {
    "flash-attn-4": Package(range(9, 12), 128, "pip install --pre flash-attn-4"),
    "flash-attn-3": Package(range(9, 10), 192, f"pip install --no-build-isolation '{_REPOSITORY}#subdirectory=hopper'"),
    "flash-attn": Package(range(8, 100), 256, "pip install --no-build-isolation flash-attn"),
}
"""By the name of the distribution."""

PACKAGES_OF_RUNS = ("flash-attn-3", "flash-attn")
"""Fastest first. FlashAttention-4 is only measured: it is a beta, and torch.compile cannot trace it.

torch.nn.attention.activate_flash_attention_impl runs the kernels of the same packages, but switches the whole process,
knows no windows, and is deterministic only if all of torch is: so they are called directly."""


def assume_constant_result(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # all that the decorator of torch does
    return function


def best_package(q_BTHD: Tensor) -> str | None:
    """The fastest of :data:`PACKAGES_OF_RUNS` that can run for this q; None if none can."""
    for package in PACKAGES_OF_RUNS:
        if unavailable_reason(q_BTHD, package) is None:
            return package
    return None


def unavailable_reason(q_BTHD: Tensor, package: str) -> str | None:
    """Why :func:`flash_attention` cannot run for this q; None if it can. Imports the package only if all else fits."""
    if q_BTHD.device.type != "cuda":
        return f"it needs an NVIDIA GPU, but q is on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, but q is {q_BTHD.dtype}"
    if q_BTHD.shape[3] > PACKAGES[package].max_head_dim:
        return f"it supports head dims up to {PACKAGES[package].max_head_dim}, but q has shape {tuple(q_BTHD.shape)}"
    return _device_unavailable_reason(q_BTHD.device.index, package)


@assume_constant_result
def _device_unavailable_reason(index: int, package: str) -> str | None:
    if torch.version.hip is not None:
        return "it is used on NVIDIA GPUs only, and this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    supported = PACKAGES[package].capabilities
    if major < supported.start:
        return f"it needs compute capability {supported.start}.0, but the GPU has {major}.{minor}"
    if major not in supported:
        return f"it supports compute capability {supported[-1]}.x at most, but the GPU has {major}.{minor}"
    return _package_unavailable_reason(package)


@functools.cache
def _package_unavailable_reason(package: str) -> str | None:
    """Warns once per process if a package is installed but unusable: whoever installed it expects it to be used."""
    install = PACKAGES[package].install
    try:
        problem = _too_old(package)
        if problem is None:
            _functions(package)
            return None
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed ({install})"
    except Exception as error:  # an extension built for another PyTorch can raise anything
        problem = f"{package} is installed, but importing it fails: {type(error).__name__}: {error}"
    warnings.warn(
        f"{problem}. Plain attention uses another implementation instead. Build {package} for this PyTorch "
        f"({install} --force-reinstall --no-deps --no-cache-dir), or uninstall it",
        stacklevel=1,
    )
    return problem


def _too_old(package: str) -> str | None:
    if package == "flash-attn-3":
        # Its version has been 3.0.0 for years, and builds without metadata are common.
        if importlib.util.find_spec("flash_attn_interface") is None:
            raise importlib.metadata.PackageNotFoundError(package)
        _functions(package)
        if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
            return "flash-attn-3 is installed, but a build of December 2025 or newer is needed, which is an operator"
        return None
    version = importlib.metadata.version(package)
    if package == "flash-attn" and TorchVersion(version) < OLDEST_VERSION:
        return f"flash-attn {version} is installed, but {OLDEST_VERSION} or newer is needed"
    return None


def _functions(package: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions for rows of equal length, and for packed sequences."""
    if package == "flash-attn-4":
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    elif package == "flash-attn-3":
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    return flash_attn_func, flash_attn_varlen_func


def flash_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    document_ids_BS: Tensor | None,
    query_offset: int,
    package: str,
    deterministic: bool = True,
    max_documents: int = MAX_DOCUMENTS,
) -> Tensor | None:
    """Arguments as :func:`dcscale.ops.attention`, already checked -> [B, T, H, D] in q's dtype.

    Returns None if the package cannot express the documents. It takes them as separate packed sequences, so each
    document must be one contiguous run of positions (checked as: ids never decrease along a row) and every position
    that is seen must have a query. Rows made by dcscale.data satisfy both. All rows together must have at most
    ``max_documents`` documents.
    """
    last = query_offset + q_BTHD.shape[1] - 1
    _, end = key_range(query_offset, last, window, causal, k_BSGD.shape[1])
    k_BSGD, v_BSGD = k_BSGD[:, :end], v_BSGD[:, :end]
    # flash-attn aligns the last query with the last key, which without causality may be up to ``ahead`` positions
    # further: its window moves back by as much.
    behind, ahead = band(window, causal)
    shift = end - 1 - last
    sides = (None if behind is None else behind + shift, None if ahead is None else ahead - shift)
    unlimited = None if package == "flash-attn-4" else -1
    options = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": tuple(unlimited if side is None else side for side in sides),
        "deterministic": deterministic,
    }
    if document_ids_BS is None:
        return _output(_functions(package)[0](q_BTHD, k_BSGD, v_BSGD, **options))
    if query_offset > 0 or shift > 0:
        return None
    return _attend_by_document(q_BTHD, k_BSGD, v_BSGD, document_ids_BS[:, :end], package, options, max_documents)


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """FlashAttention-4 also returns the log-sums of the softmax."""
    return returned[0] if isinstance(returned, tuple) else returned


# The number of documents becomes a shape: a device sync that would break the graph. This is torch.compiler.disable,
# but imports torch._dynamo at the first call and not here.
@torch._disable_dynamo
def _attend_by_document(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    ids_BT: Tensor,
    package: str,
    options: dict[str, Any],
    max_documents: int,
) -> Tensor | None:
    previous_BT, next_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    # Compared, not subtracted: the difference of two ids may overflow their dtype. Each row starts a document.
    starts_N = F.pad(previous_BT != next_BT, (1, 0), value=True).flatten()
    cu_seqlens = F.pad(starts_N.nonzero().flatten(), (0, 1), value=len(starts_N)).int()
    max_seqlen, decreases = torch.stack([cu_seqlens.diff().max(), (previous_BT > next_BT).any()]).tolist()
    # Where ids decrease, a document may reappear later in its row.
    if decreases or len(cu_seqlens) - 1 > max_documents:
        return None
    q_NHD, k_NGD, v_NGD = (x.flatten(0, 1) for x in (q_BTHD, k_BTGD, v_BTGD))
    for side in "qk":
        options |= {f"cu_seqlens_{side}": cu_seqlens, f"max_seqlen_{side}": max_seqlen}
    return _output(_functions(package)[1](q_NHD, k_NGD, v_NGD, **options)).unflatten(0, ids_BT.shape)
