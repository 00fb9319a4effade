"""DCMHA as a layer for other models: against the model's own layer, the definition, and plain attention."""

import pytest
import torch
from torch.nn import functional as F

from dcscale.config.schema import ComposeConfig
from dcscale.models import DCMHA
from dcscale.models.dcmha import Attention
from dcscale.models.init import compose_deviations
from dcscale.ops import ComposeWeights, compose_attention, rope_table
from dcscale.testing.models import tiny_config

DIM, CONTEXT_DIM, HEADS = 24, 20, 4


def layer(**options) -> DCMHA:
    """In float64, with compose weights that change the result a lot."""
    torch.manual_seed(0)
    module = DCMHA(DIM, HEADS, **options).double()
    with torch.no_grad():
        for projection in (module.compose_q, module.compose_k):
            projection.qkw.normal_()
            projection.dd.normal_(std=0.3)
    return module


def tokens(length: int, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, dim, generator=generator, dtype=torch.float64)


def expected(module: DCMHA, x: torch.Tensor, context: torch.Tensor, **options) -> torch.Tensor:
    """The layer's result by the reference, or without compose."""
    q, k, v = (
        project(source).unflatten(-1, (-1, module.head_dim))
        for project, source in ((module.q, x), (module.k, context), (module.v, context))
    )
    stages = zip(module.compose_q(x), module.compose_k(context))
    pre, post = (ComposeWeights(q1, q2, qg, k1, k2, kg) for (q1, q2, qg, *_), (*_, k1, k2, kg) in stages)
    out = compose_attention(q, k, v, pre, post, backend="reference", **options)
    return module.out(out.flatten(2))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 3}, {"causal": False, "window": 3, "kv_heads": 2, "head_dim": 5, "rank": 1}],
)
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 9]])])
def test_self_attention_equals_the_definition(options, documents):
    module, x = layer(**options), tokens(8)
    visible = {"causal": options.get("causal", True), "window": options.get("window"), "document_ids": documents}
    torch.testing.assert_close(module(x, document_ids_BT=documents), expected(module, x, x, **visible))


@pytest.mark.parametrize(("queries", "keys"), [(3, 11), (11, 3), (5, 5)])
def test_cross_attention_equals_the_definition(queries, keys):
    module = layer(context_dim=CONTEXT_DIM, causal=False, kv_heads=2)
    x, context = tokens(queries), tokens(keys, CONTEXT_DIM)
    out = module(x, context)
    assert out.shape == (2, queries, DIM)
    torch.testing.assert_close(out, expected(module, x, context, causal=False))


def test_equals_the_layer_of_the_model():
    """Branches of the model's projection are (pre, query), (pre, key), (post, query), (post, key)."""
    config = tiny_config(qk_norm=False)
    model_layer = Attention(config, window=4).double()
    module = DCMHA(config.dim, config.heads, kv_heads=config.kv_heads, head_dim=model_layer.head_dim, window=4).double()
    module.load_state_dict({name: torch.randn_like(value) / 4 for name, value in module.state_dict().items()})
    with torch.no_grad():
        for name in ("q", "k", "v", "out"):
            getattr(model_layer, name).load_state_dict(getattr(module, name).state_dict())
        for first, projection in enumerate((module.compose_q, module.compose_k)):
            model_layer.compose.dw1[:, first::2] = projection.dw1
            model_layer.compose.qkw[first::2] = projection.qkw
            gates = model_layer.compose.dd.unflatten(1, (4, config.heads))
            gates[:, first::2] = projection.dd.unflatten(1, (2, config.heads))
    x = torch.randn(2, 9, config.dim, dtype=torch.float64)
    rope = rope_table(9, model_layer.head_dim, base=100.0)
    torch.testing.assert_close(module(x, rope=rope), model_layer(x, rope))


def test_a_new_layer_is_close_to_plain_attention():
    torch.manual_seed(0)
    module = DCMHA(64, 8, causal=False)
    x = torch.randn(2, 20, 64)
    q, k, v = (project(x).unflatten(-1, (8, 8)).transpose(1, 2) for project in (module.q, module.k, module.v))
    plain = module.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    difference = (module(x) - plain).norm() / plain.norm()
    assert 0 < difference < 0.02


def test_initial_values_follow_the_rules_of_the_model():
    module = DCMHA(256, 16, context_dim=128, causal=False)
    for width, projection in ((256, module.compose_q), (128, module.compose_k)):
        for name, std in compose_deviations(width, 16, ComposeConfig()).items():
            assert getattr(projection, name).std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"context_dim": CONTEXT_DIM, "causal": False, "bias": True}])
def test_every_parameter_has_a_gradient(options):
    module = layer(**options)
    context = (tokens(4, CONTEXT_DIM),) if options else ()
    module(tokens(7), *context).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_under_autocast():
    module = DCMHA(DIM, HEADS, causal=False)
    x = tokens(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out - module(x)).norm() < 0.02 * module(x).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "dim 24 is not a multiple of heads 5: change one or set head_dim"),
        ({"kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"context_dim": 20}, r"causal=True and window=None have no meaning in cross attention \(context_dim 20\)"),
        ({"context_dim": 20, "causal": False, "window": 3}, "causal=False and window=3 have no meaning in cross"),
        ({"rank": 0}, "compose.rank is 0"),
    ],
)
def test_sizes_that_do_not_match_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        DCMHA(DIM, **{"heads": HEADS, **options})


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"context_BSC": tokens(3)}, r"context has shape \(2, 3, 24\), but this layer is self-attention: build it"),
        ({"context_dim": 24, "causal": False}, {}, "context is None, but this layer .* is cross attention"),
        (
            {"context_dim": 24, "causal": False},
            {"context_BSC": tokens(8), "document_ids_BT": torch.zeros(2, 8, dtype=torch.int32)},
            "document_ids and rope are for self-attention",
        ),
        (
            {"context_dim": 24, "causal": False},
            {"context_BSC": tokens(8), "rope": rope_table(8, 6, base=100.0)},
            "document_ids and rope are for self-attention",
        ),
    ],
)
def test_arguments_that_do_not_match_the_layer_are_rejected(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)(tokens(8), **arguments)
