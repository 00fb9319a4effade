"""What a command line says of a source that its files do not tell: the same words in every tool that reads one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; :func:`source_options` reads them."""
    group = parser.add_argument_group("what the source's files do not tell")
    group.add_argument(
        "--from-copies",
        choices=("merged", "original"),
        help="upstream: take dw_m, qkw_m or dw1, dd, qkw (default: the trained ones, found by their values)",
    )
    group.add_argument(
        "--gelu",
        choices=("tanh", "erf"),
        help="upstream: of the compose projection (default: erf if trained by upstream's PyTorch code, else tanh)",
    )
    group.add_argument(
        "--local-keys",
        type=int,
        metavar="N",
        help="upstream: keys a query of a local layer sees, itself included (default: window_size, one more if trained "
        "by upstream's PyTorch code)",
    )
    group.add_argument(
        "--maxtext-config",
        type=Path,
        metavar="FILE.yml",
        help="MaxText: the config of its run (default: config.yml in its folders)",
    )


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """They, as :func:`dcscale.convert.prepare` takes them."""
    return {
        "truth": options.from_copies,
        "gelu": options.gelu,
        "local_keys": options.local_keys,
        "maxtext_config": options.maxtext_config,
    }
