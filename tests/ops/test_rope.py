import pytest
import torch

from dcscale.ops import apply_rope, llama3_frequencies, rope_table


def random_heads(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dim", "offset", "base"), [(8, 0, 10000.0), (8, 100_000, 500000.0), (2, 3, 10.0)])
def test_it_is_a_complex_product(dim, offset, base):
    """Dimensions (i, i + dim/2) are one complex number, rotated by position * base^(-2i/dim)."""
    x = random_heads(2, 5, 3, 8)
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(offset, offset + 5, dtype=torch.float64), frequencies)
    numbers = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim])
    rotated = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([rotated.real, rotated.imag, x[..., dim:]], dim=-1)

    cos, sin = rope_table(5, dim, base, offset=offset)
    assert cos.shape == sin.shape == (5, dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    # The table is in float32, and exact to its last bit at late positions too.
    torch.testing.assert_close(apply_rope(x, cos, sin), expected, rtol=0, atol=3e-7)
    torch.testing.assert_close(apply_rope(x, angles.cos(), angles.sin()), expected, rtol=0, atol=1e-14)


def test_scores_depend_on_the_distance_only():
    q, k = random_heads(1, 1, 1, 16), random_heads(1, 1, 1, 16)

    def score(query, key):
        rotated = [apply_rope(x, *rope_table(1, 16, 100.0, offset=at)) for x, at in ((q, query), (k, key))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=1e-6, atol=1e-6)
    assert not torch.isclose(score(7, 3), score(7, 4), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_types_are_rounded_once(dtype):
    x = random_heads(2, 9, 2, 12, dtype=dtype)
    table = rope_table(9, 8, 10000.0)
    result = apply_rope(x, *table)
    assert result.dtype == dtype
    assert torch.equal(result, apply_rope(x.float(), *table).to(dtype))
    assert torch.equal(result[..., 8:], x[..., 8:])


def test_lengths_are_kept_and_gradients_flow():
    x = random_heads(1, 4, 2, 6).requires_grad_()
    table = tuple(t.double() for t in rope_table(4, 6, 10.0))
    torch.testing.assert_close(apply_rope(x, *table).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda y: apply_rope(y, *table), x)


def test_frequencies_of_llama_3():
    """Long wavelengths are stretched, short ones kept, and those between interpolated; values computed by hand."""
    # original_length / wavelength: 64, 4 (the last that is kept), 2.5 (half-way), 1 (the first fully stretched), 0.01.
    periods = torch.tensor([64, 4, 2.5, 1, 0.01], dtype=torch.float64)
    frequencies = periods * 2 * torch.pi / 8192
    stretched = llama3_frequencies(frequencies, 8.0, 1.0, 4.0, 8192) / frequencies
    torch.testing.assert_close(stretched, torch.tensor([1, 1, 0.5625, 0.125, 0.125], dtype=torch.float64))
    cos, sin = rope_table(3, 4, 100.0, scale=lambda inverse: inverse / 2)
    torch.testing.assert_close((cos[2], sin[2]), tuple(part[1] for part in rope_table(3, 4, 100.0)))


@pytest.mark.parametrize("dim", [0, 3, -2])
def test_an_odd_number_of_dimensions_is_rejected(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}, expected an even number"):
        rope_table(4, dim, 10.0)


def test_tables_that_do_not_match_are_rejected():
    cos, sin = rope_table(4, 8, 10.0)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 2, 6\), expected \[B, T, H, D\] with D >= 8"):
        apply_rope(random_heads(1, 4, 2, 6), cos, sin)
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 8\), expected"):
        apply_rope(random_heads(4, 2, 8), cos, sin)
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 4\), expected both \[T=5, F\], or both \[B=1"):
        apply_rope(random_heads(1, 5, 2, 8), cos, sin)
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 4\) and \(2, 4, 4\), expected both"):
        apply_rope(random_heads(1, 4, 2, 8), cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(3, 4\), expected both"):
        apply_rope(random_heads(1, 4, 2, 8), cos, sin[:3])


def test_rows_at_different_positions():
    x = random_heads(2, 3, 2, 8)
    tables = [rope_table(3, 6, 10_000.0, offset=offset) for offset in (4, 11)]
    together = apply_rope(x, *(torch.stack(parts) for parts in zip(*tables)))
    assert torch.equal(together, torch.cat([apply_rope(x[row : row + 1], *table) for row, table in enumerate(tables)]))
