"""What a measured figure carries (machine, versions, commit, command, date), and where a tool puts and shows it."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import dcscale

ROOT = Path(__file__).parents[2]


class ResultError(ValueError):
    """A file that is not a result of the benchmark that was asked for its tables."""


def facts(command: list[str], device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """JSON of all of them. ``packages``: those whose versions matter beside torch's; None for one that is missing."""
    return {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(device),
        "versions": {
            "python": platform.python_version(),
            "dcscale": dcscale.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            **{name: _version(name) for name in packages},
        },
    }


def whole_number(text: str) -> int:
    """An option of 1 or more; ``100_000_000`` is one too."""
    digits = text.replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(digits)


def check_output(parser: argparse.ArgumentParser, path: Path | None, beside: str = "") -> None:
    """Ends the tool if a result cannot be written to ``path``; ``beside``: what the message adds of its neighbours."""
    if path is not None and path.suffix != ".json":
        parser.error(f"--output {path}: must end in .json{beside}")
    if path is not None and path.is_dir():
        parser.error(f"--output {path}: is a folder")
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        parser.error(f"--output {path}: {path.parent} is no folder that can be written to")


def print_tables(parser: argparse.ArgumentParser, path: Path, markdown: Callable[[Any], str]) -> None:
    """Prints the tables of an earlier result; ends the tool if ``path`` holds none."""
    try:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:  # JSON's error is a ValueError, and so is that of what is no result
        parser.error(f"--markdown {path}: {error}")


def short(number: float) -> str:
    """Three digits, and all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def slug(device: str) -> str:
    """The device's name for a file's: the GPU's, or the processor's model."""
    name = re.sub(r"\((R|TM)\)", "", _machine(device)["name"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _machine(device: str) -> dict[str, Any]:
    processor = _processor()
    machine = {
        "device": device,
        "name": processor,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        machine["name"] = gpu.name
        machine["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        machine["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
    return machine


def _processor() -> str:
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return models[0].strip() if models else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's, with "-dirty" behind it where files differ from it; None outside of one."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
