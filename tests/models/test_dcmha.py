"""The compose projection and the attention layer."""

import math

import pytest
import torch

from dcscale.config.schema import ComposeConfig
from dcscale.models import dcmha
from dcscale.models.blocks import Attention
from dcscale.models.dcmha import ComposeProjection, active_branches
from dcscale.ops import ComposeWeights, rope_table
from dcscale.testing.models import random_ids, random_model, tiny_config

DIM, HEADS = 24, 4
ALL = (("pre", "query"), ("pre", "key"), ("post", "query"), ("post", "key"))


def projection(seed: int = 0, dtype: torch.dtype = torch.float64, **switches) -> ComposeProjection:
    module = ComposeProjection(DIM, HEADS, ComposeConfig(**switches)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / DIM**0.5)
    return module


def tokens_input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gelu_by_hand(x: float, kind: str) -> float:
    if kind == "erf":
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_weights_follow_the_definition(gelu, rank):
    module = projection(gelu=gelu, rank=rank)
    x = tokens_input()
    weights = dict(zip(("pre", "post"), module(x)))
    b, t = 1, 3
    for c, (stage, side) in enumerate(ALL):
        hidden = torch.tensor([gelu_by_hand(h, gelu) for h in (x[b, t] @ module.dw1[:, c]).tolist()], dtype=x.dtype)
        w = sum(hidden[k] * module.qkw[c, k] for k in range(len(hidden)))
        w1, w2 = w[:rank], w[rank:]
        w1 = w1 / (w1.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gates = torch.tanh(x[b, t] @ module.dd[:, c * HEADS : (c + 1) * HEADS])
        for kind, expected in (("1", w1), ("2", w2), ("g", gates)):
            found = getattr(weights[stage], side[0] + kind)
            assert found.shape == (2, 5, *expected.shape)
            torch.testing.assert_close(found[b, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "off",
    [
        {"pre": False},
        {"post": False},
        {"query_wise": False},
        {"key_wise": False},
        {"low_rank": False},
        {"gates": False},
        {"pre": False, "query_wise": False},
        {"post": False, "key_wise": False, "gates": False},
    ],
    ids=lambda off: "-".join(off),
)
def test_parts_that_are_switched_off_have_neither_parameters_nor_weights(off):
    full, part = projection(), projection(**off)
    kept = [ALL.index(branch) for branch in active_branches(ComposeConfig(**off))]
    with torch.no_grad():
        if part.dw1 is not None:
            part.dw1.copy_(full.dw1[:, kept])
            part.qkw.copy_(full.qkw[kept])
        if part.dd is not None:
            part.dd.copy_(full.dd.unflatten(1, (4, HEADS))[:, kept].flatten(1))
    x = tokens_input()
    for stage, everything, found in zip(("pre", "post"), full(x), part(x)):
        assert (found is None) == (not off.get(stage, True))
        for name in ComposeWeights._fields if found is not None else ():
            side_is_on = off.get("query_wise" if name[0] == "q" else "key_wise", True)
            part_is_on = off.get("gates" if name[1] == "g" else "low_rank", True)
            if side_is_on and part_is_on:
                torch.testing.assert_close(getattr(found, name), getattr(everything, name), rtol=1e-12, atol=1e-12)
            else:
                assert getattr(found, name) is None


@pytest.mark.parametrize(
    "off",
    [{"pre": False, "post": False}, {"query_wise": False, "key_wise": False}, {"low_rank": False, "gates": False}],
)
def test_with_everything_switched_off_it_is_plain_attention(off):
    config = tiny_config(compose=ComposeConfig(**off))
    model, plain = random_model(config), random_model(tiny_config(attention="mha"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(model.state_dict())
    ids = random_ids(config, 2, 9)
    assert torch.equal(model(ids), plain(ids))
    with pytest.raises(ValueError, match="every part of compose is switched off"):
        ComposeProjection(DIM, HEADS, config.compose)


def test_zero_gates_and_zero_w2_are_plain_attention():
    model, plain = random_model(tiny_config()), random_model(tiny_config(attention="mha"))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".compose." not in name})
    ids = random_ids(model.config, 2, 9)
    assert (model(ids) - plain(ids)).abs().max() > 0.1
    with torch.no_grad():
        for block in model.blocks:
            block.attention.compose.dd.zero_()
            block.attention.compose.qkw[:, :, 2:].zero_()
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-10, atol=1e-10)


def test_bfloat16_weights_are_bfloat16_and_w1_is_normalised_in_float32():
    module = projection(dtype=torch.bfloat16)
    x = tokens_input(torch.bfloat16)
    pre, _ = module(x)
    assert {tensor.dtype for tensor in pre.tensors().values()} == {torch.bfloat16}
    hidden = torch.nn.functional.gelu(torch.einsum("bte,eck->btck", x, module.dw1), approximate="tanh")
    w1 = torch.einsum("btck,ckrh->btcrh", hidden, module.qkw)[:, :, 0, :2]
    exact = w1.float() / (w1.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    in_bfloat16 = w1 / (w1.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(pre.q1, exact.bfloat16())
    assert not torch.equal(in_bfloat16, exact.bfloat16())


def plain_attention_by_hand(layer: Attention, x, rope, window, document_ids=None):
    """Attention of a layer without compose, computed for each query and head separately."""
    cos, sin = rope
    heads = layer.q.out_features // layer.head_dim
    kv_heads = layer.k.out_features // layer.head_dim

    def rotated(vector, position, norm):
        if norm is not None:
            vector = vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight
        half = cos.shape[1]
        first, second, rest = vector.split([half, half, len(vector) - 2 * half])
        c, s = cos[position].double(), sin[position].double()
        return torch.cat([first * c - second * s, second * c + first * s, rest])

    rows = []
    for b in range(x.shape[0]):
        q, k, v = (
            projected(x[b]).unflatten(-1, (count, layer.head_dim))
            for projected, count in ((layer.q, heads), (layer.k, kv_heads), (layer.v, kv_heads))
        )
        for t in range(x.shape[1]):
            out = []
            for h in range(heads):
                g = h // (heads // kv_heads)
                seen = [
                    s
                    for s in range(t + 1)
                    if (window is None or t - s < window)
                    and (document_ids is None or document_ids[b, s] == document_ids[b, t])
                ]
                query = rotated(q[t, h], t, layer.q_norm)
                keys = torch.stack([rotated(k[s, g], s, layer.k_norm) for s in seen])
                weights = (keys @ query / math.sqrt(layer.head_dim)).softmax(0)
                out.append(weights @ v[seen, g])
            rows.append(layer.out(torch.cat(out)))
    return torch.stack(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(("scratch_mib", "expected"), [(None, None), (7, 7 * 2**20)])
def test_scratch_is_derived_from_each_call_unless_it_is_set(monkeypatch, scratch_mib, expected):
    used = []
    monkeypatch.setattr(dcmha, "compose_attention", lambda q, *_, **options: used.append(options["scratch_bytes"]) or q)
    config = tiny_config(windows=[5], layers=1, scratch_mib=scratch_mib)
    random_model(config)(random_ids(config, 2, 6))
    assert used == [expected]


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "bias": True},
        {"head_dim": 12, "rope_fraction": 0.5, "kv_heads": 1},
        {"qk_norm": False, "rope_base": 100.0},
    ],
    ids=["default", "grouped-queries-and-biases", "wide-head-partly-rotated", "no-qk-norm"],
)
def test_plain_attention_follows_the_definition(changes, backend):
    config = tiny_config(attention="mha", backend=backend, **changes)
    layer = random_model(config).blocks[0].attention
    rope_dim = int(config.rope_fraction * layer.head_dim)
    x = torch.randn(2, 8, config.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    documents = torch.tensor([[0] * 8, [0] * 3 + [1] * 5])
    rope = rope_table(8, rope_dim, config.rope_base)
    torch.testing.assert_close(
        layer(x, rope, documents), plain_attention_by_hand(layer, x, rope, 5, documents), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "dim 30 is not a multiple of heads 4"),
        ({"kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"rope_fraction": 0.2}, "rotates 1 of 8 head dimensions"),
        ({"rope_fraction": 0.4}, "rotates 3 of 8 head dimensions"),
        ({"rope_fraction": 1.5}, "rotates 12 of 8 head dimensions"),
        ({"compose": ComposeConfig(rank=0)}, "rank is 0"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Attention(tiny_config(**changes), window=None)


@pytest.mark.parametrize(
    "off", [{}, {"pre": False}, {"key_wise": False}, {"low_rank": False}, {"gates": False, "post": False}]
)
def test_shapes_are_those_of_the_weights(off):
    module = projection(**off)
    weights, shapes = module(tokens_input()), module.shapes(torch.device("cpu"), torch.bfloat16)
    for of_stage, like in zip(weights, shapes):
        assert (of_stage is None) == (like is None)
        for name, tensor in ({} if of_stage is None else of_stage.tensors()).items():
            found = like.tensors().pop(name)
            assert found.shape == (1, 1, *tensor.shape[2:])
            assert found.dtype == torch.bfloat16
        assert of_stage is None or of_stage.tensors().keys() == like.tensors().keys()


def test_implementations_and_their_reasons():
    composed, plain = random_model(tiny_config()), random_model(tiny_config(attention="mha"))
    ((name, why),) = composed.implementations(torch.device("cpu"))
    assert (name, why.split(";")[0]) == ("chunked", "not triton: it needs an NVIDIA GPU")
    ((name, why),) = plain.implementations(torch.device("cpu"))
    assert (name, why.split(";")[0]) == ("sdpa flash", "without compose weights this is plain attention")
    assert random_model(tiny_config(backend="reference")).implementations(torch.device("cpu")) == [
        ("reference", "requested")
    ]
