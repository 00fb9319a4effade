"""Times and peak memory of a case's implementations, as rows of JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from dcscale.bench.attention.cases import BACKWARD_FLOPS, DTYPES, PASSES, Case, Row
from dcscale.bench.attention.implementations import COMPILED, DENSE, YARDSTICKS, Implementation, implementations
from dcscale.bench.meter import available_bytes, first_line, is_out_of_memory, peak_bytes, time_in_turns
from dcscale.testing.attention import AttentionInputs, arguments, unfused_attention

Kinds = Mapping[str, "str | None"]
"""Implementations by kind, with the reason why one is left out, or None."""
_LENGTH_OF_PROBE = 512
_GIB = 2**30


def candidates(case: Case, kinds: Kinds, device: str) -> tuple[list[Implementation], dict[str, str]]:
    """(implementations to try in this case, why others are not tried, by name)."""
    example = case.for_checks().draw(device).to(DTYPES[case.dtype])
    found, missing = implementations([kind for kind, reason in kinds.items() if reason is None], example, device)
    return found, missing | {kind: reason for kind, reason in kinds.items() if reason is not None}


class Prediction:
    """What the dense formula will need, from what it needed in shorter cases: its memory grows with B H T S."""

    def __init__(self, device: str):
        self._device = device
        self._bytes_per_element: dict[tuple[str, str], float] = {}

    def note(self, kind: str, case: Case, peak: int) -> None:
        """Longer cases tell more; the last that is noted counts."""
        self._bytes_per_element[kind, case.dtype] = peak / _map_elements(case)

    def obstacle(self, kind: str, case: Case) -> str | None:
        """Why the case is not to be tried."""
        known = self._bytes_per_element
        if (kind, case.dtype) not in known and ("dense", case.dtype) not in known:
            probe = replace(case, length=min(case.length, _LENGTH_OF_PROBE))
            inputs = probe.draw(self._device).to(DTYPES[case.dtype])
            self.note("dense", probe, peak_bytes(lambda: inputs.run_function(unfused_attention), self._device))
        source = kind if (kind, case.dtype) in known else "dense"
        needed, free = known[source, case.dtype] * _map_elements(case), available_bytes(self._device)
        if needed <= free:
            return None
        return f"it would need {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free"


def _map_elements(case: Case) -> int:
    return case.batch * case.heads * case.length**2


def measure(
    case: Case,
    kinds: Kinds,
    broken: Mapping[str, str],
    device: str,
    seconds: float,
    deadline: float,
    prediction: Prediction,
) -> list[Row]:
    """A row for every implementation, with figures or with the reason why there are none.

    broken: what cannot run here, by name. About ``seconds`` go into times, and nothing begins after ``deadline``.
    """
    torch.compiler.reset()
    found, missing = candidates(case, kinds, device)
    missing |= broken
    rows, runs = {}, {}
    try:
        inputs = case.draw(device).to(DTYPES[case.dtype])
    except Exception as error:
        missing |= dict.fromkeys((each.name for each in found), _excuse(error))
    for each in (each for each in found if each.name not in missing):
        if time.monotonic() >= deadline:
            missing[each.name] = "the time limit was reached (--minutes)"
            continue
        try:
            obstacle = prediction.obstacle(each.kind, case) if each.kind in DENSE else None
            if obstacle is None:
                passes = _passes(each, inputs)
                rows[each.name] = _first_calls(case, each, passes["forward_backward"], device)
        except Exception as error:
            obstacle = _excuse(error, each.kind)
        if obstacle is not None:
            missing[each.name] = obstacle
            continue
        if each.kind in DENSE:
            prediction.note(each.kind, case, rows[each.name]["peak_bytes"])
        runs |= {(each.name, name): run for name, run in passes.items()}

    times, failures = time_in_turns(runs, device, seconds, deadline)
    missing |= {name: problem for (name, _), problem in failures.items()}
    measured = [row for name, row in rows.items() if name not in missing]
    for row in measured:
        for name, flops in row.pop("flops").items():
            row[name] = _summary(times[row["implementation"], name], flops)
        first_call = row.pop("first_call_seconds")
        if row["kind"] in COMPILED:
            row["compile_seconds"] = first_call - row["forward_backward"]["ms"] / 1e3
    _add_ratios(measured)
    return measured + [{**asdict(case), "implementation": name, "not_measured": why} for name, why in missing.items()]


def _excuse(error: Exception, kind: str = "") -> str:
    """What is said of an error that need not end the run; any other is raised."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    if kind in YARDSTICKS:
        return f"it fails: {first_line(error)}"
    raise error


def _passes(implementation: Implementation, inputs: AttentionInputs) -> dict[str, Callable[[], object]]:
    """The forward pass, which keeps what backward needs, and both, by their names in a row."""
    own = implementation.inputs(inputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in own.tensors.items()}

    def forward() -> torch.Tensor:
        return implementation.function(*arguments(leaves), **own.options)

    def forward_backward() -> None:
        torch.autograd.grad(forward(), list(leaves.values()), own.cotangent)

    return dict(zip(PASSES, (forward, forward_backward)))


def _first_calls(case: Case, implementation: Implementation, run: Callable[[], object], device: str) -> Row:
    """A row with what the first call tells, which may have to compile, and with the peak memory of another."""
    start = time.perf_counter()
    if device == "cuda" or implementation.kind in COMPILED:  # all others are as slow in their first call as ever
        run()
    first_call = time.perf_counter() - start
    forward_flops = case.forward_flops(implementation.windowed)
    return {
        **asdict(case),
        "implementation": implementation.name,
        "kind": implementation.kind,
        "note": implementation.note,
        "not_measured": None,
        "peak_bytes": peak_bytes(run, device),
        "first_call_seconds": first_call,
        "flops": {"forward": forward_flops, "forward_backward": (1 + BACKWARD_FLOPS) * forward_flops},
    }


def _summary(milliseconds: list[float], flops: float) -> dict[str, float]:
    quarter, median, three_quarters = torch.tensor(milliseconds).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {
        "ms": median,
        "quartiles_ms": [quarter, three_quarters],
        "rounds": len(milliseconds),
        "tflops": flops / median / 1e9,
    }


def _add_ratios(rows: Sequence[Row]) -> None:
    """Time by that of the case's fastest SDPA, and by that of plain attention with the case's window."""
    sdpa = (row for row in rows if row["kind"] == "sdpa")
    fastest = min(sdpa, key=lambda row: row["forward_backward"]["ms"], default=None)
    windowed = next((row for row in rows if row["kind"] == "windowed"), None)
    for row in rows:
        for ratio, yardstick in (("times_sdpa", fastest), ("times_windowed", windowed)):
            if yardstick is not None:
                row[ratio] = {each: row[each]["ms"] / yardstick[each]["ms"] for each in PASSES}
                row[ratio]["of"] = yardstick["implementation"]
