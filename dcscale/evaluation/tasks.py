"""Next-token accuracy on marked answers; the files' format: :mod:`dcscale.evaluation.task_format`.

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
from dcscale.evaluation.loading import Told, check_ids, padded
from dcscale.evaluation.task_format import TokenSample, read_samples, tokenise
from dcscale.models import DCFormer


@dataclass
class Accuracy:
    """Counts, which add up, over some texts. An answer is right if all of its tokens are."""

    texts: int = 0
    texts_in_pieces: int = 0
    """Texts that were tokenised in pieces, as a token reached across a mark."""
    answers: int = 0
    answers_right: int = 0
    tokens: int = 0
    """Tokens of answers."""
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
) -> list[TokenSample]:
    """The samples of a file in tokens.

    Args:
        vocab_size: the model's.
        context: tokens that the model sees at once; no text may need more.
        begin_id: token to put before each text.

    Raises:
        DataError: the file, or a line in it, is not as the format has it, or too long, or does not fit the tokenizer.
    """
    texts = []
    for sample in read_samples(path):
        tokens = tokenise(sample, tokenizer)
        check_ids(tokens.ids, vocab_size, sample.where)
        if begin_id is not None:
            answers = [range(answer.start + 1, answer.stop + 1) for answer in tokens.answers]
            tokens = replace(tokens, ids=[begin_id, *tokens.ids], answers=answers)
        if (needed := tokens.answers[-1].stop - 1) > context:
            raise DataError(
                f"{sample.where}: takes {needed} tokens up to its last answer, but the context is {context}: raise "
                "--context (beyond the length of training, models get worse), or shorten the text"
            )
        texts.append(tokens)
    return texts


@torch.no_grad()
def evaluate_tasks(
    model: DCFormer,
    texts: Sequence[TokenSample],
    *,
    batch_size: int,
    told: Told = lambda done, total: None,
) -> dict[str, Accuracy]:
    """Whether the likeliest token, given all tokens before it, is the answer's: counts of each task, in order.

    Args:
        batch_size: texts at once.
        told: gets the texts that are done, and all.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    tasks = {text.task: Accuracy() for text in texts}
    # Batches of one length waste the least; the longest first, so that too little memory shows at once.
    by_length = sorted(texts, key=lambda text: -len(text.ids))
    told(0, len(texts))
    for first in range(0, len(texts), batch_size):
        batch = by_length[first : first + batch_size]
        for text, right in zip(batch, _right(model, batch)):
            tasks[text.task] += _count(text, right)
        told(first + len(batch), len(texts))
    return tasks


def _right(model: DCFormer, batch: Sequence[TokenSample]) -> list[list[bool]]:
    """Whether each token of each answer is the likeliest."""
    device = next(model.parameters()).device
    numbers = [[number for answer in text.answers for number in answer] for text in batch]
    inputs_BT = padded([text.ids[: text.answers[-1].stop - 1] for text in batch], 0, device)
    at_BN = padded([[number - 1 for number in row] for row in numbers], 0, device)
    wanted_BN = padded([[text.ids[number] for number in row] for text, row in zip(batch, numbers)], 0, device)
    logits_BNV: Tensor = model(inputs_BT, logits_at_B=at_BN)
    if not torch.isfinite(logits_BNV).all():
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or training has diverged")
    right_BN = (logits_BNV.argmax(-1) == wanted_BN).tolist()
    return [right_N[: len(row)] for right_N, row in zip(right_BN, numbers)]


def _count(text: TokenSample, right: list[bool]) -> Accuracy:
    rest = iter(right)
    each = [all(list(islice(rest, len(answer)))) for answer in text.answers]
    return Accuracy(1, int(text.in_pieces), len(each), sum(each), len(right), sum(right))
