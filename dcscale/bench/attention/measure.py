"""The benchmark from end to end: the errors of all cases first, then time and memory, one case after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dcscale.bench.attention.cases import (
    BACKWARD_FLOPS,
    COMPILED,
    DENSE,
    DTYPES,
    PASSES,
    YARDSTICKS,
    Case,
    Implementation,
    Row,
    implementations,
)
from dcscale.bench.attention.report import LEGEND, case_lines, missing_lines
from dcscale.bench.meter import available_bytes, first_line, is_out_of_memory, peak_bytes, time_in_turns
from dcscale.testing.attention import AttentionInputs, arguments, check_results, unfused_attention


@dataclass
class Checked:
    """What the checks of one short case found."""

    passed: list[dict[str, Any]] = field(default_factory=list)
    """By implementation: the tensor whose error comes nearest to its bound, and which part of the bound it is."""
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Yardsticks that cannot run here, and why."""


def check_errors(case: Case, candidates: Iterable[Implementation], device: str) -> Checked:
    """Every tensor of every implementation against float64, by the rule of :mod:`dcscale.testing.attention`."""
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

    def unavailable_reason(self, kind: str, case: Case) -> str | None:
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
            unavailable_reason = prediction.unavailable_reason(each.kind, case) if each.kind in DENSE else None
            if unavailable_reason is None:
                passes = _passes(each, inputs)
                rows[each.name] = _first_calls(case, each, passes["forward_backward"], device)
        except Exception as error:
            unavailable_reason = _excuse(error, each.kind)
        if unavailable_reason is not None:
            missing[each.name] = unavailable_reason
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


class WrongResultsError(Exception):
    """Some implementation's error is beyond its bound: what, where and by how much."""


def run_all(
    cases: Sequence[Case],
    kinds_of: Callable[[Case], Kinds],
    device: str,
    seconds: float,
    minutes: float,
    say: Callable[[str], None],
) -> tuple[list[Row], list[Row]]:
    """(how near each implementation's errors come to their bounds, the rows of :func:`measure` for all cases).

    ``say`` gets progress and tables, line by line. Nothing new is begun after so many ``minutes``. Raises
    WrongResultsError before anything is timed.
    """
    started = time.monotonic()

    def say_when(text: str) -> None:
        passed = int(time.monotonic() - started)
        say(f"{passed // 60:02}:{passed % 60:02}  {text}")

    checked = check_all(cases, kinds_of, device, say_when)
    failures = [failure for each in checked.values() for failure in each.failures]
    if failures:
        raise WrongResultsError("\n  ".join(["wrong results, so nothing is timed:", *failures]))
    errors = [row for each in checked.values() for row in each.passed]
    for row in sorted(errors, key=lambda row: row["part_of_bound"])[-1:]:
        place = f"{row['implementation']}, {row['worst']}, {row['dtype']}"
        say_when(f"all errors are within their bounds; the nearest is at {row['part_of_bound']:.0%} ({place})")
    say(LEGEND)
    rows, said, prediction = [], set(), Prediction(device)
    for number, case in enumerate(cases, start=1):
        say_when(f"case {number}/{len(cases)}: {case}")
        broken = checked[case.for_checks()].missing
        of_case = measure(case, kinds_of(case), broken, device, seconds, started + 60 * minutes, prediction)
        for line in [*case_lines(of_case), *(line for line in missing_lines(of_case) if line not in said)]:
            say(line)
        said.update(missing_lines(of_case))
        rows += of_case
    return errors, rows


def check_all(
    cases: Sequence[Case], kinds_of: Callable[[Case], Kinds], device: str, say: Callable[[str], None]
) -> dict[Case, Checked]:
    """The errors of every short case that stands for some of ``cases``, by the short case."""
    kinds_of_check: dict[Case, dict[str, None]] = {}
    for case in cases:
        wanted = dict.fromkeys(kind for kind, reason in kinds_of(case).items() if reason is None)
        kinds_of_check.setdefault(case.for_checks(), {}).update(wanted)
    checked = {}
    for number, (case, kinds) in enumerate(kinds_of_check.items(), start=1):
        say(f"errors {number}/{len(kinds_of_check)}: {case}")
        torch.compiler.reset()  # it would give up on a formula after a few shapes
        checked[case] = check_errors(case, candidates(case, kinds, device)[0], device)
    return checked
