"""Figures of an evaluation, and as rows of a table for people and for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcscale.evaluation.tasks import Accuracy
from dcscale.observe import printable
from dcscale.ops import bits_per_byte


@dataclass(frozen=True)
class Losses:
    """Figures of one text or one folder of shards."""

    name: str
    tokens: int
    """Tokens that were predicted."""
    loss: float
    """Nats a token, mean."""
    perplexity: float
    """exp(loss), a token."""
    bits_per_byte: float | None
    """Bits a byte of the text, whatever the tokenizer; None where the text's bytes are not known."""


def losses(name: str, total: float, tokens: int, text_bytes_per_token: float | None) -> Losses:
    """Figures from a sum of ``total`` nats over ``tokens``.

    Raises:
        FloatingPointError: the loss is not finite, or so large that exp(loss) is no number any more.
    """
    loss = total / tokens
    if not loss < 700:
        raise FloatingPointError(
            f"{name}: the loss is {loss:.6g} nats/token: the model's weights are damaged or training has diverged"
        )
    bits = None if text_bytes_per_token is None else bits_per_byte(loss, text_bytes_per_token)
    return Losses(name, tokens, loss, math.exp(loss), bits)


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
