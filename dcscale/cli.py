"""Command-line options that several tools share, and checks of their values.

Imports only the standard library, so that every tool can parse its arguments, and print ``--help``, before it imports
torch. What needs torch imports it when it is called.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_DTYPES = ("fp32", "bf16")
"""Names of ``dcscale.convert.DTYPES``, which imports torch."""

MODEL_TARGETS = ("dcscale", "upstream", "huggingface")
"""``dcscale.convert.TARGETS``, which imports torch."""


def whole_number(text: str, minimum: int = 1) -> int:
    """Type of an option that is an integer of at least ``minimum``; ``100_000_000`` is allowed."""
    digits = text.replace("_", "")
    if not (digits.isascii() and digits.isdecimal()) or int(digits) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of {minimum} or more")
    return int(digits)


def positive_number(text: str) -> float:
    """Type of an option that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


whole_number_from_0 = partial(whole_number, minimum=0)
"""Type of an option that is an integer of 0 or more."""


def usable_device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    """The device that ``--device`` names; None: the GPU if there is one, else the CPU.

    Exits through ``parser.error`` if torch cannot use it. Not an argparse type, since it imports torch.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device can exist in name only
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is not built for this device
        parser.error(f"argument --device: {name!r} cannot be used: {str(error).splitlines()[0]}")
    return device


def check_output(parser: argparse.ArgumentParser, path: Path | None, note: str = "") -> None:
    """Exits through ``parser.error`` if a result cannot be written to ``path``. ``note`` is added to the message."""
    if path is not None and path.suffix != ".json":
        parser.error(f"--output {path}: must end in .json{note}")
    if path is not None and path.is_dir():
        parser.error(f"--output {path}: is a folder")
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        parser.error(f"--output {path}: {path.parent} is not a writable folder")


def add_bad_row_options(parser: argparse.ArgumentParser) -> None:
    """Adds the policy for rows of text that cannot be used, see :mod:`dcscale.data.bad_rows`."""
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="what to do about a row whose text cannot be used, because it is not UTF-8 or not JSON, or the text is "
        "missing, null or not a string: stop (default), or leave it out and count it by reason",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="with --on-bad-row skip: stop if more than 100 rows and this fraction of all are bad (default 0.01)",
    )


class ResultError(ValueError):
    """A file that is not a result of this benchmark."""


def print_tables(parser: argparse.ArgumentParser, path: Path, markdown: Callable[[Any], str]) -> None:
    """Prints the tables of an earlier result; exits through ``parser.error`` if ``path`` is not a result."""
    from dcscale.files import read_json

    try:
        print(markdown(read_json(path)))
    except ValueError as error:
        parser.error(f"--markdown {path}: {error}")


def short(number: float) -> str:
    """Three significant digits; all digits before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that find a model and choose how it is loaded.

    :func:`dcscale.evaluation.loading.open_model`, :func:`usable_device` and
    :func:`dcscale.evaluation.loading.dtype_of` read them.
    """
    parser.add_argument(
        "path",
        type=Path,
        help="run (its newest complete checkpoint is used), checkpoint, model folder, or any other folder or file "
        "that tools/convert_checkpoint.py reads; it is only read",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json, or byte (default: the one next to the model)"
    )
    parser.add_argument(
        "--eos-token", metavar="NAME", help="the tokenizer's end-of-document token, instead of the one that is found"
    )
    parser.add_argument(
        "--begin-id",
        type=whole_number_from_0,
        metavar="ID",
        help="token to put before every text, for a model that was trained so: Llama's beginning-of-text (default: "
        "none, as in dcscale's training)",
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, help="dtype to compute in (default: as trained)")
    add_source_options(parser)


SOURCE_OPTIONS: dict[str, dict[str, Any]] = {
    "from_copies": {
        "choices": ("merged", "original"),
        "help": "upstream: use dw_m, qkw_m or dw1, dd, qkw (default: the trained ones, found by their values)",
    },
    "gelu": {
        "choices": ("tanh", "erf"),
        "help": "upstream: GELU of the compose projection (default: erf if trained by upstream's PyTorch code, else "
        "tanh)",
    },
    "local_keys": {
        "type": whole_number,
        "metavar": "N",
        "help": "upstream: keys that a query of a local layer sees, including itself (default: window_size, one more "
        "if trained by upstream's PyTorch code)",
    },
    "maxtext_config": {
        "type": Path,
        "metavar": "FILE.yml",
        "help": "MaxText: the config of its run (default: config.yml in its folders)",
    },
}
"""Options that state what a model's files do not, by name, with the arguments of ``add_argument``.

A format of dcscale.convert names those that it understands in ``Format.options``. They are defined here so that
``--help`` does not import torch.
"""


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``SOURCE_OPTIONS``."""
    group = parser.add_argument_group("what the model's files do not state")
    for name, arguments in SOURCE_OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), **arguments)


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """The values of ``SOURCE_OPTIONS``, as :func:`dcscale.convert.prepare` takes them; None for those not given."""
    return {name: getattr(options, name) for name in SOURCE_OPTIONS}
