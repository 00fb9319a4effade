"""Figures as rows of a table, for people and for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dcscale.inference.tasks import Accuracy
from dcscale.observe import printable

_LOSSES = ("name", "tokens", "loss", "perplexity", "bits_per_byte")
_ACCURACIES = ("name", "task", "texts", "answers", "answer_accuracy", "tokens", "token_accuracy")


def accuracy_rows(files: Sequence[tuple[str, Mapping[str, Accuracy]]]) -> list[dict[str, Any]]:
    """A row for each task of a file, one for all of it (``task`` None), and one for all of several (``name`` None)."""
    rows = []
    for name, tasks in files:
        rows += [_row(name, task, counts) for task, counts in tasks.items()]
        rows.append(_row(name, None, _sum(tasks.values())))
    if len(files) > 1:
        rows.append(_row(None, None, _sum(counts for _, tasks in files for counts in tasks.values())))
    return rows


def _sum(counts: Iterable[Accuracy]) -> Accuracy:
    return sum(counts, Accuracy())


def _row(name: str | None, task: str | None, counts: Accuracy) -> dict[str, Any]:
    accuracies = {"answer_accuracy": counts.answer_accuracy, "token_accuracy": counts.token_accuracy}
    return {"name": name, "task": task, **asdict(counts), **accuracies}


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """The tables of a result, and what a person should know of its figures."""
    lines = []
    for columns, rows in ((_LOSSES, result["losses"]), (_ACCURACIES, result["accuracies"])):
        if rows:
            lines += _table(columns, rows)
    for row in result["accuracies"]:
        if row["name"] is not None and row["task"] is None and row["texts_in_pieces"]:
            lines.append(
                f"{printable(row['name'])}: {row['texts_in_pieces']:,} of {row['texts']:,} texts were tokenised in "
                "pieces, as a token reached across a mark"
            )
    return lines


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    cells = [[column.replace("_", " ") for column in columns]]
    cells += [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = [str.ljust if column in ("name", "task") else str.rjust for column in columns]
    return ["  ".join(side(text, width) for side, text, width in zip(sides, row, widths)) for row in cells]


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
