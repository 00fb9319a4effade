"""The public function: checks its arguments, chooses a backend and calls it."""

from __future__ import annotations

from torch import Tensor

from dcscale.ops import flash
from dcscale.ops.attention import attention, check_attention, check_tensor
from dcscale.ops.compose.chunked import chunked_attention
from dcscale.ops.compose.compiled import compiled_attention
from dcscale.ops.compose.custom_op import SCRATCH_BYTES
from dcscale.ops.compose.reference import reference_attention
from dcscale.ops.compose.triton.op import triton_attention, unavailable_reason
from dcscale.ops.compose.triton.self_test import self_test_failure
from dcscale.ops.compose.weights import ComposeWeights

BACKENDS = ("auto", "reference", "chunked", "compiled", "triton")

_IMPLEMENTATIONS = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "compiled": compiled_attention,
    "triton": triton_attention,
}


def compose_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ComposeWeights | None = None,
    post: ComposeWeights | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
    backend: str = "auto",
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Causal attention whose heads are mixed before and after the softmax (DCMHA, arXiv 2405.08553)::

        S_h = scale * q_h k_h^T      S' = compose_pre(S), masked      P_h = softmax_s(S'_h)
        P' = compose_post(P)         O_h = P'_h v_h

    q: [B, T, H, D]; k, v: [B, S, G, D] with G a divisor of H (head h reads key/value head h // (H/G)); one float type.
    pre, post: :class:`ComposeWeights` in that type; None for the identity.
    window: keys a query sees, itself included; None sees all before it.
    scale: factor on the scores; 1/sqrt(D) by default.
    document_ids: integers [B, S], the document of each key; a query sees keys of its own document only.
    query_offset: position of the first query among the keys; S - T by default, so that the queries are the last T.
    backend: "reference" (dense, the definition), "chunked" (keeps nothing of size T x S for backward), "compiled" (the
    same through torch.compile: faster on long sequences, after a minute of compiling), "triton" (the same by fused
    kernels, on NVIDIA GPUs), or "auto".
    scratch_bytes: memory for the maps of a chunk of queries, which is made smaller until it fits, down to a few queries
    of one batch row. The formulas stand in chunked.py, compiled.py and triton_staged.py; "reference" ignores it.

    Returns [B, T, H, D] in q's type, differentiable in every float tensor. 16-bit input is computed in float32.
    Raises ValueError for an argument that does not fit, naming it, its shape and what was expected.
    """
    scale, query_offset = check_attention(q, k, v, window, scale, document_ids, query_offset)
    for stage, weights in (("pre", pre), ("post", post)):
        if weights is not None:
            _check_weights(stage, weights, q, k)
    name, _ = choose_backend(backend, q, pre, post)
    if name in ("flash-attn", "sdpa"):
        return attention(q, k, v, window=window, scale=scale, document_ids=document_ids, query_offset=query_offset)
    if scratch_bytes < 1:
        raise ValueError(f"scratch_bytes is {scratch_bytes}, expected at least 1; the default is {SCRATCH_BYTES}")
    options = {"window": window, "scale": scale, "document_ids_BS": document_ids, "query_offset": query_offset}
    if name != "reference":
        options["scratch_bytes"] = scratch_bytes
    return _IMPLEMENTATIONS[name](q, k, v, pre, post, **options)


def choose_backend(
    requested: str, q: Tensor, pre: ComposeWeights | None = None, post: ComposeWeights | None = None
) -> tuple[str, str]:
    """(name, reason) of the implementation that :func:`compose_attention` runs for these arguments.

    The name is one of :data:`BACKENDS` but "auto", or for plain attention "flash-attn" or "sdpa"; the reason says why
    it is not the fastest of them. Raises ValueError for an unknown ``requested``, and for "triton" where it cannot run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if requested == "triton":
        problem = _triton_problem(q, pre, post)
        if problem is not None:
            raise ValueError(f"backend 'triton' cannot run here: {problem}; use 'auto', or 'chunked'")
    if requested != "auto":
        return requested, "requested"
    if pre is None and post is None:
        problem = flash.unavailable_reason(q)
        if problem is None:
            return "flash-attn", "without compose weights this is plain attention"
        return "sdpa", f"without compose weights this is plain attention; not flash-attn: {problem}"
    problem = "it needs an NVIDIA GPU" if q.device.type == "cpu" else _triton_problem(q, pre, post)
    if problem is None:
        return (
            "triton",
            "the fastest backend for compose; its kernels were tried on this GPU and give the right results",
        )
    return "chunked", f"not triton: {problem}; 'compiled' is faster on long sequences, after a minute of compiling"


def _triton_problem(q: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None) -> str | None:
    problem = unavailable_reason(q, pre, post)
    if problem is None and q.is_cuda:
        # Interpreted, as in tests on a CPU, nothing was compiled that could be wrong.
        problem = self_test_failure(q, pre, post)
    return problem


def _check_weights(stage: str, weights: ComposeWeights, q: Tensor, k: Tensor) -> None:
    if not isinstance(weights, ComposeWeights):
        raise ValueError(f"{stage} is a {type(weights).__name__}, expected ComposeWeights, or None for the identity")
    batch, queries, heads, _ = q.shape
    ranks = {}
    for name, tensor in weights.tensors().items():
        positions = queries if name[0] == "q" else k.shape[1]
        if name[1] == "g":
            check_tensor(f"{stage}.{name}", tensor, (batch, positions, heads), q)
            continue
        if tensor.dim() != 4 or tensor.shape[2] == 0:
            raise ValueError(
                f"{stage}.{name} has shape {tuple(tensor.shape)}, "
                f"expected [B={batch}, {positions}, R, H={heads}] with a rank R of at least 1"
            )
        rank = ranks.setdefault(name[0], tensor.shape[2])
        check_tensor(f"{stage}.{name}", tensor, (batch, positions, rank, heads), q)
