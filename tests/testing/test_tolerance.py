"""The error rule must accept correct results and nothing else."""

import pytest
import torch

from dcscale.testing.attention import check_error, check_results

TRUTH = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def off_by(relative, dtype=torch.float32):
    return (TRUTH * (1 + relative)).to(dtype)


def test_as_good_as_plain_passes():
    check_error("x", off_by(1e-3), off_by(1e-3), TRUTH, factor=1)
    check_error("x", off_by(1.9e-3), off_by(1e-3), TRUTH, factor=2)
    check_error("x", off_by(0), off_by(1e-3), TRUTH, factor=1)


def test_worse_than_the_factor_fails():
    with pytest.raises(AssertionError, match=r"^x: the error's norm is .* more than 2 x"):
        check_error("x", off_by(2.1e-3), off_by(1e-3), TRUTH, factor=2)


def test_one_wrong_element_fails():
    result = off_by(0)
    result[17] += 1e-3
    with pytest.raises(AssertionError):
        check_error("x", result, off_by(0), TRUTH, factor=3)


def test_rounding_is_always_allowed():
    narrow = off_by(0, torch.bfloat16)
    lucky = TRUTH.bfloat16().double()
    check_error("x", narrow, narrow, TRUTH, factor=1)
    check_error("x", narrow.roll(0), lucky.bfloat16(), lucky, factor=1)


def test_nan_fails():
    with pytest.raises(AssertionError, match="norm is nan"):
        check_error("x", torch.full((1000,), torch.nan), off_by(1e-3), TRUTH, factor=2)


def test_results_that_cannot_be_compared_are_rejected():
    with pytest.raises(AssertionError, match="cannot be compared"):
        check_error("x", off_by(0), off_by(0, torch.bfloat16), TRUTH, factor=2)
    with pytest.raises(AssertionError, match="cannot be compared"):
        check_error("x", TRUTH, TRUTH, TRUTH, factor=2)
    with pytest.raises(AssertionError, match="shapes"):
        check_error("x", off_by(0)[:5], off_by(0), TRUTH, factor=2)
    with pytest.raises(AssertionError, match="different results"):
        check_results({"out": off_by(0)}, {"q": off_by(0)}, {"out": TRUTH})


def test_gradients_may_be_further_off_than_the_output():
    plain, result = off_by(1e-3), off_by(2.5e-3)
    check_results({"q": result}, {"q": plain}, {"q": TRUTH})
    with pytest.raises(AssertionError, match=r"^out"):
        check_results({"out": result}, {"out": plain}, {"out": TRUTH})


def test_the_fraction_of_the_allowed_error_is_returned():
    fractions = check_results(*({"out": x, "q": x} for x in (off_by(1e-3), off_by(2e-3), TRUTH)))
    assert fractions["out"] == pytest.approx(1 / 4, rel=1e-3)
    assert fractions["q"] == pytest.approx(1 / 6, rel=1e-3)
    assert check_error("x", torch.zeros(9), torch.zeros(9), torch.zeros(9).double(), factor=1) == 0
