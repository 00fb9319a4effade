"""Writing a checkpoint so that a run always has a whole one, whatever is killed when.

All ranks write into a folder under a temporary name; each tells the others whether it succeeded;
only then rank 0 seals the folder, renames it, points ``latest`` at it and removes old ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcscale.checkpoint import layout
from dcscale.checkpoint.fragments import write_fragments
from dcscale.checkpoint.weights import save_weights
from dcscale.files import sync_folder, sync_tree, write_atomically, write_json
from dcscale.parallel import Engine


def save_checkpoint(
    engine: Engine,
    run: Path,
    step: int,
    state: dict[str, Any],
    config_yaml: str,
    keep_last: int | None,
    copies: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes the checkpoint of ``step``; all ranks call it together. Returns its folder.

    ``copies`` are further files that it holds, by name. A checkpoint of that step that is already whole is left as it
    is.

    Raises:
        CheckpointError: on every rank if any of them failed; the earlier checkpoints stay.
    """
    root = run / "checkpoints"
    final = root / layout.step_name(step)
    temporary = root / (layout.TEMPORARY_PREFIX + final.name)
    is_main = engine.environment.is_main

    # Rank 0 alone looks, so that a shared disk that is slow to show a file cannot divide the ranks.
    if engine.sum_over_ranks([int(is_main and final.exists() and layout.defect(final) is None)])[0]:
        return final

    def reserve() -> None:
        if is_main:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in [final, *root.glob(layout.TEMPORARY_PREFIX + "*")]:
                if leftover.exists():
                    shutil.rmtree(leftover)
            (temporary / layout.OPTIMIZER).mkdir(parents=True)

    def write_state() -> None:
        write_fragments(engine.snapshot(), temporary / layout.OPTIMIZER)

    def write_rest() -> None:
        save_weights(engine.weights(), temporary / layout.WEIGHTS)
        if is_main:
            write_json(temporary / layout.STATE, state)
            write_atomically(temporary / layout.CONFIG, config_yaml)
            for name, content in (copies or {}).items():
                write_atomically(temporary / name, content)

    def publish() -> None:
        if is_main:
            sync_tree(temporary)
            layout.seal(temporary)
            temporary.rename(final)
            sync_folder(root)
            write_atomically(root / layout.LATEST, final.name + "\n")
            if keep_last is not None:
                # A damaged one must not take the place of a whole one.
                whole = [p for p in layout.checkpoints_of(run) if layout.step_of(p) <= step and not layout.defect(p)]
                for old in whole[:-keep_last]:
                    shutil.rmtree(old)

    for phase in (reserve, write_state, write_rest, publish):
        _together(engine, phase, f"checkpoint {final} was not written")
    return final


def _together(engine: Engine, phase: Callable[[], None], failure: str) -> None:
    """Runs a phase on every rank; if it fails on one, raises on all, with the ranks' own words."""
    error = None
    try:
        phase()
    except Exception as caught:  # told to every rank and raised below
        error = f"{type(caught).__name__}: {caught}"
    errors = engine.errors_of_ranks(error)
    if errors:
        raise layout.CheckpointError(f"{failure}: {errors}")
