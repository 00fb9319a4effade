"""Which model, where and how: the options that all tools which use a trained model share."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from dcscale.convert import DTYPES, add_source_options, source_options
from dcscale.inference.trained import Trained, open_trained


def usable_device(name: str) -> torch.device:
    """The device of that name, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def whole_number(text: str, least: int = 1) -> int:
    """A number of ``least`` or more."""
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of {least} or more")
    return int(text)


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
    print(f"{options.path} is: {trained.words[0]}", *trained.words[1:], sep="\n", file=sys.stderr)
    vocab_size = trained.config.model.vocab_size
    if options.begin_id is not None and options.begin_id >= vocab_size:
        raise ValueError(f"--begin-id is {options.begin_id}, but must be below the model's {vocab_size} tokens")
    return trained


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """None: as trained."""
    return DTYPES.get(options.dtype)
