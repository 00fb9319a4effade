"""The first minutes on a GPU: measure what the design of the Triton kernels assumes, and say what to change.

steps.py measures, verdicts.py decides; the choices and checks of the command line are here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcscale.files import write_json

MINUTES = 2.5
"""Nothing starts after this time."""

_FIXED = ("dtype", "batch", "length", "heads", "head_dim", "window", "rank", "kinds", "quick", "seconds")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the option --first-look."""
    help = f"on an NVIDIA GPU: measure what the Triton kernels' design assumes, and decide ({MINUTES} minutes)"
    parser.add_argument("--first-look", action="store_true", help=help)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits through ``parser.error`` if options contradict --first-look."""
    if not options.first_look:
        return
    given = [name for name in (*_FIXED, "static", "markdown") if getattr(options, name) != parser.get_default(name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"--first-look: what it measures is fixed; leave out {names}")


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    facts: Mapping[str, Any],
    path: Path,
    say: Callable[[str], Any],
) -> int:
    """Run all steps, print the decisions, and write everything to ``path`` after each step -> the exit code.

    Exits through ``parser.error`` where that is not possible.
    """
    if options.device != "cuda":
        parser.error("--first-look: it measures an NVIDIA GPU, and this is a CPU; --static models the kernels anywhere")
    if importlib.util.find_spec("triton") is None:
        parser.error("--first-look: triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--first-look: TRITON_INTERPRET=1 is set, with which nothing is compiled; unset it")
    from dcscale.bench.attention.first_look.steps import Look, take

    versions = (f"{name} {version}" for name, version in facts["versions"].items() if version is not None)
    say(f"{facts['machine']['name']}; {', '.join(versions)}")
    code = take(Look.at_gpu(options.minutes or MINUTES, say), lambda found: write_json(path, {**facts, **found}))
    say(f"written: {path}")
    return code
