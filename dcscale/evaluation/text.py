"""Loss over a text with a sliding window; each token is predicted exactly once.

With a context of C tokens and a stride of S tokens, window i has the tokens i * S to i * S + C - 1 as inputs. All
predictions of the first window count, and the last S predictions of each further window, which have at least C - S + 1
tokens of context. The first token of the text is not predicted, unless another token is put before it.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcscale.data import DataError, Tokenizer
from dcscale.data.stream.sequences import IGNORED
from dcscale.evaluation.loading import ProgressCallback, check_token_ids, pad_rows
from dcscale.evaluation.results import LossResult, loss_result
from dcscale.models import DCFormer


@dataclass(frozen=True)
class Text:
    """A document in tokens, and its windows."""

    name: str
    ids: list[int]
    """Token ids; the first one is not predicted."""
    text_bytes_per_token: float
    context: int
    stride: int

    def windows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs and targets of each window; the target is ``IGNORED`` where an earlier window predicts the token."""
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
    """Reads and tokenizes a file of UTF-8 text as one document, without an end-of-document token.

    Args:
        path: the file.
        tokenizer: of the model.
        vocab_size: of the model.
        context: C, tokens per window.
        stride: S, tokens between the starts of two windows; 1 to C.
        begin_id: token to put before the text.

    Raises:
        DataError: the file cannot be read, is not text, or has no token to predict; or an argument is out of range.
    """
    if not 1 <= stride <= context:
        raise DataError(f"stride is {stride}, but must be from 1 to the context, {context}")
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    ids = tokenizer.encode(text)
    prefix = [] if begin_id is None else [begin_id]
    if len(prefix + ids) < 2:
        raise DataError(f"{path}: has {len(ids)} tokens, but needs one more than the first, which is not predicted")
    check_token_ids(ids, vocab_size, str(path))
    return Text(str(path), prefix + ids, len(content) / len(ids), context, stride)


@torch.no_grad()
def evaluate_text(
    model: DCFormer, text: Text, *, batch_size: int, on_progress: ProgressCallback = lambda done, total: None
) -> LossResult:
    """Mean loss over a text.

    Bits per byte are computed from the mean loss and the mean bytes per token, as in training.

    Args:
        model: the model.
        text: from :func:`read_text`.
        batch_size: windows per forward pass.
        on_progress: called with the number of predicted tokens and of all tokens to predict.

    Raises:
        FloatingPointError: see :func:`loss_result`.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    done, tokens, windows = 0, len(text.ids) - 1, text.windows()
    on_progress(0, tokens)
    while batch := list(itertools.islice(windows, batch_size)):
        inputs, targets = zip(*batch)
        # Padding follows the tokens, so causal attention hides it; its targets are IGNORED.
        total += model(pad_rows(inputs, 0, device), pad_rows(targets, IGNORED, device))
        done += sum(target != IGNORED for row in targets for target in row)
        on_progress(done, tokens)
    return loss_result(text.name, float(total), tokens, text.text_bytes_per_token)
