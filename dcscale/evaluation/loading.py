"""A trained model of any format that :mod:`dcscale.convert` reads, used without DeepSpeed; its command-line options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.cli import whole_number
from dcscale.config import Config
from dcscale.convert import DTYPES, Conversion, add_source_options, prepare, source_options
from dcscale.data import ByteTokenizer, DataError, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from dcscale.data.tokenizers import TOKENIZER_NAME
from dcscale.models import DCFormer


@dataclass(frozen=True)
class Trained:
    """A model that was found. Its tensors are read by :meth:`load` only, its tokenizer when it is asked for."""

    conversion: Conversion
    tokenizer_spec: str | None
    """Takes the place of the model's own: see :func:`dcscale.data.load_tokenizer`."""
    eos_token: str | None
    """Name of the token that ends a document, for a tokenizer of which that is not known."""

    @property
    def config(self) -> Config:
        return self.conversion.config

    @property
    def folder(self) -> Path:
        """Where it lies: of a run, the checkpoint."""
        return self.conversion.found.folder

    @property
    def step(self) -> int | None:
        """The step of training it is from; None where that is not known."""
        return self.conversion.state.get("step") or None

    @property
    def description(self) -> list[str]:
        """What it is, and what a person should know of how it was taken."""
        step = "" if self.step is None else f" (step {self.step})"
        return [self.conversion.found.description + step, *(f"note: {note}" for note in self.conversion.notes)]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that was named, else the model's own.

        Raises:
            DataError: there is none, or it cannot be loaded.
        """
        if self.tokenizer_spec is not None:
            return load_tokenizer(self.tokenizer_spec, self.eos_token)
        own = self.conversion.state.get("tokenizer")
        if own is not None and own["spec"] == "byte":
            return ByteTokenizer()
        file = self.folder / TOKENIZER_NAME
        if own is None and not file.is_file():
            raise DataError(f"{self.folder} has no {TOKENIZER_NAME}: name one with --tokenizer, or 'byte'")
        return HuggingFaceTokenizer(file, self.eos_token if own is None else own["eos_id"])

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> DCFormer:
        """The model; ``dtype`` None is the type it was trained in. See :meth:`dcscale.convert.Conversion.load`."""
        return self.conversion.load(device, dtype)


def open_trained(path: Path, *, tokenizer: str | None = None, eos_token: str | None = None, **options: Any) -> Trained:
    """Finds out what ``path`` is, a run too; ``options`` as for :func:`dcscale.convert.prepare`.

    Nothing is unpickled but tensors.

    Raises:
        ConversionError: it is no model, or not one that dcscale can have; everything in the way is listed.
    """
    return Trained(prepare(path, "dcscale", **options), tokenizer, eos_token)


Told = Callable[[int, int], None]
"""Gets how much is done, and of how much."""


def padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    """int64 [B, T], T of the longest row."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises DataError for a token that the model does not have."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {largest}, but the model has {vocab_size} tokens: name the tokenizer "
            "that it was trained with by --tokenizer"
        )


def usable_device(name: str) -> torch.device:
    """The device of that name, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; :func:`open_model` reads those that find the model, :func:`dtype_of` one of the others."""
    parser.add_argument(
        "path",
        type=Path,
        help="run (its newest whole checkpoint is used), checkpoint, model folder, or any other folder that "
        "tools/convert_checkpoint.py reads; it is only read",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json, or byte (default: what lies beside the model)"
    )
    parser.add_argument(
        "--eos-token", metavar="NAME", help="the tokenizer's token that ends a document, where that is not clear"
    )
    parser.add_argument(
        "--begin-id",
        type=partial(whole_number, least=0),
        metavar="ID",
        help="token to put before every text, for a model that was trained so: Llama's beginning-of-text (default: "
        "none, as in dcscale's training)",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type to compute in (default: as trained)")
    add_source_options(parser)


def open_model(options: argparse.Namespace) -> Trained:
    """The model that was named, not loaded yet; tells on stderr what it is.

    Raises:
        ValueError: see :func:`open_trained`; or the model does not have the token of ``--begin-id``.
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
    """None: as trained."""
    return DTYPES.get(options.dtype)
