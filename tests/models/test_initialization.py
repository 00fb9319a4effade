"""Initial values: reproducible, by name, with the published standard deviations."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from dcscale.config.schema import ComposeConfig
from dcscale.models import DCFormer, initialize
from dcscale.models.init import standard_deviation
from dcscale.testing.models import tiny_config


def fresh(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    config = tiny_config(**changes)
    model = DCFormer(config)
    initialize(model, config, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_values_depend_only_on_seed_name_and_shape():
    torch.manual_seed(1)
    values = fresh()
    torch.manual_seed(2)
    more_layers = fresh(layers=5)
    for name, value in values.items():
        assert torch.equal(value, more_layers[name]), name
    plain = fresh(attention="mha")
    for name, value in plain.items():
        assert torch.equal(value, values[name]), name
    other_seed = fresh(seed=1)
    for name, value in values.items():
        assert torch.equal(value, other_seed[name]) == (value.dim() == 1), name


def test_parameters_of_equal_shape_have_different_values():
    values = fresh()
    assert not torch.equal(values["blocks.0.attention.q.weight"], values["blocks.0.attention.k.weight"])
    assert not torch.equal(values["blocks.0.attention.q.weight"], values["blocks.1.attention.q.weight"])


def test_the_global_random_state_is_unchanged():
    config = tiny_config()
    model = DCFormer(config)
    before = torch.get_rng_state()
    initialize(model, config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("gate_init", [0.005, 0.05])
def test_standard_deviations(gate_init):
    dim, heads, rank = 128, 8, 2
    values = fresh(
        dim=dim, heads=heads, ffn_dim=256, multi_gate=32, vocab_size=500, compose=ComposeConfig(gate_init=gate_init)
    )
    hidden = 2 * rank * heads
    expected = {
        "dw1": math.sqrt(2 / (dim + hidden)),
        "qkw": 0.02 / (math.sqrt(2 * heads * rank) * (heads + rank)),
        "dd": gate_init * math.sqrt(2 / (dim + heads)),
    }
    for name, value in values.items():
        if value.dim() == 1:
            assert (value == 1).all(), name
        else:
            std = expected.get(name.rpartition(".")[2], 0.006 * 1024 / dim)
            # Four standard errors of an estimate from that many values.
            assert value.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * value.numel())), name
            assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel()), name


@pytest.mark.parametrize(("dim", "std"), [(4096, 0.006), (1024, 0.006), (512, 0.012), (256, 0.024), (32, 0.05)])
def test_matrices_start_as_upstream_from_its_smallest_width_on(dim, std):
    for name in ("embedding.weight", "output.weight", "blocks.3.attention.out.weight", "blocks.11.ffn.down.weight"):
        assert standard_deviation(name, tiny_config(dim=dim)) == pytest.approx(std)


def test_biases_are_zero():
    values = fresh(bias=True, norm="layernorm", ffn="gelu")
    biases = [value for name, value in values.items() if name.endswith(".bias")]
    assert len(biases) == 2 * (4 + 2 + 2) + 1
    assert not any(bias.any() for bias in biases)


def test_values_are_drawn_in_float32_whatever_the_type():
    config = tiny_config()
    model = DCFormer(config).bfloat16()
    initialize(model, config, seed=0)
    for name, value in fresh().items():
        assert torch.equal(model.get_parameter(name), value.bfloat16()), name


def test_gather_collects_partitioned_parameters():
    """As with ZeRO-3: a parameter is empty except in the context."""
    config = tiny_config()
    model = DCFormer(config)
    full = {parameter: torch.empty_like(parameter) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)

    @contextmanager
    def gather(parameters):
        for parameter in parameters:
            parameter.data = full[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    with pytest.raises(ValueError, match=r"embedding.weight .* has no data to initialize"):
        initialize(model, config, seed=0)
    initialize(model, config, seed=0, gather=gather)
    for name, value in fresh().items():
        assert torch.equal(full[model.get_parameter(name)], value), name


def test_a_meta_model_is_refused():
    config = tiny_config()
    with torch.device("meta"):
        model = DCFormer(config)
    with pytest.raises(ValueError, match=r"on meta\) has no data to initialize: build the model on a real device"):
        initialize(model, config, seed=0)


def test_an_unknown_parameter_is_refused():
    config = tiny_config()
    model = DCFormer(config)
    model.blocks[0].extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"no initialization rule for the parameter 'blocks.0.extra.weight'"):
        initialize(model, replace(config), seed=0)
