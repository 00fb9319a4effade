"""The public function of compose attention: checks its arguments, chooses a backend and calls it."""

from __future__ import annotations

from torch import Tensor

from dcscale.ops.attention import check_attention, check_tensor, checked_attention, plain_backend
from dcscale.ops.compose.chunked import chunked_attention
from dcscale.ops.compose.compiled import compiled_attention
from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.decode import decode_attention, suits_decode
from dcscale.ops.compose.reference import reference_attention
from dcscale.ops.compose.scratch import default_scratch_bytes
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
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
    backend: str = "auto",
    scratch_bytes: int | None = None,
) -> Tensor:
    """Attention whose heads are composed before and after the softmax (DCMHA, arXiv 2405.08553)::

        S_h = scale * q_h k_h^T      S' = compose_pre(S), masked      P_h = softmax_s(S'_h)
        P' = compose_post(P)         O_h = P'_h v_h

    Args:
        q: [B, T, H, D], of any float dtype, which k, v and the weights share.
        k: [B, S, G, D] with G a divisor of H: head h uses key/value head h // (H/G).
        v: [B, S, G, D].
        pre: weights of the compose before the softmax; None for the identity.
        post: weights of the compose after the softmax; None for the identity.
        causal: a query sees the keys up to its own position. Otherwise it sees all S keys, and with a window W those
            with |t - s| < W. Cross attention is causal=False with T != S: the weights by key then come from the key
            sequence, and window and document_ids are refused.
        window: keys that a query sees, itself included, and without ``causal`` as many after it; None for no limit.
        scale: factor on the scores; 1/sqrt(D) by default.
        document_ids: integers [B, S], the document of each key; a query sees keys of its own document only.
        query_offset: position of the first query among the keys; S - T by default (the queries are the last T). Without
            ``causal`` there is no default unless T = S: pass it if the queries are positions of the key sequence.
        backend: "reference" (dense, the definition), "chunked" (plain PyTorch, keeps nothing of size T x S for
            backward), "compiled" (the same through torch.compile: faster on long sequences, after a minute of
            compilation), "triton" (fused kernels for NVIDIA GPUs), or "auto" for the best that can run, which for a few
            queries without gradients is decode.py.
        scratch_bytes: memory for the scores of a chunk of queries; by default it follows from the device's total memory
            and the shapes (scratch.py). Chunks are made smaller until they fit, down to a few queries of one batch row;
            the formulas are in chunked.py, compiled.py and triton/staging.py. The reference backend and plain attention
            ignore it.

    Returns:
        [B, T, H, D] in q's dtype, differentiable in every float tensor. 16-bit input is computed in float32.

    Raises:
        ValueError: an argument does not fit; with its name, its shape or value, and what was expected.
    """
    scale, query_offset = check_attention(q, k, v, causal, window, scale, document_ids, query_offset)
    for stage, weights in (("pre", pre), ("post", post)):
        if weights is not None:
            _check_weights(stage, weights, q, k)
    if backend == "auto" and pre is None and post is None:
        options = {"causal": causal, "window": window, "scale": scale, "document_ids": document_ids}
        return checked_attention(q, k, v, **options, query_offset=query_offset)
    if scratch_bytes is None:
        scratch_bytes = default_scratch_bytes(q, k, window, causal)
    elif scratch_bytes < 1:
        raise ValueError(f"scratch_bytes is {scratch_bytes}, expected at least 1, or None for the default")
    stages = (ComposeWeights() if stage is None else stage for stage in (pre, post))
    call = Call(q, k, v, *stages, document_ids, causal, window, scale, query_offset, scratch_bytes)
    if backend == "auto" and suits_decode(call):
        return decode_attention(call)
    name, _ = choose_backend(backend, q, pre, post, kv_heads=k.shape[2])
    return _IMPLEMENTATIONS[name](call)


def choose_backend(
    requested: str,
    q: Tensor,
    pre: ComposeWeights | None = None,
    post: ComposeWeights | None = None,
    kv_heads: int | None = None,
) -> tuple[str, str]:
    """Name the implementation that :func:`compose_attention` uses for these arguments, except to decode a few queries.

    Args:
        requested: one of :data:`BACKENDS`.
        q: as in :func:`compose_attention`.
        pre: as in :func:`compose_attention`.
        post: as in :func:`compose_attention`.
        kv_heads: heads of k and v; those of q by default.

    Returns:
        (name, reason): one of :data:`BACKENDS` except "auto", or for plain attention a name of
        :func:`dcscale.ops.attention.plain_backend`; and why it was chosen, including why no faster one can run.

    Raises:
        ValueError: ``requested`` is unknown, or is "triton" and cannot run here.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if requested == "triton":
        problem = _triton_unavailable_reason(q, pre, post, kv_heads)
        if problem is not None:
            raise ValueError(f"backend 'triton' cannot run here: {problem}; use 'auto' or 'chunked'")
    if requested != "auto":
        return requested, "requested"
    if pre is None and post is None:
        name, reason = plain_backend(q)
        return name, f"without compose weights this is plain attention; {reason}"
    # On a CPU "auto" never runs the kernels, even where Triton could interpret them: that is slow, and for tests only.
    problem = "it needs an NVIDIA GPU" if q.device.type == "cpu" else _triton_unavailable_reason(q, pre, post, kv_heads)
    if problem is None:
        return "triton", "the fastest backend for compose; its kernels passed their self-test on this GPU"
    return "chunked", f"not triton: {problem}; 'compiled' is faster on long sequences, after a minute of compilation"


def _triton_unavailable_reason(
    q: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None, kv_heads: int | None
) -> str | None:
    problem = unavailable_reason(q, pre, post)
    # In the interpreter, as in tests on a CPU, nothing is compiled, so no compiler needs testing.
    if problem is None and q.is_cuda:
        problem = self_test_failure(q, pre, post, kv_heads)
    return problem


def _check_weights(stage: str, weights: ComposeWeights, q: Tensor, k: Tensor) -> None:
    if not isinstance(weights, ComposeWeights):
        raise ValueError(f"{stage} is a {type(weights).__name__}, expected ComposeWeights, or None for the identity")
    batch, queries, heads, _ = q.shape
    ranks = {}  # by side, "q" or "k": both factors of a pair must have the same rank
    for name, tensor in weights.tensors().items():
        side, kind = name
        positions = queries if side == "q" else k.shape[1]
        if kind == "g":
            check_tensor(f"{stage}.{name}", tensor, (batch, positions, heads), q)
            continue
        if tensor.dim() != 4 or tensor.shape[2] == 0:
            raise ValueError(
                f"{stage}.{name} has shape {tuple(tensor.shape)}, "
                f"expected [B={batch}, {positions}, R, H={heads}] with a rank R of at least 1"
            )
        rank = ranks.setdefault(side, tensor.shape[2])
        check_tensor(f"{stage}.{name}", tensor, (batch, positions, rank, heads), q)
