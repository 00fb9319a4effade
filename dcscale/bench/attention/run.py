"""The benchmark from end to end: the errors of all cases first, then one case after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from dcscale.bench.attention.cases import Case, Row
from dcscale.bench.attention.errors import Checked, check_errors
from dcscale.bench.attention.measure import Kinds, Prediction, candidates, measure
from dcscale.bench.attention.report import LEGEND, case_lines, missing_lines


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
