"""Code revision, machine and versions, stored in checkpoints and with measured results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dcscale

# Libraries whose arithmetic or file formats a run depends on.
LIBRARIES = ("torch", "deepspeed", "safetensors", "numpy")
ROOT = Path(dcscale.__file__).parents[1]
REVISION = "revision.json"
"""In a copy of the code, what :func:`git_revision` says of the checkout that it was made from."""


def versions() -> dict[str, str]:
    """Versions of dcscale, Python and :data:`LIBRARIES`, by name."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"dcscale": dcscale.__version__, "python": platform.python_version(), **found}


def git_revision(root: Path = ROOT) -> dict[str, Any] | None:
    """``{"commit": HASH, "dirty": whether tracked files have changed}``; None if ``root`` is not a git checkout.

    A copy of the code that ``launch/slurm/submit.py`` has made says in a file of what checkout it is.
    """
    if (root / REVISION).exists():
        try:
            content = json.loads((root / REVISION).read_bytes())
            return {"commit": str(content["commit"]), "dirty": bool(content["dirty"])}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # somebody else has written it
            return None

    def git(*arguments: str) -> str:
        # Allow a checkout that another user owns, such as a copy on another machine: it is only read.
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # the package is inside a repository of another project
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit, or no permission to read it
        return None


def facts(command: list[str], device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Provenance of a measured result, as JSON: command, date, commit, machine, versions.

    Args:
        command: the command line.
        device: ``cpu`` or ``cuda``.
        packages: further packages whose versions matter; the version of a missing package is None.
    """
    import torch

    return {
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit_name(),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "dcscale": dcscale.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            **{name: _version(name) for name in packages},
        },
    }


def machine(device: str) -> dict[str, Any]:
    """Processor, cores and memory of this machine, and the GPU if ``device`` is ``cuda``, as JSON."""
    import torch

    processor = _processor()
    found = {
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
        found["name"] = gpu.name
        found["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        found["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
    return found


def slug(device: str) -> str:
    """The name of the GPU or processor as part of a file name: lower case letters, digits and hyphens."""
    name = re.sub(r"\((R|TM)\)", "", machine(device)["name"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return models[0].strip() if models else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit_name() -> str | None:
    """First 12 digits of the commit, with "-dirty" if tracked files have changed; None outside of a git checkout."""
    revision = git_revision()
    return None if revision is None else revision["commit"][:12] + ("-dirty" if revision["dirty"] else "")
