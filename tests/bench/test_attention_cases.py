"""Which cases are measured, their FLOPs, and what is skipped."""

import pytest

from dcscale.bench.attention import FUSED_BACKENDS, KINDS
from dcscale.bench.attention.cases import TARGET_SHAPE, Case, make_cases, too_slow
from dcscale.ops.compose.api import BACKENDS

CASE = Case(dtype="fp32", batch=2, length=10, heads=3, head_dim=5, window=4, rank=2)


def test_every_backend_but_the_definition_is_measured():
    assert {*BACKENDS} == {"auto", "reference", *FUSED_BACKENDS}


@pytest.mark.parametrize("windowed", [False, True])
def test_flops_count_both_products_over_visible_pairs(windowed):
    counted = 0
    for _ in range(CASE.batch * CASE.heads):
        for query in range(CASE.length):
            for key in range(CASE.length):
                if key <= query and (not windowed or key > query - CASE.window):
                    counted += 2 * CASE.head_dim  # the score: a product and a sum for each dimension
                    counted += 2 * CASE.head_dim  # its part of the output
    assert CASE.forward_flops(windowed) == counted


def test_inputs_have_the_shapes_of_the_case():
    inputs = CASE.draw("cpu")
    assert inputs.tensors["q"].shape == (2, 10, 3, 5)
    assert inputs.tensors["pre.k1"].shape == (2, 10, 2, 3)
    assert len(inputs.tensors) == 15
    assert inputs.options == {"window": 4}


def test_the_short_case_is_odd_and_longer_than_its_window():
    short = make_cases("cuda", lengths=[32768], windows=[4096], batch=8)[0].for_checks()
    assert (short.batch, short.length % 2, short.heads, short.head_dim) == (1, 1, 32, 128)
    assert short.window < short.length < 1024
    assert make_cases("cuda", windows=[None])[0].for_checks().window is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_default_cases_include_those_of_the_targets(device, quick):
    cases = make_cases(device, quick=quick)
    assert len(cases) == len(set(cases))
    length, heads, head_dim = TARGET_SHAPE[device]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    for dtype in dtypes:
        for window in (None, 256):
            assert Case(dtype, 1, length, heads, head_dim, window, 2) in cases


def test_the_default_on_a_gpu_varies_the_length_and_the_heads():
    cases = make_cases("cuda")
    assert {case.length for case in cases} == {1024, 2048, 4096, 8192, 16384, 32768}
    assert {(case.heads, case.head_dim) for case in cases} == {(h, d) for h in (16, 32) for d in (64, 80, 128)}


def test_given_values_are_combined_with_the_target_shape():
    cases = make_cases("cuda", lengths=[7, 9], heads=[4], windows=[None, 3], dtypes=["fp16"], batch=5, rank=1)
    assert [(case.length, case.window) for case in cases] == [(7, None), (7, 3), (9, None), (9, 3)]
    assert {(c.dtype, c.batch, c.heads, c.head_dim, c.rank) for c in cases} == {("fp16", 5, 4, 128, 1)}
    assert len(make_cases("cpu", lengths=[8, 8], dtypes=["fp32", "fp32"], windows=[None])) == 1


def skipped(case, first, device, quick=False):
    reasons = {kind: too_slow(kind, case, first, device, quick) for kind in KINDS}
    assert all(f"--kinds {kind}" in reason for kind, reason in reasons.items() if reason is not None)
    return {kind for kind, reason in reasons.items() if reason is not None} - {"compiled"}


def test_the_dense_formula_is_skipped_where_it_takes_too_long():
    gpu, cpu = make_cases("cuda"), make_cases("cpu")
    assert skipped(gpu[0], gpu[0], "cuda") == set()
    assert skipped(gpu[-1], gpu[0], "cuda") == {"dense-compiled"}
    assert skipped(cpu[0], cpu[0], "cpu") == skipped(cpu[1], cpu[0], "cpu") == set()
    assert skipped(cpu[-1], cpu[0], "cpu") == {"dense", "dense-compiled"}
    assert skipped(cpu[0], cpu[0], "cpu", quick=True) == set()
    assert skipped(cpu[1], cpu[0], "cpu", quick=True) == {"dense", "dense-compiled"}
