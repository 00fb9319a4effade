import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from dcscale.ops import cross_entropy_sum

BATCH, TOKENS, WIDTH, VOCABULARY = 2, 11, 6, 17


def random_arguments(dtype=torch.float64, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    targets = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    targets[torch.rand(BATCH, TOKENS, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [0, 1, 4, 7, 11, 21, 22, 100])
def test_equals_cross_entropy(chunk):
    hidden, weight, targets = random_arguments()
    assert (targets == -100).any()
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    result = cross_entropy_sum(hidden, weight, targets, chunk)
    assert result.shape == ()
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
    for got, want in zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (result, expected))):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [0, 4])
def test_no_targets_give_a_loss_of_zero(chunk):
    hidden, weight, targets = random_arguments(ignored=1.1)
    loss = cross_entropy_sum(hidden, weight, targets, chunk)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [hidden, weight]):
        assert not gradient.any()


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_is_float32(dtype, chunk):
    hidden, weight, targets = random_arguments(dtype)
    result = cross_entropy_sum(hidden, weight, targets, chunk)
    assert result.dtype == torch.float32
    logits = F.linear(hidden, weight).double().flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)
    assert {g.dtype for g in torch.autograd.grad(result, [hidden, weight])} == {dtype}


def test_logits_of_one_chunk_only_are_kept():
    hidden, weight, targets = random_arguments()
    sizes = []
    with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        cross_entropy_sum(hidden, weight, targets, chunk=4)
    assert max(sizes) <= max(hidden.numel(), weight.numel()) < BATCH * TOKENS * VOCABULARY


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (9, 5), (2, 3)), r"hidden \(2, 3, 4\), weight \(9, 5\) and targets \(2, 3\) do not match"),
        (((2, 3, 4), (9, 4), (2, 4)), r"targets \(2, 4\) do not match: expected \[B, T, E\], \[V, E\] and \[B, T\]"),
        (((2, 3, 4), (1, 9, 4), (2, 3)), r"weight \(1, 9, 4\)"),
    ],
)
def test_shapes_that_do_not_match_are_rejected(shapes, message):
    hidden, weight, targets = shapes
    with pytest.raises(ValueError, match=message):
        cross_entropy_sum(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.long), 0)


def test_a_negative_chunk_is_rejected():
    with pytest.raises(ValueError, match="chunk is -1, expected a number of tokens, or 0"):
        cross_entropy_sum(*random_arguments(), chunk=-1)
