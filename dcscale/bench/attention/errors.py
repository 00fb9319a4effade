"""Errors first: the speed of a wrong result is worth nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dcscale.bench.attention.cases import DTYPES, Case
from dcscale.bench.attention.implementations import YARDSTICKS, Implementation
from dcscale.bench.meter import first_line
from dcscale.testing.attention import AttentionInputs, unfused_attention
from dcscale.testing.tolerance import check_results


@dataclass
class Checked:
    """What the checks of one short case found."""

    passed: list[dict[str, Any]] = field(default_factory=list)
    """By implementation: the tensor whose error comes nearest to its bound, and which part of the bound it is."""
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Yardsticks that cannot run here, and why."""


def check_errors(case: Case, candidates: Iterable[Implementation], device: str) -> Checked:
    """Every tensor of every implementation against float64, by the rule of :mod:`dcscale.testing.tolerance`."""
    inputs, dtype = case.draw(device), DTYPES[case.dtype]
    checked, expected = Checked(), {}
    for implementation in candidates:
        formula = (implementation.composed, implementation.windowed)
        wide: AttentionInputs = implementation.inputs(inputs)
        narrow = wide.to(dtype)
        if formula not in expected:
            expected[formula] = narrow.run_function(unfused_attention), wide.run_function(unfused_attention)
        try:
            results = narrow.run_function(implementation.function)
        except Exception as error:  # a kernel that does not build or does not start fails in any way
            if implementation.kind in YARDSTICKS:
                checked.missing[implementation.name] = first_line(error)
            else:
                checked.failures.append(f"{implementation.name} ({case}): {first_line(error)}")
            continue
        parts = {}
        for name in results:
            try:
                parts |= check_results(*({name: x[name]} for x in (results, *expected[formula])))
            except AssertionError as error:
                checked.failures.append(f"{implementation.name} ({case}): {error}")
        if len(parts) == len(results):
            worst = max(parts, key=parts.__getitem__)
            row = {"implementation": implementation.name, "tensors": len(parts), "worst": worst}
            checked.passed.append({**asdict(case), **row, "part_of_bound": round(parts[worst], 3)})
    return checked
