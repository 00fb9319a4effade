"""Which code a run is of."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import dcscale

LIBRARIES = ("torch", "deepspeed", "safetensors", "numpy")
ROOT = Path(dcscale.__file__).parents[1]


def versions() -> dict[str, str]:
    """Of dcscale, Python, and the libraries whose arithmetic or files a run depends on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"dcscale": dcscale.__version__, "python": platform.python_version(), **found}


def git_revision(root: Path = ROOT) -> dict[str, Any] | None:
    """``{"commit": HASH, "dirty": whether files it tracks have changed}``; None where ``root`` is no git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # the package lies within a repository of something else
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit, or not ours to read
        return None
