"""Generation: greedy and sampled, independent of the batch, deterministic, without side effects."""

import pytest
import torch

from dcscale.models import generate
from dcscale.models.generation import _generators, sample
from dcscale.testing.models import random_ids, random_model, tiny_config

PROMPTS = [[5, 9, 3, 7, 20, 11, 2], [8], [1, 2, 3]]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(), dtype=torch.float32)


def greedy(model, prompts, new_tokens=8, **arguments):
    return generate(model, prompts, new_tokens, temperature=0.0, top_p=1.0, seed=0, **arguments)


def sampled(model, prompts, seed=0, new_tokens=8):
    return generate(model, prompts, new_tokens, temperature=1.0, top_p=0.9, seed=seed)


def test_greedy_is_the_argmax_of_the_full_forward_pass(model):
    for prompt, continuation in zip(PROMPTS, greedy(model, PROMPTS)):
        sequence = list(prompt)
        for token in continuation:
            assert model(torch.tensor([sequence]))[0, -1].argmax().item() == token
            sequence.append(token)
        assert len(continuation) == 8


def test_samples_are_those_of_the_full_forward_pass(model):
    for prompt, generator, continuation in zip(PROMPTS, _generators(PROMPTS, seed=3), sampled(model, PROMPTS, seed=3)):
        sequence = list(prompt)
        for token in continuation:
            drawn = sample(model(torch.tensor([sequence]))[:, -1], 1.0, 0.9, torch.rand(1, generator=generator))
            assert drawn.item() == token
            sequence.append(token)


def test_the_model_reads_every_token_once(model):
    shapes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    greedy(model, PROMPTS, new_tokens=5)
    handle.remove()
    assert shapes == [(3, 7)] + 4 * [(3, 1)]


def test_prompts_of_different_lengths_do_not_affect_each_other(model):
    assert greedy(model, PROMPTS) == [greedy(model, [prompt])[0] for prompt in PROMPTS]
    assert sampled(model, PROMPTS) == [sampled(model, [prompt])[0] for prompt in PROMPTS]


def test_samples_depend_on_the_seed(model):
    assert sampled(model, PROMPTS, seed=1) == sampled(model, PROMPTS, seed=1)
    assert sampled(model, PROMPTS, seed=1) != sampled(model, PROMPTS, seed=2)


def test_a_repeated_prompt_gets_several_continuations(model):
    first, second, third = sampled(model, [PROMPTS[0]] * 3)
    assert first != second != third != first


def test_it_ends_before_the_stop_token(model):
    complete = greedy(model, PROMPTS)
    stop = complete[0][3]
    expected = [row[: row.index(stop)] if stop in row else row for row in complete]
    assert greedy(model, PROMPTS, stop_id=stop) == expected
    assert len({len(row) for row in expected}) > 1


def count_runs(model, **arguments) -> int:
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    greedy(model, PROMPTS[:1], **arguments)
    handle.remove()
    return len(runs)


def test_it_runs_the_same_number_of_times_on_every_rank(model):
    stop = greedy(model, PROMPTS[:1])[0][2]
    assert count_runs(model, stop_id=stop) <= 3
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert count_runs(model, stop_id=stop) == 8
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_it_has_no_side_effects(model, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    sampled(model, PROMPTS)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_compiled_blocks_are_not_recompiled_for_every_length(model):
    expected = greedy(model, PROMPTS)
    compiled = random_model(model.config, dtype=torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in compiled.blocks:
        block.compile(backend=backend)
    assert greedy(compiled, PROMPTS) == expected
    assert not graphs
    compiled(random_ids(model.config, 1, 4))
    assert graphs


def test_no_prompts(model):
    assert greedy(model, []) == []


# -- sampling --------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.2, 0.5, 0.3]]).log()


@pytest.mark.parametrize(
    ("top_p", "uniform", "token"),
    [
        (1.0, 0.0, 1),
        (1.0, 0.499, 1),
        (1.0, 0.501, 2),
        (1.0, 0.799, 2),
        (1.0, 0.801, 0),
        (1.0, 1 - 2**-24, 0),
        (0.6, 0.624, 1),  # of 0.5 and 0.3, 0.5 is 0.625
        (0.6, 0.626, 2),
        (0.6, 1 - 2**-24, 2),
        (0.5, 0.99, 1),
        (1e-9, 0.99, 1),
    ],
)
def test_sampling_inverts_the_cumulative_distribution(top_p, uniform, token):
    assert sample(LOGITS, 1.0, top_p, torch.tensor([uniform])).tolist() == [token]


def test_temperature_sharpens():
    # Squared and normalised: 0.04, 0.25, 0.09 of 0.38.
    assert sample(LOGITS, 0.5, 1.0, torch.tensor([0.25 / 0.38 - 1e-3])).tolist() == [1]
    assert sample(LOGITS, 0.5, 1.0, torch.tensor([0.25 / 0.38 + 1e-3])).tolist() == [2]


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [0.0, 5.0, 1.0]])
    for temperature in (1e-30, 1e-45, 1e-300):  # the last two are not normal numbers of float32
        assert sample(logits, temperature, 1.0, torch.tensor([0.99, 0.99])).tolist() == [0, 1]


# -- invalid arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(temperature):
    model = random_model(tiny_config(), dtype=torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, PROMPTS, 2, temperature, top_p=1.0, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [[1], []]}, "prompt 1 is empty"),
        ({"prompt_ids": [[1], [2, 61]]}, "prompt 1 has the token id 61, but the model's vocabulary has 61 ids"),
        ({"prompt_ids": [[-1]]}, "token id -1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_invalid_arguments_are_refused(model, changes, message):
    arguments = {"prompt_ids": PROMPTS, "new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
