"""What several command lines share: types and checks of options, and the tables of earlier results.

Imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole_number(text: str, least: int = 1) -> int:
    """An option that is ``least`` or more; ``100_000_000`` is one too."""
    digits = text.replace("_", "")
    if not (digits.isascii() and digits.isdecimal()) or int(digits) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(digits)


def check_output(parser: argparse.ArgumentParser, path: Path | None, beside: str = "") -> None:
    """Ends the tool if a result cannot be written to ``path``; ``beside``: what the message adds of its neighbours."""
    if path is not None and path.suffix != ".json":
        parser.error(f"--output {path}: must end in .json{beside}")
    if path is not None and path.is_dir():
        parser.error(f"--output {path}: is a folder")
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        parser.error(f"--output {path}: {path.parent} is no folder that can be written to")


class ResultError(ValueError):
    """A file that is not a result of the benchmark that was asked for its tables."""


def print_tables(parser: argparse.ArgumentParser, path: Path, markdown: Callable[[Any], str]) -> None:
    """Prints the tables of an earlier result; ends the tool if ``path`` holds none."""
    try:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:  # JSON's error is a ValueError, and so is that of what is no result
        parser.error(f"--markdown {path}: {error}")


def short(number: float) -> str:
    """Three digits, and all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
