"""The reference against the definition written another way: for each query and key one matrix over the heads."""

import pytest
import torch

from dcscale.testing.attention import COMPOSE_CALLS, assert_same, random_inputs


def matrices(weights):
    """What compose does to the heads, M[b, t, s] [H, H] = I + diag(qg + kg) + q2^T q1 + k2^T k1."""
    by_query = torch.einsum("btrh,btrg->bthg", weights.q2, weights.q1) + torch.diag_embed(weights.qg)
    by_key = torch.einsum("bsrh,bsrg->bshg", weights.k2, weights.k1) + torch.diag_embed(weights.kg)
    return torch.eye(by_query.shape[-1]) + by_query[:, :, None] + by_key[:, None]


def dense(q, k, v, pre, post, *, causal=True, window=None, scale=None, document_ids=None, query_offset=None):
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    # Unrelated sequences have neither a window nor documents, so that their offset does not matter.
    offset = keys - queries if query_offset is None else query_offset
    distance = offset + torch.arange(queries)[:, None] - torch.arange(keys)
    seen = (distance >= 0) | torch.tensor(not causal)
    seen = seen & (distance.abs() < (window or 10**9))
    if document_ids is not None:
        of_queries = document_ids[:, offset : offset + queries]
        seen = seen & (of_queries[:, :, None] == document_ids[:, None, :])
    scores = torch.einsum("bthd,bshd->btsh", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = torch.einsum("btshg,btsg->btsh", matrices(pre), scores).masked_fill(~seen[..., None], -torch.inf)
    probabilities = torch.einsum("btshg,btsg->btsh", matrices(post), logits.softmax(2))
    return torch.einsum("btsh,bshd->bthd", probabilities, v)


@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_equals_the_definition(options):
    inputs = random_inputs(**options)
    assert_same(inputs.run("reference"), inputs.run_function(dense))
