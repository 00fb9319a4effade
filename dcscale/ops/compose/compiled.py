"""Compose attention chunk by chunk as in chunked.py, with the formulas of a chunk compiled by torch.compile.

Fusion leaves few passes over a chunk's scores: besides the matrix products, one for the latents and one for the rest of
compose. The first call in either direction with some numbers of heads, widths, dtype and weights compiles for tens of
seconds (later processes find the result on disk), so this is for long sequences and long runs. Different lengths,
windows and documents compile nothing new. On a CPU it needs a C++ compiler.

The terms by query are applied as one [H, H] matrix per query, diag(1 + qg) + q2^T q1, in a product over the heads. The
terms by key go through the latents, along contiguous keys.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width, R rank; C queries of a chunk,
V keys it sees. Batch rows are processed one by one, in float32 (float64 for float64 input).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients, define_operator
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import key_range, most_keys, visible_keys

MAX_CHUNK_QUERIES = 64
"""Queries of a chunk. More make the matrix products more efficient; fewer waste less work on keys that only some of the
chunk's queries see."""
MAX_SCORE_ELEMENTS = 2**22
"""Limit of H * C * V, the elements of a chunk's scores; ``scratch_bytes`` may lower it further. To meet it, chunks get
fewer queries (at least one)."""
SCRATCH_PER_SCORES = 12
"""Memory that the compiled code allocates for a chunk, in multiples of its scores: about 5 forward, 10 backward, and
latents."""
_UNUSED_QUERIES, _UNUSED_KEYS = 16, 32
"""Positions before and after those of a row, see :func:`_copy`; multiples of 16 keep the alignment of vectors."""


def _compose_forward(x_CHV: Tensor, weights: ComposeWeights) -> tuple[Tensor, list[Tensor]]:
    """(compose(x), the latents by key [C, 1, V]); the weights in the layout of :class:`_Row`."""
    matrix_CHH = _query_matrix(weights)
    y_CHV = x_CHV if matrix_CHH is None else torch.bmm(matrix_CHH, x_CHV)
    if weights.kg is not None:
        y_CHV = y_CHV + x_CHV * weights.kg
    # latent_r = sum_g k1_rg x_g;  y_h += k2_rh latent_r
    latents = [] if weights.k1 is None else [(x_CHV * k1_HV).sum(1, keepdim=True) for k1_HV in weights.k1]
    if weights.k2 is not None:
        for latent_C1V, k2_HV in zip(latents, weights.k2):
            y_CHV = y_CHV + latent_C1V * k2_HV
    return y_CHV, latents


def _query_matrix(weights: ComposeWeights) -> Tensor | None:
    """The terms by query as matrices over the heads, diag(1 + qg) + q2^T q1, [C, H, H]; None for the identity."""
    like = weights.qg if weights.q1 is None else weights.q1
    if like is None:
        return None
    matrix = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    if weights.qg is not None:
        matrix = matrix + torch.diag_embed(weights.qg)
    return matrix if weights.q1 is None else matrix + torch.bmm(weights.q2.mT, weights.q1)


def _compose_backward(
    x_CHV: Tensor, dy_CHV: Tensor, latents: list[Tensor], weights: ComposeWeights
) -> tuple[Tensor, ComposeWeights]:
    """The gradients of x and of the weights of y = compose(x); ``latents`` are those of ``_compose_forward(x)``."""
    matrix_CHH, (q1, q2, qg, k1, k2, kg) = _query_matrix(weights), weights
    # dx = matrix^T dy
    dx_CHV = dy_CHV if matrix_CHH is None else torch.bmm(matrix_CHH.mT, dy_CHV)
    dq1 = dq2 = dqg = dk1 = dk2 = dkg = None
    if matrix_CHH is not None:
        # dmatrix = dy x^T;  dq1 = q2 dmatrix;  dq2 = q1 dmatrix^T;  dqg = its diagonal
        dmatrix_CHH = torch.bmm(dy_CHV, x_CHV.mT)
        if q1 is not None:
            dq1, dq2 = torch.bmm(q2, dmatrix_CHH), torch.bmm(q1, dmatrix_CHH.mT)
        if qg is not None:
            dqg = dmatrix_CHH.diagonal(dim1=1, dim2=2)
    if kg is not None:
        dx_CHV = dx_CHV + dy_CHV * kg
        dkg = (x_CHV * dy_CHV).sum(0)
    if k1 is not None:
        # dlatent_r = sum_h k2_rh dy_h;  dk1 = sum_c x dlatent;  dk2 = sum_c dy latent;  dx_g += k1_rg dlatent_r
        dlatents = [(dy_CHV * k2_HV).sum(1, keepdim=True) for k2_HV in k2]
        dk1 = torch.stack([(x_CHV * dlatent).sum(0) for dlatent in dlatents])
        dk2 = torch.stack([(dy_CHV * latent).sum(0) for latent in latents])
        for dlatent_C1V, k1_HV in zip(dlatents, k1):
            dx_CHV = dx_CHV + dlatent_C1V * k1_HV
    return dx_CHV, ComposeWeights(dq1, dq2, dqg, dk1, dk2, dkg)


def _probabilities(
    q_HCD: Tensor, k_HVD: Tensor, pre: ComposeWeights, seen_CV: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(scores, probabilities, both [C, H, V], and the latents of pre)."""
    scores_CHV = (torch.bmm(q_HCD, k_HVD.mT) * scale).transpose(0, 1)
    logits_CHV, latents = _compose_forward(scores_CHV, pre)
    logits_CHV = torch.where(seen_CV[:, None], logits_CHV, -torch.inf)
    return scores_CHV, torch.softmax(logits_CHV, -1), latents


def _chunk_forward(
    q_HCD: Tensor,
    k_HVD: Tensor,
    v_HVD: Tensor,
    pre: ComposeWeights,
    post: ComposeWeights,
    seen_CV: Tensor,
    scale: Tensor,
) -> Tensor:
    """The output [H, C, D]."""
    _, probabilities_CHV, _ = _probabilities(q_HCD, k_HVD, pre, seen_CV, scale)
    composed_CHV, _ = _compose_forward(probabilities_CHV, post)
    return torch.bmm(composed_CHV.transpose(0, 1), v_HVD)


def _chunk_backward(
    dout_HCD: Tensor,
    q_HCD: Tensor,
    k_HVD: Tensor,
    v_HVD: Tensor,
    pre: ComposeWeights,
    post: ComposeWeights,
    seen_CV: Tensor,
    scale: Tensor,
) -> list[Tensor | None]:
    """The gradients of q, k, v and the weights of pre and post, in their layouts: as :meth:`_Row.tensors`."""
    scores_CHV, probabilities_CHV, pre_latents = _probabilities(q_HCD, k_HVD, pre, seen_CV, scale)
    composed_CHV, post_latents = _compose_forward(probabilities_CHV, post)
    # dv = P'^T dout;  dP' = dout v^T;  dP = compose_post^T(dP')
    dv_HVD = torch.bmm(composed_CHV.permute(1, 2, 0), dout_HCD)
    dcomposed_CHV = torch.bmm(dout_HCD, v_HVD.mT).transpose(0, 1)
    dprobabilities_CHV, dpost = _compose_backward(probabilities_CHV, dcomposed_CHV, post_latents, post)
    # dS' = P (dP - sum_v P dP). The sum is not flash attention's rowsum(dout * out), because compose comes between the
    # softmax and the product with v.
    delta_CH1 = (probabilities_CHV * dprobabilities_CHV).sum(-1, keepdim=True)
    dlogits_CHV = probabilities_CHV * (dprobabilities_CHV - delta_CH1)
    # dS = compose_pre^T(dS');  dq = scale dS k;  dk = scale dS^T q
    dscores_CHV, dpre = _compose_backward(scores_CHV, dlogits_CHV, pre_latents, pre)
    dscores_HCV = dscores_CHV.transpose(0, 1)
    dq_HCD, dk_HVD = torch.bmm(dscores_HCV, k_HVD) * scale, torch.bmm(dscores_HCV.mT, q_HCD) * scale
    return [dq_HCD, dk_HVD, dv_HVD, *dpre, *dpost]


@cache
def _compile(chunk_function: Any, kind: tuple, backend: str = "inductor") -> Any:
    """The compiled function for calls of one :meth:`_Row.kind`.

    torch counts the compilations of a code object and fails at the ninth, so each kind has one of its own. Within a
    kind only an accidental equality of sizes leads to another.
    """
    own = FunctionType(chunk_function.__code__.replace(), chunk_function.__globals__, chunk_function.__name__)
    # fullgraph: code that silently fell back to the interpreter in parts would be slower than chunked.py.
    return torch.compile(own, fullgraph=True, backend=backend)


class _Row(NamedTuple):
    """The tensors of one batch row, or a chunk of it, or gradients of those, in the layout and dtype of the formulas.

    Heads come first, with k and v repeated for each query head. pre and post have q1, q2 [C, R, H], qg [C, H],
    k1, k2 [R, H, V], kg [H, V].
    """

    q_HCD: Tensor
    k_HVD: Tensor
    v_HVD: Tensor
    pre: ComposeWeights
    post: ComposeWeights

    @classmethod
    def of(cls, call: Call, row: int) -> _Row:
        """A copy of a batch row of the call."""
        group = call.q.shape[2] // call.k.shape[2]
        dtype = torch.promote_types(call.q.dtype, torch.float32)

        def weights(stage: ComposeWeights) -> ComposeWeights:
            by_query = [None if w is None else _copy(w[row], 0, dtype, _UNUSED_QUERIES) for w in stage[:3]]
            by_key = [None if w is None else _copy(w[row].movedim(0, -1), -1, dtype, _UNUSED_KEYS) for w in stage[3:]]
            return ComposeWeights(*by_query, *by_key)

        q_HTD = _copy(call.q[row].transpose(0, 1), 1, dtype, _UNUSED_QUERIES)
        k_HSD, v_HSD = (x[row].transpose(0, 1).repeat_interleave(group, 0) for x in (call.k, call.v))
        k_HSD, v_HSD = (_copy(x, 1, dtype, _UNUSED_KEYS) for x in (k_HSD, v_HSD))
        return cls(q_HTD, k_HSD, v_HSD, weights(call.pre), weights(call.post))

    def tensors(self) -> list[Tensor | None]:
        """q, k, v and the twelve weights."""
        return [self.q_HCD, self.k_HVD, self.v_HVD, *self.pre, *self.post]

    def zeros_like(self) -> _Row:
        """Zeros where this has tensors."""
        q, k, v, *weights = (None if x is None else torch.zeros_like(x) for x in self.tensors())
        return _Row(q, k, v, ComposeWeights(*weights[:6]), ComposeWeights(*weights[6:]))

    def narrow(self, queries: slice, keys: slice) -> _Row:
        """Views of the tensors of these queries and keys."""

        def weights(stage: ComposeWeights) -> ComposeWeights:
            by_query = [None if w is None else w[queries] for w in stage[:3]]
            by_key = [None if w is None else w[..., keys] for w in stage[3:]]
            return ComposeWeights(*by_query, *by_key)

        q_HCD, k_HVD, v_HVD = self.q_HCD[:, queries], self.k_HVD[:, keys], self.v_HVD[:, keys]
        return _Row(q_HCD, k_HVD, v_HVD, weights(self.pre), weights(self.post))

    def kind(self) -> tuple:
        """What is compiled into the code: all but the numbers of queries and keys."""
        heads, _, head_dim = self.q_HCD.shape
        by_query, by_key = (
            [w for stage in (self.pre, self.post) for w in stage[part]] for part in (slice(3), slice(3, 6))
        )
        sizes = [w if w is None else w.shape[1:] for w in by_query] + [w if w is None else w.shape[:-1] for w in by_key]
        return heads, head_dim, self.q_HCD.dtype, self.q_HCD.device, *sizes

    def mark_dynamic(self) -> None:
        """Let the compiler treat the numbers of queries and keys as variables."""
        for x in (self.q_HCD, self.k_HVD, self.v_HVD):
            _mark_dynamic(x, 1)
        for stage in (self.pre, self.post):
            for name, w in stage.tensors().items():
                _mark_dynamic(w, 0 if name.startswith("q") else w.dim() - 1)

    def store_gradients(self, row: int, gradients: Gradients) -> None:
        """Copy these gradients of a batch row into those of the call: the inverse of :meth:`of`."""
        gradients.q[row] = self.q_HCD.transpose(0, 1)
        for gradient, x_HSD in ((gradients.k, self.k_HVD), (gradients.v, self.v_HVD)):
            # Query heads that share a key/value head add up.
            gradient[row] = x_HSD.unflatten(0, (gradient.shape[2], -1)).sum(1).transpose(0, 1)
        for stage, own in ((gradients.pre, self.pre), (gradients.post, self.post)):
            for name, gradient in stage.tensors().items():
                w = getattr(own, name)
                gradient[row] = w if name.startswith("q") else w.movedim(-1, 0)


def _copy(x: Tensor, axis: int, dtype: torch.dtype, unused: int) -> Tensor:
    """A copy with unused space before and after the positions, which are on this axis.

    So no chunk is contiguous or at the beginning of its memory, and those of queries and keys have other strides: the
    compiler would take all that into account, and compile again where it is otherwise.
    """
    shape = list(x.shape)
    shape[axis] += 2 * unused
    return x.new_empty(shape, dtype=dtype).narrow(axis, unused, x.shape[axis]).copy_(x)


def _mark_dynamic(x: Tensor, *axes: int) -> None:
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(x, axis)


def _chunks(row: _Row, call: Call, index: int) -> Iterator[tuple[slice, slice, _Row, Tensor]]:
    """The queries and keys of each chunk of batch row ``index``, their tensors, and the mask [C, V].

    The last chunk comes first. No two of its sizes are equal unless they must be, so the compiler does not specialize
    on an accidental equality.
    """
    heads, queries = row.q_HCD.shape[:2]
    offset, window, causal, all_keys = call.query_offset, call.window, call.causal, row.k_HVD.shape[1]
    longest = most_keys(range(offset, offset + queries), MAX_CHUNK_QUERIES, window, causal, all_keys)
    max_elements = min(MAX_SCORE_ELEMENTS, call.scratch_bytes // (SCRATCH_PER_SCORES * row.q_HCD.element_size()))
    size = min(MAX_CHUNK_QUERIES, max(1, max_elements // (heads * longest)))
    document_ids_1S = None if call.document_ids is None else call.document_ids[index : index + 1]
    for start in reversed(range(0, queries, size)):
        end = min(start + size, queries)
        keys = slice(*key_range(offset + start, offset + end - 1, window, causal, all_keys))
        chunk = row.narrow(slice(start, end), keys)
        positions = range(offset + start, offset + end), range(keys.start, keys.stop)
        # The mask is an argument, also where it hides nothing: windows and documents need no code of their own.
        seen = visible_keys(*positions, window, causal, document_ids_1S, row.q_HCD.device)
        if seen is None:
            seen = torch.ones(end - start, keys.stop - keys.start, dtype=torch.bool, device=row.q_HCD.device)
        elif document_ids_1S is not None:
            seen = seen[0].clone()  # the compiler would distinguish a view
        yield slice(start, end), keys, chunk, seen


@torch.no_grad()  # the compiler distinguishes that too
def _run(chunk_function: Any, douts: list[Tensor], chunk: _Row, seen_CV: Tensor, scale: float) -> Any:
    """The compiled ``chunk_function`` of these arguments, the first of which are ``douts``."""
    if 1 in seen_CV.shape:
        # The compiler does not treat a size of 1 as a variable, and so little work needs no compiling.
        return chunk_function(*douts, *chunk, seen_CV, scale)
    for x in douts:
        _mark_dynamic(x, 1)
    chunk.mark_dynamic()
    _mark_dynamic(seen_CV, 0, 1)
    # A number would be compiled into the code.
    factor = torch.tensor(scale, dtype=chunk.q_HCD.dtype, device=chunk.q_HCD.device)
    try:
        return _compile(chunk_function, chunk.kind())(*douts, *chunk, seen_CV, factor)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        warnings.warn(
            "backend 'compiled' continues without compiling: torch's recompile_limit was reached", stacklevel=2
        )
        return chunk_function(*douts, *chunk, seen_CV, factor)


def _forward(call: Call) -> list[Tensor]:
    out_BTHD = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    for index, out_THD in enumerate(out_BTHD):
        for queries, _, chunk, seen_CV in _chunks(_Row.of(call, index), call, index):
            out_HCD = _run(_chunk_forward, [], chunk, seen_CV, call.scale)
            out_THD[queries] = out_HCD.transpose(0, 1)
    return [out_BTHD]


def _backward(dout_BTHD: Tensor, _: list[Tensor], call: Call) -> Gradients:
    gradients = Gradients.empty(call)
    for index, dout_THD in enumerate(dout_BTHD):
        row = _Row.of(call, index)
        totals = row.zeros_like()
        dout_HTD = _copy(dout_THD.transpose(0, 1), 1, row.q_HCD.dtype, _UNUSED_QUERIES)
        for queries, keys, chunk, seen_CV in _chunks(row, call, index):
            of_chunk = _run(_chunk_backward, [dout_HTD[:, queries]], chunk, seen_CV, call.scale)
            for total, gradient in zip(totals.narrow(queries, keys).tensors(), of_chunk):
                if total is not None:
                    total.add_(gradient)
        totals.store_gradients(index, gradients)
    return gradients


compiled_attention = define_operator("compose_compiled", _forward, _backward)
