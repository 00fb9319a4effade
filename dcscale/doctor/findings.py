"""What the checks of the doctor have found: findings, their table, and the exit code that they mean."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from dcscale.observe import printable

FORMAT = 1
"""Of ``--json``."""

_WIDTH = 120


class Verdict(str, Enum):
    """Of a finding."""

    GOOD = "good"
    BAD = "bad"
    """A run would fail, be slow or be wrong: the doctor ends with exit code 1."""

    UNKNOWN = "unknown"
    """Could not be checked here, such as GPUs where there are none; the value says why."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    """Name of the check, such as ``disk space``."""

    verdict: Verdict
    node: str
    """Host name."""

    value: str
    """What was found, with its unit."""

    rule: str
    """What is expected."""

    way_out: str = ""
    """What to do about it; of bad findings only."""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Bad findings, then unknown ones, then good ones; otherwise in their order."""
    order = (Verdict.BAD, Verdict.UNKNOWN, Verdict.GOOD)
    return sorted(findings, key=lambda finding: order.index(finding.verdict))


def table(findings: Sequence[Finding], width: int = _WIDTH) -> list[str]:
    """Lines of at most ``width`` characters: verdict, check, node and value, worst findings first.

    Of what is not good also the rule, and the way out. What other programs and files say is escaped.
    """
    columns = [max(map(len, texts), default=0) for texts in zip(*((f.verdict, f.check, f.node) for f in findings))]
    lines = []
    for finding in worst_first(findings):
        head = "  ".join(
            text.ljust(size) for text, size in zip((finding.verdict, finding.check, finding.node), columns)
        )
        texts = [finding.value]
        if finding.verdict is not Verdict.GOOD:
            texts.append(f"rule: {finding.rule}")
        if finding.way_out:
            texts.append(f"way out: {finding.way_out}")
        for text in texts:
            # Only between words: paths and addresses stay whole.
            shown = (
                printable(text).encode(errors="backslashreplace").decode()
            )  # JSON and names of files may be no UTF-8
            wrapped = textwrap.wrap(
                shown, max(40, width - len(head) - 2), break_long_words=False, break_on_hyphens=False
            )
            for line in wrapped or [""]:
                lines.append(f"{head}  {line}".rstrip())
                head = " " * len(head)
    return lines


def condensed(findings: Sequence[Finding]) -> list[Finding]:
    """The findings of many nodes for a table: one for what several nodes have in common.

    Good findings of a check become one, whatever their values; others only if they have the same values.
    """
    every = {finding.node for finding in findings} - {"all"}
    if len(every) < 2:
        return list(findings)
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same = () if finding.verdict is Verdict.GOOD else (finding.value, finding.rule, finding.way_out)
        groups.setdefault((finding.check, finding.verdict, *same), []).append(finding)
    found = []
    for group in groups.values():
        nodes = list(dict.fromkeys(finding.node for finding in group))
        values = list(dict.fromkeys(finding.value for finding in group))
        more = f" (and {len(values) - 1} other{'s' * (len(values) > 2)})" if len(values) > 1 else ""
        node = "all" if len(nodes) > 1 and every <= {*nodes} else ", ".join(nodes)
        found.append(replace(group[0], node=node, value=values[0] + more))
    return found


def summary(findings: Iterable[Finding], seconds: float) -> str:
    """One line: how many findings of each verdict, and the nodes with bad ones."""
    findings = list(findings)
    counts = Counter(finding.verdict for finding in findings)
    text = f"{counts[Verdict.BAD]} bad, {counts[Verdict.UNKNOWN]} unknown, {counts[Verdict.GOOD]} good"
    nodes = list(dict.fromkeys(finding.node for finding in findings if finding.verdict is Verdict.BAD))
    where = f"; bad on {', '.join(nodes)}" if nodes else ""
    return f"{text}, in {seconds:.1f} s{where}"


def report(findings: Iterable[Finding], seconds: float) -> dict[str, Any]:
    """For ``--json``: ``format``, the number of findings of each verdict, ``seconds``, and ``findings``."""
    ordered = worst_first(findings)
    counts = Counter(finding.verdict for finding in ordered)
    return {
        "format": FORMAT,
        **{str(verdict): counts[verdict] for verdict in Verdict},
        "seconds": round(seconds, 2),
        "findings": [finding.as_json() for finding in ordered],
    }


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if any finding is bad, else 0."""
    return int(any(finding.verdict is Verdict.BAD for finding in findings))
