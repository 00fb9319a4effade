"""The complete model: visibility, loss, recomputation, compose distances, invalid inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from dcscale.config.schema import ComposeConfig, RopeScalingConfig
from dcscale.models import DCFormer, initialize
from dcscale.ops import identity_distance
from dcscale.testing.models import random_ids, random_model, tiny_config

PYTHIA = {
    "ffn": "gelu",
    "norm": "layernorm",
    "bias": True,
    "parallel_residual": True,
    "rope_fraction": 0.25,
}


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)


def changed_positions(model: DCFormer, tokens: int, position: int) -> list[int]:
    """Positions whose logits change with the token at ``position``."""
    ids = random_ids(model.config, 1, tokens)
    other = ids.clone()
    other[0, position] = (other[0, position] + 1) % model.config.vocab_size
    with torch.no_grad():
        difference = (model(ids) - model(other)).abs().amax(-1)[0]
    return (difference > 1e-6).nonzero().flatten().tolist()


# -- parameters ------------------------------------------------------------------------------------------------


def test_parameter_names():
    names = [name for name, _ in DCFormer(tiny_config(layers=1, multi_gate=8)).named_parameters()]
    assert sorted(names) == sorted(
        ["embedding.weight", "norm.weight", "output.weight"]
        + [f"blocks.0.attention.{part}.weight" for part in ("q", "k", "v", "out", "q_norm", "k_norm")]
        + [f"blocks.0.attention.compose.{part}" for part in ("dw1", "qkw", "dd")]
        + [f"blocks.0.ffn.{part}.weight" for part in ("gate", "up", "down", "multi_gate")]
        + [f"blocks.0.{part}.weight" for part in ("attention_norm", "ffn_norm")]
    )


def test_parameter_names_of_pythia():
    names = [name for name, _ in DCFormer(tiny_config(layers=1, **PYTHIA)).named_parameters()]
    with_bias = [f"blocks.0.attention.{part}" for part in ("q", "k", "v", "out")]
    with_bias += ["blocks.0.ffn.up", "blocks.0.ffn.down", "blocks.0.attention_norm", "blocks.0.ffn_norm", "norm"]
    assert sorted(names) == sorted(
        [f"{owner}.{part}" for owner in with_bias for part in ("weight", "bias")]
        + ["embedding.weight", "output.weight"]
        + ["blocks.0.attention.q_norm.weight", "blocks.0.attention.k_norm.weight"]
        + [f"blocks.0.attention.compose.{part}" for part in ("dw1", "qkw", "dd")]
    )


@pytest.mark.parametrize("changes", [{}, PYTHIA, {"kv_heads": 2, "multi_gate": 8}], ids=["dcformer", "pythia", "gqa"])
def test_mha_differs_only_by_compose(changes):
    model = DCFormer(tiny_config(**changes))
    plain = DCFormer(tiny_config(attention="mha", **changes))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    plain_shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    compose = {name for name in shapes if ".compose." in name}
    assert len(compose) == 3 * 2
    assert plain_shapes == {name: shape for name, shape in shapes.items() if name not in compose}


def test_no_buffers():
    assert not list(DCFormer(tiny_config()).buffers())


def test_tied_embeddings_are_one_parameter():
    config = tiny_config(tied_embeddings=True)
    model = random_model(config)
    assert model.output.weight is model.embedding.weight
    assert "output.weight" not in dict(model.named_parameters())

    untied = random_model(tiny_config())
    untied.load_state_dict(model.state_dict())
    ids = random_ids(config, 2, 7)
    assert torch.equal(model(ids), untied(ids))
    model(ids, targets_of(ids)).backward()
    untied(ids, targets_of(ids)).backward()
    torch.testing.assert_close(model.embedding.weight.grad, untied.embedding.weight.grad + untied.output.weight.grad)


# -- visibility ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_causality(backend):
    model = random_model(tiny_config(backend=backend))
    assert changed_positions(model, tokens=12, position=4) == list(range(4, 12))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_window_counts_the_query_itself(backend):
    model = random_model(tiny_config(backend=backend, layers=1, windows=[3]))
    assert changed_positions(model, tokens=12, position=4) == [4, 5, 6]


def test_windows_repeat_over_the_layers():
    model = DCFormer(tiny_config(layers=6, windows=[256, None, 16, 16]))
    assert [block.attention.window for block in model.blocks] == [256, None, 16, 16, 256, None]


@pytest.mark.parametrize("attention", ["dcmha", "mha"])
def test_documents_do_not_see_each_other(attention):
    model = random_model(tiny_config(attention=attention))
    ids = random_ids(model.config, 1, 14)
    documents = torch.tensor([[0] * 6 + [1] * 8], dtype=torch.int32)
    targets = targets_of(ids)
    targets[0, 5] = -100
    first, second = targets.clone(), targets.clone()
    first[0, 6:] = -100
    second[0, :6] = -100

    with torch.no_grad():
        loss_of_second = model(ids, second, documents)
        changed = ids.clone()
        changed[0, :6] = (changed[0, :6] + 7) % model.config.vocab_size
        assert model(changed, second, documents).item() == pytest.approx(loss_of_second.item(), rel=1e-12)
        assert model(changed, second).item() != pytest.approx(loss_of_second.item(), rel=1e-3)
        # Alone, the second document starts at position 0: the results differ only by rounding of the rotary table.
        alone = model(ids[:, 6:], targets[:, 6:])
        assert loss_of_second.item() == pytest.approx(alone.item(), rel=1e-6)
        assert model(ids, first, documents).item() == pytest.approx(model(ids[:, :6], targets[:, :6]).item(), rel=1e-6)


# -- blocks ----------------------------------------------------------------------------------------------------


def test_sequential_and_parallel_residual():
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    for parallel in (False, True):
        block = random_model(tiny_config(parallel_residual=parallel)).blocks[0]
        rope = (torch.ones(4, 4), torch.zeros(4, 4))
        attended = block.attention(block.attention_norm(x), rope)
        fed = block.ffn(block.ffn_norm(x if parallel else x + attended))
        torch.testing.assert_close(block(x, rope), x + attended + fed)


def test_multi_gate_scales_equal_parts():
    ffn = random_model(tiny_config(multi_gate=8)).blocks[0].ffn
    x = torch.randn(3, 2, 32, dtype=torch.float64)
    hidden = F.silu(ffn.gate(x)) * ffn.up(x)
    gates = ffn.multi_gate(x).softmax(-1)
    for part in range(8):
        hidden[..., part * 6 : (part + 1) * 6] *= gates[..., part : part + 1]
    torch.testing.assert_close(ffn(x), ffn.down(hidden))


def test_multi_gate_softmax_of_bfloat16_is_computed_in_float32():
    logits = torch.randn(64, 44, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(logits.softmax(-1), logits.float().softmax(-1).bfloat16())


# -- loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_chunk", [0, 5, 4096])
def test_the_loss_is_the_sum_over_targets(loss_chunk):
    model = random_model(tiny_config(), loss_chunk=loss_chunk)
    ids = random_ids(model.config, 3, 7)
    targets = targets_of(ids)
    targets[1, 2:5] = -100
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(ids, targets), expected)
    assert model(ids, torch.full_like(ids, -100)).item() == 0


def test_logits_at_chosen_positions():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 3, 7)
    at = torch.tensor([6, 0, 3])
    torch.testing.assert_close(model(ids, logits_at_B=at), model(ids)[torch.arange(3), at])
    several = torch.tensor([[6, 0], [3, 3], [1, 5]])
    torch.testing.assert_close(model(ids, logits_at_B=several), model(ids)[torch.arange(3)[:, None], several])


def test_bfloat16_model_gives_float32_logits_and_loss_close_to_float32():
    config = tiny_config()
    model = random_model(config, dtype=torch.float32)
    ids = random_ids(config, 2, 40)
    logits, loss = model(ids), model(ids, targets_of(ids))
    model.bfloat16()
    assert model(ids).dtype == torch.float32
    assert model(ids, targets_of(ids)).dtype == torch.float32
    assert (model(ids) - logits).norm() / logits.norm() < 0.03
    assert model(ids, targets_of(ids)).item() == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("attention", ["dcmha", "mha"])
def test_the_initial_loss_is_that_of_a_uniform_distribution(attention):
    config = tiny_config(attention=attention, vocab_size=251)
    model = DCFormer(config)
    initialize(model, config, seed=0)
    ids = random_ids(config, 4, 32)
    loss = model(ids, targets_of(ids)) / (4 * 31)
    assert loss.item() == pytest.approx(math.log(251), rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"attention": "mha"}, {**PYTHIA, "tied_embeddings": True}])
def test_it_overfits_a_few_sequences(changes):
    config = tiny_config(**changes)
    model = DCFormer(config)
    initialize(model, config, seed=0)
    ids = random_ids(config, 2, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(ids, targets_of(ids)) / 30
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


# -- recomputation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_is_bit_equal(dtype):
    config = tiny_config()
    kept, recomputed = (random_model(config, dtype=dtype, recompute=recompute) for recompute in ("none", "block"))
    runs = []
    recomputed.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    ids = random_ids(config, 2, 20)
    documents = torch.arange(20).div(7, rounding_mode="floor").expand(2, -1)
    losses = [model(ids, targets_of(ids), documents) for model in (kept, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert len(runs) == 2
    for (name, one), (_, other) in zip(kept.named_parameters(), recomputed.named_parameters()):
        assert torch.equal(one.grad, other.grad), name
    with torch.no_grad():
        recomputed(ids)
    assert len(runs) == 3


# -- compose distances -----------------------------------------------------------------------------------------


def test_compose_distances():
    model = random_model(tiny_config(layers=3))
    ids = random_ids(model.config, 2, 9)
    documents = torch.zeros(2, 9, dtype=torch.int32)
    distances = model.compose_distances(ids.int(), documents)
    assert list(distances) == [f"{stage}/layer_{layer:02d}" for layer in range(3) for stage in ("pre", "post")]
    compose = model.blocks[0].attention.compose
    pre, post = compose(model.blocks[0].attention_norm(model.embedding(ids)))
    torch.testing.assert_close(distances["pre/layer_00"], identity_distance(pre))
    torch.testing.assert_close(distances["post/layer_00"], identity_distance(post))
    assert all(distance.dtype == torch.float32 and distance.dim() == 0 for distance in distances.values())
    assert not any(distance.requires_grad for distance in distances.values())
    assert not compose._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compose_distances_of_parts_of_compose():
    model = random_model(tiny_config(compose=ComposeConfig(post=False)))
    assert list(model.compose_distances(random_ids(model.config, 1, 5))) == ["pre/layer_00", "pre/layer_01"]
    assert random_model(tiny_config(attention="mha")).compose_distances(random_ids(model.config, 1, 5)) == {}


def test_initial_compose_is_near_the_identity():
    config = tiny_config(dim=128, heads=8)
    model = DCFormer(config)
    initialize(model, config, seed=0)
    assert all(0 < distance < 0.05 for distance in model.compose_distances(random_ids(config, 2, 16)).values())


def test_compose_distances_of_compiled_blocks():
    model = random_model(tiny_config())
    ids = random_ids(model.config, 1, 5)
    expected = model.compose_distances(ids)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(ids)  # compiles the blocks for this call, without hooks
    assert model.compose_distances(ids) == expected


# -- invalid inputs --------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids_BT": IDS.float()}, r"input_ids must be int32 or int64 .* is torch.float32 \[2, 5\]"),
        ({"input_ids_BT": IDS[0]}, r"input_ids .* is torch.int64 \[5\]"),
        ({"input_ids_BT": IDS[:, :0]}, r"input_ids .* is torch.int64 \[2, 0\]"),
        ({"targets_BT": IDS[:, 1:]}, r"targets must be torch.int64 of input_ids' shape \[2, 5\], .* \[2, 4\]"),
        ({"targets_BT": IDS.int()}, r"targets .* is torch.int32"),
        ({"document_ids_BT": IDS[:1]}, r"document_ids .* is torch.int64 \[1, 5\]"),
        ({"document_ids_BT": IDS.bool()}, r"document_ids .* is torch.bool"),
        ({"logits_at_B": IDS[:, 0], "targets_BT": IDS}, "logits_at and targets were both given"),
        ({"logits_at_B": IDS[None]}, r"logits_at .* each of the 2 rows, but is torch.int64 \[1, 2, 5\]"),
        ({"logits_at_B": IDS[0]}, r"logits_at .* each of the 2 rows, but is torch.int64 \[5\]"),
        ({"logits_at_B": IDS[:, 0].int()}, r"logits_at must be torch.int64 .* is torch.int32"),
    ],
)
def test_invalid_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        DCFormer(tiny_config())(**{"input_ids_BT": IDS, **inputs})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "dcmh"}, "model.attention is 'dcmh', but must be one of 'dcmha', 'mha'"),
        ({"backend": "fast"}, "model.backend is 'fast'"),
        ({"ffn": "relu"}, "model.ffn is 'relu'"),
        ({"norm": "none"}, "model.norm is 'none'"),
        ({"rope_scaling": RopeScalingConfig("yarn")}, "model.rope_scaling.kind is 'yarn'"),
        ({"compose": ComposeConfig(gelu="sigmoid")}, "model.compose.gelu is 'sigmoid'"),
        ({"windows": []}, r"model.windows is \[\]"),
        ({"windows": [4, 0]}, r"model.windows is \[4, 0\]"),
        ({"multi_gate": 7}, "multi_gate 7 does not divide ffn_dim 48"),
        ({"multi_gate": 0}, "multi_gate 0 does not divide ffn_dim 48"),
        ({"multi_gate": 8, "ffn": "gelu"}, "multi_gate 8 needs ffn swiglu"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DCFormer(tiny_config(**changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recompute": "all"}, "train.recompute is 'all', but must be one of 'none', 'block'"),
        ({"loss_chunk": -1}, "train.loss_chunk is -1"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCFormer(tiny_config(), **arguments)


@pytest.fixture
def nothing_compiled():
    """Nothing has been compiled before, and what is does not count in other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.usefixtures("nothing_compiled")
def test_blocks_with_many_windows_are_all_compiled():
    """More kinds of blocks than torch compiles a function for by default."""
    model = random_model(tiny_config(attention="mha", layers=9, windows=list(range(1, 10))))
    ids, graphs = random_ids(model.config, 1, 4), []
    expected = model(ids)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # restores it
        model.compile_blocks(backend=backend)
        torch.testing.assert_close(model(ids), expected)
    assert len(graphs) == 9
