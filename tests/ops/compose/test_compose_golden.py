"""Backends against golden files of the official code, in float64: output and the gradients of all fifteen tensors."""

from pathlib import Path

import pytest
import torch

from dcscale.testing.models import checksums, golden_names, load_golden_attention

FOLDER = Path(__file__).parents[2] / "golden" / "attention"
NAMES = golden_names(FOLDER)


def test_the_cases_cover_what_matters():
    cases = [load_golden_attention(FOLDER, name) for name in NAMES]
    lengths = {case.inputs.tensors["q"].shape[1] for case in cases}
    assert {1, 7, 129} <= lengths
    assert {case.inputs.options["window"] for case in cases} >= {None, 16, 64}
    assert {len(case.inputs.tensors) for case in cases} == {3, 9, 15}
    assert max(case.inputs.tensors["q"].shape[0] for case in cases) > 1


def test_generated_inputs_equal_the_stored_ones():
    files = 0
    for case in (load_golden_attention(FOLDER, name) for name in NAMES):
        files += bool(case.stored_inputs)
        for tensor, stored in case.stored_inputs.items():
            assert torch.equal(case.inputs.tensors[tensor], stored.double()), tensor
    assert files >= 5


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_results_in_float64(name, backend):
    case = load_golden_attention(FOLDER, name)
    results = case.inputs.run(backend)
    assert results.keys() == case.stored.keys() == case.checksums.keys()
    for tensor, result in results.items():
        expected, sums = case.checksums[tensor], checksums(tensor, result)
        assert sums["sum_abs"] == pytest.approx(expected["sum_abs"], rel=1e-9), tensor
        assert sums["max_abs"] == pytest.approx(expected["max_abs"], rel=1e-9), tensor
        # The probe sums terms of both signs, so its error is relative to the sum of their absolute values.
        assert sums["probe"] == pytest.approx(expected["probe"], abs=1e-9 * expected["sum_abs"] + 1e-300), tensor

        stored = case.stored[tensor].double()
        at_rows = result if case.rows is None else result[:, case.rows]
        # Rounded to float32 when stored, at most half a unit in the last place.
        torch.testing.assert_close(at_rows, stored, rtol=2**-24, atol=1e-9 * expected["max_abs"])


def test_results_in_float32():
    """Within a few units in the last place of the float64 results, which are stored in float32."""
    case = load_golden_attention(FOLDER, "N4_D16_T64_WNone_B1")
    for backend in ("reference", "chunked"):
        for tensor, result in case.inputs.to(torch.float32).run(backend).items():
            stored = case.stored[tensor]
            assert (result - stored).norm() <= 1e-6 * stored.norm(), (backend, tensor)
