"""Find and load a trained model of any format that :mod:`dcscale.convert` reads, without DeepSpeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.checkpoint.layout import OPTIMIZER
from dcscale.cli import source_options
from dcscale.config import Config
from dcscale.convert import DTYPES, Conversion, prepare
from dcscale.data import DataError, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from dcscale.data.tokenizers import TOKENIZER_NAME
from dcscale.models import DCFormer


@dataclass(frozen=True)
class TrainedModel:
    """A model that was found and checked. Weights are read by :meth:`load`, the tokenizer on first access."""

    conversion: Conversion
    tokenizer_spec: str | None
    """Tokenizer to use instead of the model's own; see :func:`dcscale.data.load_tokenizer`."""
    eos_token: str | None
    """Text of the end-of-document token, for a tokenizer that does not define it."""

    @property
    def config(self) -> Config:
        return self.conversion.config

    @property
    def folder(self) -> Path:
        """The folder of the model; for a run, that of its checkpoint."""
        return self.conversion.source.folder

    @property
    def step(self) -> int | None:
        """Optimizer steps that the model was trained for; None if not known."""
        return self.conversion.state.get("step") or None

    @property
    def validation_sequences(self) -> int | None:
        """``validation.sequences`` of the run whose checkpoint the model is; None if it is no checkpoint."""
        return self.config.validation.sequences if (self.folder / OPTIMIZER).is_dir() else None

    @property
    def description(self) -> list[str]:
        """Lines for the user: what the model is, and notes on its conversion."""
        step = "" if self.step is None else f" (step {self.step})"
        return [self.conversion.source.description + step, *(f"note: {note}" for note in self.conversion.notes)]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was given, else the model's own.

        Raises:
            DataError: there is none, or it cannot be loaded.
        """
        if self.tokenizer_spec is not None:
            return load_tokenizer(self.tokenizer_spec, self.eos_token)
        own = self.conversion.state.get("tokenizer")
        if own is not None and own["spec"] == "byte":
            return load_tokenizer("byte", self.eos_token)
        file = self.folder / TOKENIZER_NAME
        made = self.conversion.extra_files.get(TOKENIZER_NAME)  # from a tokenizer in another form
        if own is None and made is None and not file.is_file():
            raise DataError(f"{self.folder} has no {TOKENIZER_NAME}: name one with --tokenizer, or 'byte'")
        eos = own["eos_id"] if own is not None and self.eos_token is None else self.eos_token
        return HuggingFaceTokenizer(file, eos, None if made is None else made.encode())

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> DCFormer:
        """Loads the model; ``dtype`` None: as trained. See :meth:`dcscale.convert.Conversion.load`."""
        return self.conversion.load(device, dtype)


def open_trained(
    path: Path, *, tokenizer: str | None = None, eos_token: str | None = None, **options: Any
) -> TrainedModel:
    """Opens the model at ``path``, which may also be a run. Unpickles nothing but tensors.

    Args:
        path: run, checkpoint, model folder, or a folder of another format.
        tokenizer: tokenizer to use instead of the model's own.
        eos_token: text of the end-of-document token.
        options: as for :func:`dcscale.convert.prepare`.

    Raises:
        ConversionError: there is no model, or not one that dcscale supports; lists all problems.
    """
    return TrainedModel(prepare(path, "dcscale", **options), tokenizer, eos_token)


ProgressCallback = Callable[[int, int], None]
"""Called with the number of items that are done, and their total number."""


def pad_rows(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    """Rows as an int64 tensor [B, T], padded at the end to T, the length of the longest row."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)


def check_token_ids(ids: Sequence[int], vocab_size: int, location: str) -> None:
    """Raises DataError if a token id is outside the model's vocabulary; ``location`` begins the message."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{location}: the tokenizer gives token {largest}, but the model has {vocab_size} tokens: use the "
            "tokenizer that the model was trained with (--tokenizer)"
        )


def open_model(options: argparse.Namespace) -> TrainedModel:
    """Opens the model that command-line options name, without loading it; prints its description to stderr.

    Raises:
        ValueError: see :func:`open_trained`; or the model has no token ``--begin-id``.
    """
    trained = open_trained(
        options.path, tokenizer=options.tokenizer, eos_token=options.eos_token, **source_options(options)
    )
    print(f"{options.path} is: {trained.description[0]}", *trained.description[1:], sep="\n", file=sys.stderr)
    vocab_size = trained.config.model.vocab_size
    if options.begin_id is not None and options.begin_id >= vocab_size:
        raise ValueError(f"--begin-id is {options.begin_id}, but must be below the model's {vocab_size} tokens")
    return trained


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype that ``--dtype`` names; None: as trained."""
    return DTYPES.get(options.dtype)
