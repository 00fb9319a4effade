"""Decoding with a cache gives the same logits as the full forward pass, in bounded memory."""

import pytest
import torch

from dcscale.config.schema import ComposeConfig, RopeScalingConfig
from dcscale.models.cache import MIN_SPARE, ROPE_AHEAD, LayerCache
from dcscale.ops import ComposeWeights
from dcscale.ops.compose.decode import MAX_QUERIES
from dcscale.testing.models import random_ids, random_model, tiny_config

PYTHIA = {"ffn": "gelu", "norm": "layernorm", "bias": True, "parallel_residual": True, "rope_fraction": 0.5}
MODELS = {
    "dcformer": {},
    "reference": {"backend": "reference"},
    "windows of one and longer than the text": {"layers": 3, "windows": [1, 100, 2]},
    "pythia": PYTHIA,
    "stretched frequencies": {"rope_scaling": RopeScalingConfig("llama3", 4.0, original_length=16)},
    "grouped queries": {"kv_heads": 2, "multi_gate": 8, "qk_norm": False},
    "mha": {"attention": "mha"},
    "mha with grouped queries": {"attention": "mha", "kv_heads": 1, "tied_embeddings": True},
    "pre only": {"compose": ComposeConfig(post=False)},
    "post only": {"compose": ComposeConfig(pre=False)},
    "query side only": {"compose": ComposeConfig(key_wise=False)},
    "key side only": {"compose": ComposeConfig(query_wise=False)},
    "gates only": {"compose": ComposeConfig(low_rank=False)},
    "no gates": {"compose": ComposeConfig(gates=False, rank=3)},
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest absolute error of logits of the order 1."""


@torch.no_grad()
def decoded(model, ids_BT, sizes, padding=None, **options):
    """The logits at every position, from calls with ``sizes`` tokens, then one token at a time."""
    cache, parts, begin = model.new_cache(padding, **options), [], 0
    while begin < ids_BT.shape[1]:
        size = sizes[len(parts)] if len(parts) < len(sizes) else 1
        parts.append(model(ids_BT[:, begin : begin + size], cache=cache))
        begin += size
        assert cache.length == min(begin, ids_BT.shape[1])
    return torch.cat(parts, dim=1)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=TOLERANCE[expected.dtype], rtol=0)


SMALL_BUFFERS = {"min_spare": 2}
"""New buffers are needed every few tokens, so that short texts test them."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_position_equals_the_full_forward_pass(changes, dtype):
    model = random_model(tiny_config(**changes), dtype=dtype)
    ids = random_ids(model.config, 2, 26)
    with torch.no_grad():
        expected = model(ids)
    for sizes, fuse in (([], True), ([3, 9, 1, 1, 6], False), ([5, 2, 3, 4, 8], True)):
        assert_close(decoded(model, ids, sizes, fuse=fuse, **SMALL_BUFFERS), expected)


def test_a_long_text():
    model = random_model(tiny_config(windows=[70, None]))
    ids = random_ids(model.config, 1, 300)
    with torch.no_grad():
        assert_close(decoded(model, ids, [150]), model(ids))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_rows_of_different_lengths_equal_each_alone(changes, dtype):
    model = random_model(tiny_config(**changes), dtype=dtype)
    ids, padding = random_ids(model.config, 4, 24), [0, 9, 17, 3]
    padded = decoded(model, ids, [18, 2], padding, fuse=True, **SMALL_BUFFERS)
    for row, left in enumerate(padding):
        with torch.no_grad():
            assert_close(padded[row, left:], model(ids[row : row + 1, left:])[0])


def test_padding_would_change_the_logits_if_it_were_seen():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 2, 12)
    assert (decoded(model, ids, [9], [0, 5]) - decoded(model, ids, [9]))[1, 5:].abs().amin(0).max() > 0.1


def test_a_row_may_be_padding_for_several_calls():
    model = random_model(tiny_config())
    ids, padding = random_ids(model.config, 2, 20), [0, 11]
    with torch.no_grad():
        assert_close(decoded(model, ids, [4, 4, 2], padding)[1, 11:], model(ids[1:, 11:])[0])


def test_bfloat16_is_as_close_to_float32_as_the_full_forward_pass():
    exact = random_model(tiny_config(), dtype=torch.float32)
    model = random_model(tiny_config(), dtype=torch.float32).bfloat16()
    ids = random_ids(model.config, 2, 24)
    with torch.no_grad():
        expected = exact(ids)
        error = (model(ids) - expected).abs().mean()
        assert (decoded(model, ids, [9]) - expected).abs().mean() < 1.2 * error


@torch.no_grad()
def test_a_text_longer_than_the_first_rotary_table():
    model = random_model(tiny_config(layers=1))
    ids = random_ids(model.config, 2, ROPE_AHEAD + 40)
    cache = model.new_cache([0, 3])
    model(ids[:, :10], cache=cache)
    model(ids[:, 10:-1], cache=cache)
    assert_close(model(ids[:, -1:], cache=cache)[0], model(ids[:1])[0, -1:])


# -- fused projections -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_with_fused_projections():
    exact = random_model(tiny_config(), dtype=torch.float32)
    model = random_model(tiny_config(), dtype=torch.float32).bfloat16()
    ids = random_ids(model.config, 2, 24)
    expected = exact(ids)
    error = (model(ids) - expected).abs().mean()
    assert (decoded(model, ids, [9], fuse=True) - expected).abs().mean() < 1.2 * error


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dcmha", "mha"])
def test_under_autocast(attention):
    model = random_model(tiny_config(attention=attention), dtype=torch.float32)
    ids = random_ids(model.config, 2, 12)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(ids) - expected).abs().mean()
        assert (decoded(model, ids, [7, 2], fuse=True) - expected).abs().mean() < 1.2 * error


@torch.no_grad()
@pytest.mark.parametrize("name", ["q", "k_norm", "compose"])
def test_modules_with_hooks_are_called(name):
    model = random_model(tiny_config())
    ids, calls = random_ids(model.config, 1, 8), []
    for block in model.blocks:
        getattr(block.attention, name).register_forward_pre_hook(lambda *_: calls.append(1))
    decoded(model, ids, [], fuse=True)
    assert len(calls) == 8 * len(model.blocks)


@torch.no_grad()
def test_modules_of_other_types_are_called():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = random_model(tiny_config())
    ids = random_ids(model.config, 1, 8)
    plain = decoded(model, ids, [], fuse=True)
    for block in model.blocks:
        block.attention.v.__class__ = Doubled
    assert_close(decoded(model, ids, [], fuse=True), model(ids))
    assert (decoded(model, ids, [], fuse=True) - plain).abs().max() > 0.1


@torch.no_grad()
def test_weights_are_copied_only_where_they_are_used():
    model = random_model(tiny_config())
    for fuse, tokens, copied in ((True, MAX_QUERIES + 1, False), (False, 1, False), (True, 1, True)):
        cache = model.new_cache(fuse=fuse)
        model(random_ids(model.config, 1, tokens), cache=cache)
        assert [layer.fused is not None for layer in cache.layers] == [copied] * 2


@torch.no_grad()
def test_the_last_logits_and_the_loss_of_new_tokens():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 2, 12)
    targets = ids.roll(-1, 1)
    cache = model.new_cache()
    last = model(ids[:, :7], logits_at_B=torch.tensor([6, 6]), cache=cache)
    assert_close(last, model(ids)[:, 6])
    expected = model(ids, targets.index_fill(1, torch.arange(7), -100))
    assert model(ids[:, 7:], targets[:, 7:], cache=cache).item() == pytest.approx(expected.item(), rel=1e-6)


# -- memory ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_layer_with_a_window_keeps_only_its_window():
    model = random_model(tiny_config(windows=[5, None]), dtype=torch.float32)
    cache = model.new_cache()
    model(random_ids(model.config, 2, 1000), cache=cache)
    for _ in range(200):
        model(random_ids(model.config, 2, 1), cache=cache)
    # k and v [B, S, 4, 8]; pre and post each k1, k2 [B, S, 2, 4] and kg [B, S, 4], in float32.
    position = 2 * 4 * (2 * 4 * 8 + 2 * (2 * 2 * 4 + 4))
    local, everything = (layer.bytes / position for layer in cache.layers)
    assert local == 4 + MIN_SPARE
    assert 1200 <= everything <= 1.25 * 1200
    assert cache.bytes == sum(layer.bytes for layer in cache.layers)


def test_copies_grow_with_the_length_and_not_with_its_square():
    layer, made, previous = LayerCache(None), 0, None
    tensor = torch.zeros(1, 1, 1, 2)
    for _ in range(20_000):
        layer.extend(tensor, tensor, None, None)
        if layer._buffers["k"] is not previous:
            previous = layer._buffers["k"]
            made += previous.shape[1]
    assert layer.length == 20_000
    assert made < 6 * 20_000


def test_query_side_weights_are_not_kept():
    layer, x = LayerCache(3), torch.ones(1, 2, 2, 4)
    weights = ComposeWeights(q1=x, q2=x, qg=x[:, :, 0])
    for _ in range(2):
        _, _, pre, post = layer.extend(x, x, weights, None)
        assert post is None
        assert pre.tensors().keys() == {"q1", "q2", "qg"}
        assert pre.q1 is x
    assert layer.bytes == 2 * (2 + MIN_SPARE) * 2 * 4 * 4


# -- wrong arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [[], [0, -1]])
def test_wrong_padding_is_refused(padding):
    with pytest.raises(ValueError, match=r"padding is \[.*\], but must list an integer of at least 0 for each row"):
        random_model(tiny_config()).new_cache(padding)


@torch.no_grad()
def test_arguments_that_exclude_one_another_are_refused():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 2, 4)
    with pytest.raises(ValueError, match=r"cache has padding for 3 rows, but input_ids has 2 rows"):
        model(ids, cache=model.new_cache([0, 1, 2]))
    with pytest.raises(ValueError, match="cache and document_ids were both given"):
        model(ids, None, torch.zeros_like(ids), cache=model.new_cache())
    with pytest.raises(ValueError, match="cache has 2 layers, but the model has 3"):
        random_model(tiny_config(layers=3))(ids, cache=model.new_cache())
    with torch.enable_grad(), pytest.raises(ValueError, match=r"while gradients are recorded.*use torch.no_grad\(\)"):
        model(ids, cache=model.new_cache())


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        (
            {},
            1,
            r"k \[2, S, 4, 8\] torch.float64 on cpu.*new tensors are k \[1, S, 4, 8\] torch.float64 on cpu",
        ),
        ({"kv_heads": 2}, 2, r"new tensors are k \[2, S, 2, 8\]"),
        ({"compose": ComposeConfig(rank=1)}, 2, r"holds.* \[2, S, 10, 4\].* new tensors are .* \[2, S, 6, 4\]"),
        ({"compose": ComposeConfig(gates=False)}, 2, r"new tensors are .* pre.k1 \+ pre.k2 \+ post.k1 \+ post.k2 \["),
        (
            {"attention": "mha"},
            2,
            r"holds.* pre.k1 \+ .* \+ post.kg \[2, S, 10, 4\].* new tensors are k [^:]*, v \[2, S, 4, 8\] [a-z0-9. ]*:",
        ),
    ],
)
def test_another_batch_or_model_is_refused(changes, rows, message):
    model = random_model(tiny_config())
    ids, cache = random_ids(model.config, 2, 4), model.new_cache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=message + ".*create a new"):
        random_model(tiny_config(**changes))(ids[:rows], cache=cache)


@torch.no_grad()
def test_a_cache_cannot_be_used_after_a_failed_call():
    model = random_model(tiny_config())
    ids, cache = random_ids(model.config, 2, 4), model.new_cache()
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, cache=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"layers have seen \[0, 4\] positions.*create a new"):
        model(ids, cache=cache)
