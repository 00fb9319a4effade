"""The benchmark end to end: first the errors of all cases, then time and memory, case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dcscale.bench.attention import PLAIN
from dcscale.bench.attention.cases import (
    BACKWARD_FLOPS,
    BASELINES,
    COMPILED,
    DENSE,
    DTYPES,
    PASSES,
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
    """Results of the error checks of one short case."""

    passed: list[dict[str, Any]] = field(default_factory=list)
    """For each implementation, the tensor whose error is closest to its bound, as a fraction of the bound."""
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Baselines that cannot run here, and why."""


def check_errors(case: Case, candidates: Iterable[Implementation], device: str) -> Checked:
    """Check every implementation's output and gradients by the error rule of :mod:`dcscale.testing.attention`."""
    inputs, dtype = case.draw(device), DTYPES[case.dtype]
    checked, expected = Checked(), {}
    for implementation in candidates:
        # Implementations of the same formula share the expected results, in the case's dtype and in float64.
        formula = (implementation.composed, implementation.windowed)
        wide: AttentionInputs = implementation.inputs(inputs)
        narrow = wide.to(dtype)
        if formula not in expected:
            expected[formula] = narrow.run_function(unfused_attention), wide.run_function(unfused_attention)
        try:
            results = narrow.run_function(implementation.function)
        except Exception as error:  # a kernel that fails to compile or launch can raise anything
            if implementation.kind in BASELINES:
                checked.missing[implementation.name] = first_line(error)
            else:
                checked.failures.append(f"{implementation.name} ({case}): {first_line(error)}")
            continue
        # One tensor at a time, to report all that are wrong.
        fractions = {}
        for name in results:
            try:
                fractions |= check_results(*({name: x[name]} for x in (results, *expected[formula])))
            except AssertionError as error:
                checked.failures.append(f"{implementation.name} ({case}): {error}")
        if len(fractions) == len(results):
            worst = max(fractions, key=fractions.__getitem__)
            row = {"implementation": implementation.name, "tensors": len(fractions), "worst": worst}
            checked.passed.append({**asdict(case), **row, "part_of_bound": round(fractions[worst], 3)})
    return checked


Kinds = Mapping[str, "str | None"]
"""Kinds of implementations, each with the reason to skip it, or None."""
_PROBE_LENGTH = 512
_GIB = 2**30


def candidates(case: Case, kinds: Kinds, device: str) -> tuple[list[Implementation], dict[str, str]]:
    """(implementations to run in this case, why others are skipped, by name)."""
    example = case.for_checks().draw(device).to(DTYPES[case.dtype])
    found, missing = implementations([kind for kind, reason in kinds.items() if reason is None], example, device)
    return found, missing | {kind: reason for kind, reason in kinds.items() if reason is not None}


class Prediction:
    """Predicts the memory of the dense formula from shorter cases: it grows with B H T S."""

    def __init__(self, device: str):
        self._device = device
        self._bytes_per_element: dict[tuple[str, str], float] = {}

    def record(self, kind: str, case: Case, peak: int) -> None:
        """Record the peak memory of a case. The latest counts: cases get longer, and longer ones predict better."""
        self._bytes_per_element[kind, case.dtype] = peak / _score_elements(case)

    def unavailable_reason(self, kind: str, case: Case) -> str | None:
        """Why the case would not fit into memory; None if it fits. Measures a short case if none is recorded."""
        known = self._bytes_per_element
        # Without a figure for the compiled formula, predict it from the plain one.
        if (kind, case.dtype) not in known and ("dense", case.dtype) not in known:
            probe = replace(case, length=min(case.length, _PROBE_LENGTH))
            inputs = probe.draw(self._device).to(DTYPES[case.dtype])
            self.record("dense", probe, peak_bytes(lambda: inputs.run_function(unfused_attention), self._device))
        source = kind if (kind, case.dtype) in known else "dense"
        needed, free = known[source, case.dtype] * _score_elements(case), available_bytes(self._device)
        if needed <= free:
            return None
        return f"it would need {needed / _GIB:.1f} GiB, but only {free / _GIB:.1f} GiB are free"


def _score_elements(case: Case) -> int:
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
    """Measure time and memory of one case.

    Args:
        case: what to measure.
        kinds: which implementations, and why others are skipped.
        broken: implementations that failed the error checks because they cannot run here, and why.
        device: "cuda" or "cpu".
        seconds: about how long to spend on timing.
        deadline: a time of :func:`time.monotonic` after which nothing new starts.
        prediction: of the dense formula's memory; it is updated.

    Returns:
        A row for every implementation, with its figures or the reason why there are none.
    """
    torch.compiler.reset()  # every case compiles for its own shapes
    found, missing = candidates(case, kinds, device)
    missing |= broken
    rows, runs = {}, {}
    try:
        inputs = case.draw(device).to(DTYPES[case.dtype])
    except Exception as error:
        missing |= dict.fromkeys((each.name for each in found), _skip_reason(error))
    for each in (each for each in found if each.name not in missing):
        if time.monotonic() >= deadline:
            missing[each.name] = "the time limit was reached (--minutes)"
            continue
        try:
            reason = prediction.unavailable_reason(each.kind, case) if each.kind in DENSE else None
            if reason is None:
                passes = _passes(each, inputs)
                rows[each.name] = _first_calls(case, each, passes["forward_backward"], device)
        except Exception as error:
            reason = _skip_reason(error, each.kind)
        if reason is not None:
            missing[each.name] = reason
            continue
        if each.kind in DENSE:
            prediction.record(each.kind, case, rows[each.name]["peak_bytes"])
        runs |= {(each.name, name): run for name, run in passes.items()}

    # All implementations and both passes take turns.
    times, failures = time_in_turns(runs, device, seconds, deadline)
    missing |= {name: problem for (name, _), problem in failures.items()}
    measured = [row for name, row in rows.items() if name not in missing]
    for row in measured:
        for name, flops in row.pop("flops").items():
            row[name] = _summary(times[row["implementation"], name], flops)
        # The first call compiles and runs once.
        first_call = row.pop("first_call_seconds")
        if row["kind"] in COMPILED:
            row["compile_seconds"] = first_call - row["forward_backward"]["ms"] / 1e3
    _add_ratios(measured)
    return measured + [{**asdict(case), "implementation": name, "not_measured": why} for name, why in missing.items()]


def _skip_reason(error: Exception, kind: str = "") -> str:
    """The reason to report for an error that only skips an implementation; other errors are raised again."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    if kind in BASELINES:
        return f"it fails: {first_line(error)}"
    raise error


def _passes(implementation: Implementation, inputs: AttentionInputs) -> dict[str, Callable[[], object]]:
    """The forward pass (keeping what backward needs), and forward and backward, by their names in a row."""
    own = implementation.inputs(inputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in own.tensors.items()}

    def forward() -> torch.Tensor:
        return implementation.function(*arguments(leaves), **own.options)

    def forward_backward() -> None:
        torch.autograd.grad(forward(), list(leaves.values()), own.cotangent)

    return dict(zip(PASSES, (forward, forward_backward)))


def _first_calls(case: Case, implementation: Implementation, run: Callable[[], object], device: str) -> Row:
    """A row with the duration of the first call, which may compile, and the peak memory of a later one."""
    start = time.perf_counter()
    if device == "cuda" or implementation.kind in COMPILED:  # on a CPU the others need no warm-up
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
    """Add the ratios of times to the case's fastest plain attention, and to plain attention with the case's window."""
    plain = (row for row in rows if row["kind"] in PLAIN)
    fastest = min(plain, key=lambda row: row["forward_backward"]["ms"], default=None)
    windowed = next((row for row in rows if row["kind"] == "windowed"), None)
    for row in rows:
        for ratio, baseline in (("times_plain", fastest), ("times_windowed", windowed)):
            if baseline is not None:
                row[ratio] = {each: row[each]["ms"] / baseline[each]["ms"] for each in PASSES}
                row[ratio]["of"] = baseline["implementation"]


class WrongResultsError(Exception):
    """Errors exceed their bounds: of which implementations and tensors, and by how much."""


def run_all(
    cases: Sequence[Case],
    kinds_of: Callable[[Case], Kinds],
    device: str,
    seconds: float,
    minutes: float,
    say: Callable[[str], None],
) -> tuple[list[Row], list[Row]]:
    """Check the errors of all cases, then measure them.

    Args:
        cases: what to measure.
        kinds_of: which implementations to run in a case.
        device: "cuda" or "cpu".
        seconds: about how long to spend on timing each case.
        minutes: after this time nothing new starts.
        say: receives progress and tables, line by line.

    Returns:
        (how close each implementation's errors are to their bounds, the rows of :func:`measure` for all cases).

    Raises:
        WrongResultsError: an error exceeds its bound. Nothing is timed then.
    """
    started = time.monotonic()

    def say_timed(text: str) -> None:
        passed = int(time.monotonic() - started)
        say(f"{passed // 60:02}:{passed % 60:02}  {text}")

    checked = check_all(cases, kinds_of, device, say_timed)
    failures = [failure for each in checked.values() for failure in each.failures]
    if failures:
        raise WrongResultsError("\n  ".join(["wrong results, so nothing is timed:", *failures]))
    errors = [row for each in checked.values() for row in each.passed]
    for row in sorted(errors, key=lambda row: row["part_of_bound"])[-1:]:
        place = f"{row['implementation']}, {row['worst']}, {row['dtype']}"
        say_timed(
            f"all errors are within their bounds; the largest is {row['part_of_bound']:.0%} of its bound ({place})"
        )
    say(LEGEND)
    rows, printed, prediction = [], set(), Prediction(device)
    for number, case in enumerate(cases, start=1):
        say_timed(f"case {number}/{len(cases)}: {case}")
        broken = checked[case.for_checks()].missing
        of_case = measure(case, kinds_of(case), broken, device, seconds, started + 60 * minutes, prediction)
        for line in [*case_lines(of_case), *(line for line in missing_lines(of_case) if line not in printed)]:
            say(line)
        printed.update(missing_lines(of_case))
        rows += of_case
    return errors, rows


def check_all(
    cases: Sequence[Case], kinds_of: Callable[[Case], Kinds], device: str, say: Callable[[str], None]
) -> dict[Case, Checked]:
    """Check the errors of the short versions of all ``cases``, each of them once; by the short case."""
    kinds_of_check: dict[Case, dict[str, None]] = {}
    for case in cases:
        wanted = dict.fromkeys(kind for kind, reason in kinds_of(case).items() if reason is None)
        kinds_of_check.setdefault(case.for_checks(), {}).update(wanted)
    checked = {}
    for number, (case, kinds) in enumerate(kinds_of_check.items(), start=1):
        say(f"errors {number}/{len(kinds_of_check)}: {case}")
        torch.compiler.reset()  # it stops recompiling a function after a few shapes
        checked[case] = check_errors(case, candidates(case, kinds, device)[0], device)
    return checked
