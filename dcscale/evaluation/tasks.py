"""Next-token accuracy on the marked answers of in-context tasks, see :mod:`dcscale.evaluation.task_format`.

Axes in names: B texts, T tokens, N answer tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dcscale.data import DataError, Tokenizer
from dcscale.evaluation.loading import ProgressCallback, check_token_ids, pad_rows
from dcscale.evaluation.task_format import TokenizedSample, read_samples, tokenize
from dcscale.models import DCFormer


@dataclass
class Accuracy:
    """Counts over texts; add them up with ``+``. An answer is right if all of its tokens are right."""

    texts: int = 0
    texts_with_crossing: int = 0
    """Texts with a token that crosses a mark, so that the model must predict more than the answer."""
    answers: int = 0
    answers_right: int = 0
    tokens: int = 0
    """Tokens in answers."""
    tokens_right: int = 0

    @property
    def answer_accuracy(self) -> float:
        return self.answers_right / self.answers

    @property
    def token_accuracy(self) -> float:
        return self.tokens_right / self.tokens

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def read_tasks(
    path: Path, tokenizer: Tokenizer, *, vocab_size: int, context: int, begin_id: int | None = None
) -> list[TokenizedSample]:
    """Reads and tokenizes the samples of a file.

    Args:
        path: the JSONL file.
        tokenizer: of the model.
        vocab_size: of the model.
        context: largest number of input tokens of a text.
        begin_id: token to put before each text.

    Raises:
        DataError: the file or a line breaks the format, is too long, or cannot be tokenized.
    """
    texts = []
    for sample in read_samples(path):
        tokens = tokenize(sample, tokenizer)
        check_token_ids(tokens.ids, vocab_size, sample.location)
        if begin_id is not None:
            answers = [range(answer.start + 1, answer.stop + 1) for answer in tokens.answers]
            tokens = replace(tokens, ids=[begin_id, *tokens.ids], answers=answers)
        if (needed := tokens.answers[-1].stop - 1) > context:
            raise DataError(
                f"{sample.location}: needs {needed} tokens up to its last answer, but the context is {context}: raise "
                "--context (models get worse beyond the length they were trained with), or shorten the text"
            )
        texts.append(tokens)
    return texts


@torch.no_grad()
def evaluate_tasks(
    model: DCFormer,
    texts: Sequence[TokenizedSample],
    *,
    batch_size: int,
    on_progress: ProgressCallback = lambda done, total: None,
) -> dict[str, Accuracy]:
    """Counts, by task, the answer tokens that are the most likely ones given all tokens before them.

    Args:
        model: the model.
        texts: from :func:`read_tasks`.
        batch_size: texts per forward pass.
        on_progress: called with the number of finished texts and of all texts.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    tasks = {text.task: Accuracy() for text in texts}
    # Similar lengths in a batch need little padding; the longest first, so that a lack of memory shows immediately.
    by_length = sorted(texts, key=lambda text: -len(text.ids))
    on_progress(0, len(texts))
    for first in range(0, len(texts), batch_size):
        batch = by_length[first : first + batch_size]
        for text, right in zip(batch, _right_tokens(model, batch)):
            tasks[text.task] += _count(text, right)
        on_progress(first + len(batch), len(texts))
    return tasks


def _right_tokens(model: DCFormer, batch: Sequence[TokenizedSample]) -> list[list[bool]]:
    """For each text, whether each token of its answers is the most likely one."""
    device = next(model.parameters()).device
    positions = [[position for answer in text.answers for position in answer] for text in batch]
    # The last answer token is only predicted, not an input.
    inputs_BT = pad_rows([text.ids[: text.answers[-1].stop - 1] for text in batch], 0, device)
    # The logits at position p - 1 predict the token at position p.
    logits_at_BN = pad_rows([[position - 1 for position in row] for row in positions], 0, device)
    answers_BN = pad_rows([[text.ids[p] for p in row] for text, row in zip(batch, positions)], 0, device)
    logits_BNV: Tensor = model(inputs_BT, logits_at_B=logits_at_BN)
    if not torch.isfinite(logits_BNV).all():
        raise FloatingPointError("the model's logits are not finite: its weights are corrupt or training has diverged")
    right_BN = (logits_BNV.argmax(-1) == answers_BN).tolist()
    return [right_N[: len(row)] for right_N, row in zip(right_BN, positions)]


def _count(text: TokenizedSample, right: list[bool]) -> Accuracy:
    remaining = iter(right)
    answers = [all(list(islice(remaining, len(answer)))) for answer in text.answers]
    return Accuracy(1, int(text.crosses_mark), len(answers), sum(answers), len(right), sum(right))
