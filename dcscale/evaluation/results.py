"""Results of evaluations, as JSON rows and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcscale.evaluation.tasks import Accuracy
from dcscale.observe import printable
from dcscale.ops import bits_per_byte


@dataclass(frozen=True)
class LossResult:
    """Results for one text or one folder of shards."""

    name: str
    tokens: int
    """Number of predicted tokens."""
    loss: float
    """Mean, nats/token."""
    perplexity: float
    """exp(loss), per token."""
    bits_per_byte: float | None
    """Bits per byte of text, comparable between tokenizers; None if the number of bytes is not known."""
    sequences: int | None = None
    """Number of sequences of the shards that were used; None for a text."""
    of_sequences: int | None = None
    """Number of all sequences of the shards; None for a text."""


def loss_result(name: str, total: float, tokens: int, text_bytes_per_token: float | None) -> LossResult:
    """Results from a loss sum.

    Args:
        name: of the text or folder.
        total: sum of the losses in nats.
        tokens: number of predicted tokens.
        text_bytes_per_token: mean UTF-8 bytes per token; None: not known.

    Raises:
        FloatingPointError: the loss is not finite, or exp(loss) would overflow.
    """
    loss = total / tokens
    if not loss < 700:  # exp() overflows above 709; NaN fails this comparison, too
        raise FloatingPointError(
            f"{name}: the loss is {loss:.6g} nats/token: the model's weights are corrupt or training has diverged"
        )
    bits = None if text_bytes_per_token is None else bits_per_byte(loss, text_bytes_per_token)
    return LossResult(name, tokens, loss, math.exp(loss), bits)


_LOSS_COLUMNS = ("name", "tokens", "loss", "perplexity", "bits_per_byte")
_ACCURACY_COLUMNS = ("name", "task", "texts", "answers", "answer_accuracy", "tokens", "token_accuracy")


def accuracy_rows(files: Sequence[tuple[str, Mapping[str, Accuracy]]]) -> list[dict[str, Any]]:
    """A row per task of each file, a total per file (``task`` None), and a total of several files (``name`` None)."""
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
    """The tables of a result, and notes on it, as lines."""
    lines = []
    for columns, rows in ((_LOSS_COLUMNS, result["losses"]), (_ACCURACY_COLUMNS, result["accuracies"])):
        if rows:
            lines += _table(columns, rows)
    for row in result["losses"]:
        if row["sequences"] is not None:
            all_of = "" if row["sequences"] == row["of_sequences"] else ", spread evenly (--sequences all uses all)"
            lines.append(
                f"{printable(row['name'])}: {row['sequences']:,} of {row['of_sequences']:,} sequences were used{all_of}"
            )
    for row in result["accuracies"]:
        if row["name"] is not None and row["task"] is None and row["texts_with_crossing"]:
            lines.append(
                f"{printable(row['name'])}: {row['texts_with_crossing']:,} of {row['texts']:,} texts have a token that "
                "crosses a mark: it counts as part of the answer"
            )
    return lines


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    cells = [[column.replace("_", " ") for column in columns]]
    cells += [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    aligned = [str.ljust if column in ("name", "task") else str.rjust for column in columns]
    return ["  ".join(align(text, width) for align, text, width in zip(aligned, row, widths)) for row in cells]


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
