"""Parameter and FLOP counts against formulas written by hand and torch's own counter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcscale.config.load import load_config
from dcscale.config.schema import ComposeConfig
from dcscale.models import DCFormer, count_flops, count_parameters
from dcscale.testing.models import random_ids, random_model, tiny_config

PRESETS = Path(__file__).parents[2] / "configs" / "model"
PUBLISHED = {  # layers, dim, heads, ffn_dim, multi_gate
    "dcformer-405m": (24, 1024, 16, 2816, 0),
    "dcformer-2.8b": (32, 2560, 32, 6912, 0),
    "dcformer-8b": (48, 4096, 32, 5632, 44),
    "dcpythia-6.9b": (32, 4096, 32, 16384, 0),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_of_the_published_sizes(preset):
    layers, dim, heads, ffn_dim, gates = PUBLISHED[preset]
    pythia = preset.startswith("dcpythia")
    config = load_config([PRESETS / f"{preset}.yaml"]).config.model
    count = count_parameters(config)
    assert count.embedding == count.output == config.vocab_size * dim
    assert count.attention == layers * (4 * dim**2 + (4 * dim if pythia else 0))
    assert count.compose == layers * (20 * dim * heads + 64 * heads**2)
    assert count.ffn == layers * (2 * dim * ffn_dim + ffn_dim + dim if pythia else 3 * dim * ffn_dim + gates * dim)
    block_norms = (4 if pythia else 2) * dim + 2 * dim // heads
    assert count.norm == layers * block_norms + (2 if pythia else 1) * dim
    assert count.total == count.embedding + count.attention + count.compose + count.ffn + count.norm + count.output

    plain = count_parameters(replace(config, attention="mha"))
    assert plain == replace(count, compose=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "kv_heads": 2},
        {"attention": "mha", "head_dim": 6},
        {"compose": ComposeConfig(rank=3, post=False)},
        {"ffn": "gelu", "bias": True, "norm": "layernorm"},
    ],
)
def test_parameters_equal_those_of_a_built_model(changes):
    config = tiny_config(**changes)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in DCFormer(config).parameters())


def test_a_tied_output_has_no_parameters_but_flops():
    tied, untied = tiny_config(tied_embeddings=True), tiny_config()
    assert count_parameters(tied).output == 0
    assert count_parameters(untied).output == 61 * 32
    assert count_flops(tied, 8) == count_flops(untied, 8)


@pytest.mark.parametrize("changes", [{}, {"multi_gate": 8}, {"ffn": "gelu", "bias": True}, {"kv_heads": 1}])
def test_matrix_products_agree_with_torchs_counter(changes):
    batch, tokens = 2, 6
    config = tiny_config(windows=[None], backend="reference", **changes)
    model = random_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_ids(config, batch, tokens))
    counted = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    flops = count_flops(config, tokens)

    def of(part: str) -> float:
        return sum(counted[f"DCFormer.blocks.{layer}.{part}"] for layer in range(config.layers)) * 3 / (batch * tokens)

    assert flops.ffn == of("ffn")
    assert flops.compose_projection == of("attention.compose")
    assert flops.attention_projections == sum(of(f"attention.{part}") for part in ("q", "k", "v", "out"))
    assert flops.output == counted["DCFormer.output"] * 3 / (batch * tokens)


def test_scores_agree_with_torchs_counter():
    batch, tokens = 2, 7
    config = tiny_config(attention="mha", windows=[None], backend="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        random_model(config)(random_ids(config, batch, tokens))
    flops = count_flops(config, tokens)
    # The reference computes all tokens * tokens scores. A causal query sees (tokens + 1) / 2 keys on average.
    dense = flops.total + flops.scores * (2 * tokens / (tokens + 1) - 1)
    assert dense * batch * tokens / 3 == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize(
    ("compose", "per_pair"),
    [
        ({}, 40),
        ({"post": False}, 20),
        ({"key_wise": False}, 20),
        ({"rank": 1}, 24),
        ({"gates": False}, 32),
        ({"low_rank": False}, 8),
        ({"low_rank": False, "gates": False}, 0),
    ],
)
def test_compose_apply(compose, per_pair):
    config = tiny_config(windows=[3, None], compose=ComposeConfig(**compose))
    tokens = 11
    pairs = sum(min(t + 1, 3) + (t + 1) for t in range(tokens))
    assert count_flops(config, tokens).compose_apply == pytest.approx(3 * per_pair * 4 * pairs / tokens)


@pytest.mark.parametrize("window", [1, 5, 11, 12, 1000, None])
def test_scores_of_a_window(window):
    config = tiny_config(layers=1, windows=[window])
    tokens = 11
    pairs = sum(min(t + 1, window or tokens) for t in range(tokens))
    assert count_flops(config, tokens).scores == pytest.approx(3 * 4 * 32 * pairs / tokens)


def test_mha_costs_the_same_without_compose():
    composed, plain = (count_flops(tiny_config(attention=attention), 9) for attention in ("dcmha", "mha"))
    assert plain.compose_projection == plain.compose_apply == 0
    assert composed.total - composed.compose_projection - composed.compose_apply == pytest.approx(plain.total)


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="sequence_length is 0"):
        count_flops(tiny_config(), 0)
