"""Loss over a text by a sliding window: each token is predicted once, from all the text that the window grants it.

With a context of C tokens and a stride of S, window number i has tokens i * S to i * S + C - 1 as inputs. The first
window's predictions all count, of each further one the last S: those that have at least C - S + 1 tokens before them.
The text's first token is given, not predicted, unless another token is put before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcscale.data import DataError, Tokenizer
from dcscale.data.stream.sequences import IGNORED
from dcscale.evaluation.loading import Told, check_ids, padded
from dcscale.evaluation.results import Losses, losses
from dcscale.models import DCFormer


@dataclass(frozen=True)
class Text:
    """A document and its windows."""

    name: str
    ids: list[int]
    """The first is given."""
    text_bytes_per_token: float
    context: int
    stride: int

    def windows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs and targets of each; ``IGNORED`` where an earlier window has predicted the token."""
        last = len(self.ids) - 1
        predicted = begin = 0
        while predicted < last:
            end = min(begin + self.context, last)
            targets = [*[IGNORED] * (predicted - begin), *self.ids[predicted + 1 : end + 1]]
            yield self.ids[begin:end], targets
            predicted = end
            begin += self.stride


def read_text(
    path: Path, tokenizer: Tokenizer, *, vocab_size: int, context: int, stride: int, begin_id: int | None = None
) -> Text:
    """A file of UTF-8 text, which is one document; its end is no token.

    Args:
        vocab_size: the model's.
        context: C, tokens that the model sees at once.
        stride: S, tokens by which windows are apart; 1 to C.
        begin_id: token to put before the text.

    Raises:
        DataError: the file cannot be read, is no text, or has nothing to predict; or an argument is out of range.
    """
    if not 1 <= stride <= context:
        raise DataError(f"stride is {stride}, but must be from 1 to the context, {context}")
    try:
        content = path.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    ids = tokenizer.encode(text)
    given = [] if begin_id is None else [begin_id]
    if len(given + ids) < 2:
        raise DataError(f"{path}: has {len(ids)} tokens, but one is needed beside the first, which is not predicted")
    check_ids(ids, vocab_size, str(path))
    return Text(str(path), given + ids, len(content) / len(ids), context, stride)


@torch.no_grad()
def evaluate_text(model: DCFormer, text: Text, *, batch_size: int, told: Told = lambda done, total: None) -> Losses:
    """Mean loss over a text.

    Bits per byte are of the mean loss of a token and the mean bytes of a token, as in training.

    Args:
        batch_size: windows at once.
        told: gets the tokens that are predicted, and all that will be.

    Raises:
        FloatingPointError: see :func:`losses`.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    done, tokens, each = 0, len(text.ids) - 1, text.windows()
    told(0, tokens)
    while batch := list(itertools.islice(each, batch_size)):
        inputs, targets = zip(*batch)
        total += model(padded(inputs, 0, device), padded(targets, IGNORED, device))
        done += sum(target != IGNORED for row in targets for target in row)
        told(done, tokens)
    return losses(text.name, float(total), tokens, text.text_bytes_per_token)
