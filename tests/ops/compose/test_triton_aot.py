"""The kernels, compiled ahead of time for several GPUs: registers, shared memory, and what the static model says.

Run as a program, this file compiles them and prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

BACKWARD = ("compose_probabilities_backward", "compose_scores_backward")
PRODUCTS = ("scores", "out", "dv")
VARIANTS = (
    # Compute capability, dtype, R, H, D, documents, and the kernels by kind or name: compiling takes the time of this
    # test, so elsewhere than for the first only those with the most registers, and one product of each kernel.
    (90, "bf16", 2, 32, 128, False, ("mix", "product", "sum", "layout")),
    (90, "bf16", 2, 32, 64, True, ("compose_scores", *PRODUCTS)),
    (90, "bf16", 4, 64, 256, True, ("compose_scores", *BACKWARD, "out")),
    (90, "fp32", 4, 32, 128, False, (*BACKWARD, "scores", "out")),
    (80, "bf16", 2, 64, 80, True, ("compose_scores", *BACKWARD, *PRODUCTS)),
    (80, "bf16", 4, 32, 80, False, BACKWARD),
    (100, "bf16", 2, 64, 256, True, ("compose_scores", *BACKWARD, *PRODUCTS)),
    (100, "bf16", 4, 32, 256, False, BACKWARD),
)
MOST_SHARED_KIB = {80: 99, 90: 227, 100: 227}
"""Of a program, by compute capability: technical specifications in the CUDA C++ Programming Guide. 8.0 has 163, but its
tiles are those of 8.6, 8.9 and 12.0 too."""
WINDOWS = (None, 256)


def compile_all() -> dict[str, Any]:
    """What this file prints."""
    import torch

    from dcscale.bench.attention.cases import Case
    from dcscale.bench.attention.static.compilation import Compiler, versions
    from dcscale.bench.attention.static.cost import Rates
    from dcscale.bench.attention.static.plan import make_call, plan
    from dcscale.bench.attention.static.sass import products_with_a_in_registers
    from dcscale.bench.attention.static.tool import model_case

    compilers = {arch: Compiler(arch) for arch in MOST_SHARED_KIB}
    kernels = []
    for arch, dtype, rank, heads, head_dim, documents, wanted in VARIANTS:
        call = make_call(Case(dtype, 1, 256, heads, head_dim, None, rank), None)
        if documents:
            call = call._replace(document_ids=torch.empty(1, 256, dtype=torch.int32, device="meta"))
        for work, launch in plan(call, arch):
            if not {work.kind, work.name} & set(wanted):
                continue
            binary = compilers[arch](launch.kernel, launch.arguments, launch.constants, launch.warps, launch.stages)
            shape = f"R={rank} H={heads} D={head_dim} documents={documents}"
            row = {"arch": arch, "dtype": dtype, "shape": shape, "kernel": work.name, "kind": work.kind}
            row |= {name: getattr(binary, name) for name in ("registers", "spilled", "shared")}
            # Only Hopper has the instruction.
            wgmma = arch == 90 and work.kind == "product"
            kernels.append(row | {"a_in_registers": products_with_a_in_registers(binary.sass) if wgmma else []})
    models = [model_case(Case("bf16", 1, 4096, 32, 128, each, 2), compilers[90], Rates()) for each in WINDOWS]
    return {"versions": versions(), "kernels": kernels, "models": models}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In another process, because this one may use Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", MOST_SHARED_KIB)
def test_kernels_fit_into_registers_and_shared_memory(compiled, arch):
    kernels = [row for row in compiled["kernels"] if row["arch"] == arch]
    assert len(kernels) >= 9
    for row in kernels:
        assert row["spilled"] == 0, row
        assert 16 <= row["registers"] <= 255, row
        assert row["shared"] <= MOST_SHARED_KIB[arch] * 1024, row


def test_no_product_takes_its_first_operand_from_registers(compiled):
    """ptxas before 13.3 can miscompile it (triton issues 9433 and 11781)."""
    assert [row for row in compiled["kernels"] if row["a_in_registers"]] == []


def test_kernels_stay_within_the_costs_that_they_were_built_for(compiled):
    """Of H=32, D=128, R=2, T=4096 on sm_90; times are a model's for the H200, not measured."""
    full, windowed = compiled["models"]
    sums = full["sums"]
    assert sums["forward"]["slots_in_all"] <= 66
    assert sums["backward"]["slots_in_all"] <= 178
    assert sums["both"]["ps"] <= 26.5
    assert windowed["times_flash"]["version_2"]["both"] <= 0.93
    for row in (*full["kernels"], *windowed["kernels"]):
        assert row.get("spilled", 0) == 0, row
        assert row.get("loops_with_assumed_trips", 0) == 0, row


if __name__ == "__main__":
    print(json.dumps(compile_all()))
