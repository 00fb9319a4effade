"""Every invalid argument raises a ValueError with its name, its value or shape, and what was expected."""

import math
import re

import pytest
import torch

from dcscale.ops import attention, choose_backend, compose_attention
from dcscale.testing.attention import arguments, random_inputs

CALL = {"batch": 2, "queries": 3, "keys": 5, "heads": 4, "kv_heads": 2, "head_dim": 6, "rank": 2}


def shaped(*shape):
    return torch.zeros(shape, dtype=torch.float64)


SHARED = {
    "q without heads": ({"q": shaped(2, 3, 6)}, {}, "q has shape (2, 3, 6), expected four axes [B, T, H, D]"),
    "q of integers": ({"q": shaped(2, 3, 4, 6).int()}, {}, "q is torch.int32, expected one of torch.float64"),
    "no queries": ({"q": shaped(2, 0, 4, 6)}, {}, "q has shape (2, 0, 4, 6), expected no empty axis"),
    "k without heads": ({"k": shaped(2, 5, 6)}, {}, "k has shape (2, 5, 6), expected [B=2, S, kv heads, D=6]"),
    "k of another batch": ({"k": shaped(3, 5, 2, 6)}, {}, "k has shape (3, 5, 2, 6), expected [B=2"),
    "k of another width": ({"k": shaped(2, 5, 2, 8)}, {}, "k has shape (2, 5, 2, 8), expected [B=2, S, kv heads, D=6]"),
    "no keys": ({"k": shaped(2, 0, 2, 6)}, {}, "k has shape (2, 0, 2, 6), expected"),
    "heads that do not divide": (
        {"k": shaped(2, 5, 3, 6)},
        {},
        "k has 3 heads (shape (2, 5, 3, 6)), expected a divisor",
    ),
    "k of another type": ({"k": shaped(2, 5, 2, 6).float()}, {}, "k (2, 5, 2, 6) is torch.float32, expected q's dtype"),
    "v of another shape": ({"v": shaped(2, 4, 2, 6)}, {}, "v has shape (2, 4, 2, 6), expected (2, 5, 2, 6)"),
    "v of another type": ({"v": shaped(2, 5, 2, 6).half()}, {}, "v (2, 5, 2, 6) is torch.float16, expected q's dtype"),
    "v elsewhere": ({"v": shaped(2, 5, 2, 6).to("meta")}, {}, "v (2, 5, 2, 6) is on meta, expected q's device, cpu"),
    "more queries than keys": (
        {"q": shaped(2, 6, 4, 6)},
        {},
        "q has 6 queries for 5 keys: every query must have its own key, so T <= S; for cross attention, where the two "
        "sequences are unrelated, pass causal=False",
    ),
    "window over another sequence": (
        {},
        {"causal": False, "window": 2},
        "window is given for 3 queries and 5 keys of unrelated sequences: pass query_offset if the queries are",
    ),
    "documents of another sequence": (
        {},
        {"causal": False, "document_ids": torch.zeros(2, 5, dtype=torch.int32)},
        "document_ids is given for 3 queries and 5 keys of unrelated sequences: pass query_offset if the queries are",
    ),
    "offset in another sequence": (
        {},
        {"causal": False, "query_offset": 3},
        "query_offset is 3, expected 0 <= query_offset <= S - T = 2",
    ),
    "negative offset": ({}, {"query_offset": -1}, "query_offset is -1, expected 0 <= query_offset <= S - T = 2"),
    "offset beyond the keys": ({}, {"query_offset": 3}, "query_offset is 3, expected 0 <= query_offset <= S - T = 2"),
    "empty window": ({}, {"window": 0}, "window is 0, expected an integer >= 1"),
    "half a window": ({}, {"window": 2.5}, "window is 2.5, expected an integer >= 1"),
    "scale that is no number": (
        {},
        {"scale": math.nan},
        "scale is nan, expected a finite number, or None for 1/sqrt(D)",
    ),
    "infinite scale": ({}, {"scale": -math.inf}, "scale is -inf, expected a finite number"),
    "scale as text": ({}, {"scale": "0.5"}, "scale is '0.5', expected a finite number"),
    "scale as a tensor": ({}, {"scale": torch.tensor(0.5)}, "scale is tensor(0.5000), expected a finite number"),
    "scale as a flag": ({}, {"scale": True}, "scale is True, expected a finite number"),
    "documents of the queries": (
        {},
        {"document_ids": torch.zeros(2, 3, dtype=torch.int32)},
        "document_ids has shape (2, 3), expected [B=2, S=5]",
    ),
    "documents as floats": (
        {},
        {"document_ids": torch.zeros(2, 5)},
        "document_ids is torch.float32, expected integers",
    ),
    "documents elsewhere": (
        {},
        {"document_ids": torch.zeros(2, 5, dtype=torch.int32, device="meta")},
        "document_ids (2, 5) is on meta, expected q's device, cpu",
    ),
}
COMPOSE = {
    "flat low-rank weight": (
        {"pre.q1": shaped(2, 3, 4)},
        {},
        "pre.q1 has shape (2, 3, 4), expected [B=2, 3, R, H=4] with a rank R of at least 1",
    ),
    "rank 0": ({"post.k2": shaped(2, 5, 0, 4)}, {}, "post.k2 has shape (2, 5, 0, 4), expected [B=2, 5, R, H=4]"),
    "query weight for the keys": (
        {"pre.q2": shaped(2, 5, 2, 4)},
        {},
        "pre.q2 has shape (2, 5, 2, 4), expected (2, 3, 2, 4)",
    ),
    "key weight for the queries": (
        {"pre.k1": shaped(2, 3, 2, 4)},
        {},
        "pre.k1 has shape (2, 3, 2, 4), expected (2, 5, 2, 4)",
    ),
    "two ranks in a pair": (
        {"post.q2": shaped(2, 3, 3, 4)},
        {},
        "post.q2 has shape (2, 3, 3, 4), expected (2, 3, 2, 4)",
    ),
    "weight for the kv heads": (
        {"post.k1": shaped(2, 5, 2, 2)},
        {},
        "post.k1 has shape (2, 5, 2, 2), expected (2, 5, 2, 4)",
    ),
    "gate with a rank": ({"pre.qg": shaped(2, 3, 1, 4)}, {}, "pre.qg has shape (2, 3, 1, 4), expected (2, 3, 4)"),
    "gate of another length": ({"post.kg": shaped(2, 3, 4)}, {}, "post.kg has shape (2, 3, 4), expected (2, 5, 4)"),
    "weight of another type": (
        {"pre.q1": shaped(2, 3, 2, 4).float()},
        {},
        "pre.q1 (2, 3, 2, 4) is torch.float32, expected q's",
    ),
    "gate elsewhere": (
        {"post.qg": shaped(2, 3, 4).to("meta")},
        {},
        "post.qg (2, 3, 4) is on meta, expected q's device, cpu",
    ),
    "no scratch": ({}, {"scratch_bytes": 0}, "scratch_bytes is 0, expected at least 1, or None for the default"),
    "backend": ({}, {"backend": "fast"}, "backend is 'fast', expected one of 'auto', 'reference', 'chunked'"),
}


@pytest.mark.parametrize(
    ("tensors", "options", "message"), [*SHARED.values(), *COMPOSE.values()], ids=[*SHARED, *COMPOSE]
)
def test_compose_attention_rejects(tensors, options, message):
    inputs = random_inputs(**CALL).with_tensors(**tensors)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        compose_attention(*arguments(inputs.tensors), **options)


@pytest.mark.parametrize(("tensors", "options", "message"), SHARED.values(), ids=SHARED)
def test_attention_rejects(tensors, options, message):
    inputs = random_inputs(**CALL).with_tensors(**tensors)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        attention(*arguments(inputs.tensors)[:3], **options)


def test_weights_in_another_container_are_rejected():
    q, k, v, pre, post = arguments(random_inputs(**CALL).tensors)
    with pytest.raises(ValueError, match="post is a tuple, expected ComposeWeights, or None"):
        compose_attention(q, k, v, pre, tuple(post))


def test_the_unmodified_call_is_valid():
    """The call that the cases above modify."""
    inputs = random_inputs(**CALL)
    assert compose_attention(*arguments(inputs.tensors)).shape == (2, 3, 4, 6)
    assert attention(*arguments(inputs.tensors)[:3]).shape == (2, 3, 4, 6)


def test_choice_of_backend():
    q, _, _, pre, post = arguments(random_inputs(**CALL).tensors)
    assert choose_backend("auto", q, pre, post)[0] == "chunked"
    assert choose_backend("auto", q, None, post)[0] == "chunked"
    why = "without compose weights this is plain attention; not flash-attn-3 or flash-attn: it needs an NVIDIA GPU"
    assert choose_backend("auto", q) == ("sdpa flash", why + ", but q is on cpu")
    assert choose_backend("reference", q, pre, post) == ("reference", "requested")
    assert choose_backend("chunked", q) == ("chunked", "requested")
    with pytest.raises(ValueError, match="backend is 'fused', expected one of"):
        choose_backend("fused", q)
