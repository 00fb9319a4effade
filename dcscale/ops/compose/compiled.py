"""Compose attention chunk by chunk as in chunked.py, with the chunk's formulas compiled by torch.compile.

Fused, the passes over a chunk's maps become a few: what is left beside matrix products is one pass for the latents and
one for the mix. The first call of a shape compiles both directions, for tens of seconds (found again on disk by later
processes), so this is for long sequences and long runs; on a CPU it needs a C++ compiler.

What is by query is one [H, H] matrix a query, as a product over the heads: diag(1 + qg) + q2^T q1. What is by key goes
through the latents, along contiguous keys.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width, R rank; C queries of a chunk,
V keys it sees. A call is worked off batch row by batch row, in float32 (float64 for float64 input). Maps of scores lie
as [H, C, V], mixed ones as [C, H, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import DIFFERENTIABLE, define_operator
from dcscale.ops.masks import key_range

MAX_CHUNK_QUERIES = 64
"""Queries a chunk. More make better matrix products, fewer waste less on keys that only some of the queries see."""
MAX_MAP_ELEMENTS = 2**22
"""Elements H * C * V of a map, or what the budget of scratch allows, if that is less. The queries of a chunk are made
fewer until a map fits (at least one)."""
MOST_MAPS = 12
"""Maps' worth of memory that a chunk takes, as the compiler allots it: about 5 forward, 10 backward, and latents."""

_Terms = tuple[Tensor | None, ...]


def _compose(x_CHV: Tensor, terms: _Terms) -> tuple[Tensor, list[Tensor]]:
    """(compose(x), the latents by key [C, 1, V]); terms q1, q2 [C, R, H], qg [C, H], k1, k2 [R, H, V], kg [H, V]."""
    matrix_CHH, (_, _, _, k1, k2, kg) = _matrix(terms), terms
    y_CHV = x_CHV if matrix_CHH is None else torch.bmm(matrix_CHH, x_CHV)
    if kg is not None:
        y_CHV = y_CHV + x_CHV * kg
    latents = [] if k1 is None else [(x_CHV * k1_HV).sum(1, keepdim=True) for k1_HV in k1]
    if k2 is not None:
        for latent_C1V, k2_HV in zip(latents, k2):
            y_CHV = y_CHV + latent_C1V * k2_HV
    return y_CHV, latents


def _matrix(terms: _Terms) -> Tensor | None:
    """What a query does to its heads, [C, H, H]; None for the identity."""
    q1, q2, qg = terms[:3]
    like = qg if q1 is None else q1
    if like is None:
        return None
    matrix = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    if qg is not None:
        matrix = matrix + torch.diag_embed(qg)
    return matrix if q1 is None else matrix + torch.bmm(q2.mT, q1)


def _compose_gradient(
    x_CHV: Tensor, dy_CHV: Tensor, latents: list[Tensor], terms: _Terms
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of x and of the terms; ``latents`` are those of ``_compose(x)``."""
    matrix_CHH, (q1, q2, qg, k1, k2, kg) = _matrix(terms), terms
    dx_CHV = dy_CHV if matrix_CHH is None else torch.bmm(matrix_CHH.mT, dy_CHV)
    dq1 = dq2 = dqg = dk1 = dk2 = dkg = None
    if matrix_CHH is not None:
        dmatrix_CHH = torch.bmm(dy_CHV, x_CHV.mT)
        if q1 is not None:
            dq1, dq2 = torch.bmm(q2, dmatrix_CHH), torch.bmm(q1, dmatrix_CHH.mT)
        if qg is not None:
            dqg = dmatrix_CHH.diagonal(dim1=1, dim2=2)
    if kg is not None:
        dx_CHV = dx_CHV + dy_CHV * kg
        dkg = (x_CHV * dy_CHV).sum(0)
    if k1 is not None:
        dlatents = [(dy_CHV * k2_HV).sum(1, keepdim=True) for k2_HV in k2]
        dk1 = torch.stack([(x_CHV * dlatent).sum(0) for dlatent in dlatents])
        dk2 = torch.stack([(dy_CHV * latent).sum(0) for latent in latents])
        for dlatent_C1V, k1_HV in zip(dlatents, k1):
            dx_CHV = dx_CHV + dlatent_C1V * k1_HV
    return dx_CHV, [dq1, dq2, dqg, dk1, dk2, dkg]


def _probabilities(
    q_HCD: Tensor, k_HVD: Tensor, pre: _Terms, positions: _Terms, window: int | None, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(scores, probabilities, both [C, H, V], and the latents of pre); positions and documents of queries and keys."""
    scores_CHV = (torch.bmm(q_HCD, k_HVD.mT) * scale).transpose(0, 1)
    logits_CHV, latents = _compose(scores_CHV, pre)
    of_queries, of_keys, query_documents, key_documents = positions
    age_CV = of_queries[:, None] - of_keys
    seen_CV = age_CV >= 0
    if window is not None:
        seen_CV = seen_CV & (age_CV < window)
    if query_documents is not None:
        seen_CV = seen_CV & (query_documents[:, None] == key_documents)
    logits_CHV = torch.where(seen_CV[:, None], logits_CHV, -torch.inf)
    return scores_CHV, torch.softmax(logits_CHV, -1), latents


def _chunk_forward(
    q_HCD: Tensor, k_HVD: Tensor, v_HVD: Tensor, pre: _Terms, post: _Terms, positions: _Terms, *numbers: Any
) -> Tensor:
    """The output [H, C, D]."""
    _, probabilities_CHV, _ = _probabilities(q_HCD, k_HVD, pre, positions, *numbers)
    composed_CHV, _ = _compose(probabilities_CHV, post)
    return torch.bmm(composed_CHV.transpose(0, 1), v_HVD)


def _chunk_backward(
    dout_HCD: Tensor,
    q_HCD: Tensor,
    k_HVD: Tensor,
    v_HVD: Tensor,
    pre: _Terms,
    post: _Terms,
    positions: _Terms,
    window: int | None,
    scale: float,
) -> list[Tensor | None]:
    """The gradients of q, k, v and the terms of pre and post, in their layouts."""
    scores_CHV, probabilities_CHV, pre_latents = _probabilities(q_HCD, k_HVD, pre, positions, window, scale)
    composed_CHV, post_latents = _compose(probabilities_CHV, post)
    dv_HVD = torch.bmm(composed_CHV.permute(1, 2, 0), dout_HCD)
    dcomposed_CHV = torch.bmm(dout_HCD, v_HVD.mT).transpose(0, 1)
    dprobabilities_CHV, dpost = _compose_gradient(probabilities_CHV, dcomposed_CHV, post_latents, post)
    # Not flash attention's rowsum(dO * O), which the mix after the softmax makes another number.
    delta_CH1 = (probabilities_CHV * dprobabilities_CHV).sum(-1, keepdim=True)
    dlogits_CHV = probabilities_CHV * (dprobabilities_CHV - delta_CH1)
    dscores_CHV, dpre = _compose_gradient(scores_CHV, dlogits_CHV, pre_latents, pre)
    dscores_HCV = dscores_CHV.transpose(0, 1)
    dq_HCD, dk_HVD = torch.bmm(dscores_HCV, k_HVD) * scale, torch.bmm(dscores_HCV.mT, q_HCD) * scale
    return [dq_HCD, dk_HVD, dv_HVD, *dpre, *dpost]


@cache
def _compiled(chunk: Any) -> Any:
    # Whole or not at all: code that fell back to the interpreter in parts would be slower than chunked.py, unnoticed.
    return torch.compile(chunk, fullgraph=True)


def _lay_out(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, *terms: Tensor | None) -> list[Tensor | None]:
    """A batch row's tensors for the chunks: q, k, v heads first, the latter once a query head; terms by key with keys
    last. All in the type of the work."""
    group = q_THD.shape[1] // k_SGD.shape[1]
    laid_out = [q_THD.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (k_SGD, v_SGD))]
    laid_out += [x if x is None or _by_query(3 + i) else x.movedim(0, -1) for i, x in enumerate(terms)]
    work_type = torch.promote_types(q_THD.dtype, torch.float32)
    return [None if x is None else x.to(work_type).contiguous() for x in laid_out]


def _by_query(argument: int) -> bool:
    """Whether an argument of the operator belongs to queries; the others belong to keys."""
    return argument == 0 or (argument >= 3 and (argument - 3) % 6 < 3)


def _chunks(
    tensors: list[Tensor | None], document_ids_S: Tensor | None, window: int | None, offset: int, scratch_bytes: int
) -> Iterator[tuple[list[tuple[int, slice]], tuple[Any, ...]]]:
    """Of each chunk: the axis and the part of it that it takes of every tensor, and what its functions are called with.

    The last comes first: for the compiler no two sizes are equal then, which they need not be.
    """
    heads, queries = tensors[0].shape[:2]
    longest = queries if window is None else min(queries, window + MAX_CHUNK_QUERIES)
    map_elements = min(MAX_MAP_ELEMENTS, scratch_bytes // (MOST_MAPS * tensors[0].element_size()))
    size = min(MAX_CHUNK_QUERIES, max(1, map_elements // (heads * (offset + longest))))
    positions_S = torch.arange(offset + queries, device=tensors[0].device)
    for start in reversed(range(0, queries, size)):
        end = min(start + size, queries)
        keys = slice(*key_range(offset + start, offset + end - 1, window))
        asked = slice(offset + start, offset + end)
        parts = []
        for argument in range(DIFFERENTIABLE):
            axis = 1 if argument < 3 else 0 if _by_query(argument) else -1
            parts.append((axis, slice(start, end) if _by_query(argument) else keys))
        given = [None if x is None else _narrow(x, *part) for x, part in zip(tensors, parts)]
        of_positions = [positions_S[asked], positions_S[keys], *[None] * 2]
        if document_ids_S is not None:
            of_positions[2:] = document_ids_S[asked], document_ids_S[keys]
        for x, (axis, _) in [*zip(given, parts), *((x, (0, None)) for x in of_positions)]:
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, axis % x.dim())
        yield parts, (*given[:3], tuple(given[3:9]), tuple(given[9:]), tuple(of_positions))


def _narrow(x: Tensor, axis: int, part: slice) -> Tensor:
    return x.narrow(axis, part.start, part.stop - part.start)


def _forward(*arguments: Any) -> list[Tensor]:
    out_BTHD = torch.empty_like(arguments[0], memory_format=torch.contiguous_format)
    document_ids_BS, window, scale, offset, scratch_bytes = arguments[DIFFERENTIABLE:]
    for row, out_THD in enumerate(out_BTHD):
        tensors = _lay_out(*(None if x is None else x[row] for x in arguments[:DIFFERENTIABLE]))
        documents_S = None if document_ids_BS is None else document_ids_BS[row]
        for parts, chunk in _chunks(tensors, documents_S, window, offset, scratch_bytes):
            out_HCD = _compiled(_chunk_forward)(*chunk, window, scale)
            out_THD[parts[0][1]] = out_HCD.transpose(0, 1)
    return [out_BTHD]


def _backward(dout_BTHD: Tensor, _: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    gradients = [
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in arguments[:DIFFERENTIABLE]
    ]
    document_ids_BS, window, scale, offset, scratch_bytes = arguments[DIFFERENTIABLE:]
    for row, dout_THD in enumerate(dout_BTHD):
        tensors = _lay_out(*(None if x is None else x[row] for x in arguments[:DIFFERENTIABLE]))
        totals = [None if x is None else torch.zeros_like(x) for x in tensors]
        dout_HTD = dout_THD.transpose(0, 1).to(tensors[0].dtype).contiguous()
        documents_S = None if document_ids_BS is None else document_ids_BS[row]
        for parts, chunk in _chunks(tensors, documents_S, window, offset, scratch_bytes):
            dout_HCD = _narrow(dout_HTD, *parts[0])
            torch._dynamo.maybe_mark_dynamic(dout_HCD, 1)
            for total, part, gradient in zip(
                totals, parts, _compiled(_chunk_backward)(dout_HCD, *chunk, window, scale)
            ):
                if total is not None:
                    _narrow(total, *part).add_(gradient)
        for argument, (whole, total) in enumerate(zip(gradients, totals)):
            if whole is not None:
                whole[row] = _original(argument, total, whole[row])
    return gradients


def _original(argument: int, total: Tensor, like: Tensor) -> Tensor:
    """A gradient in :func:`_lay_out`'s layout, as that of the argument itself."""
    if argument < 3:
        return total.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)
    return total if _by_query(argument) else total.movedim(-1, 0)


compiled_attention = define_operator("compose_compiled", _forward, _backward)
