"""A trained model of any format that :mod:`dcscale.convert` reads, to be used without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dcscale.config import Config
from dcscale.convert import Conversion, prepare
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
    def words(self) -> list[str]:
        """What it is, and what a person should know of how it was taken."""
        step = "" if self.step is None else f" (step {self.step})"
        return [self.conversion.found.words + step, *(f"note: {note}" for note in self.conversion.notes)]

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
