"""Runs that resume with other numbers of ranks and workers: which rows are lost, and which are repeated.

One run reads an epoch without interruption. Another one stops after some steps, its state is serialized to JSON, and
new processes resume from it to the end of the epoch. Rows are identified by their hashes; all rows and the rows of each
step are compared.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcscale.bench.data import probe
from dcscale.bench.data.corpus import Corpus, make_corpus
from dcscale.bench.data.probe import written
from dcscale.bench.data.reader import Settings

KINDS = ("dcscale", "mosaic", "litdata", "torchdata")
BEFORE, AFTER = (2, 2), ((2, 2), (2, 3), (3, 2), (1, 2))
"""(ranks, workers of each rank) before the stop and after it."""

GLOBAL_BATCH, STOP = 12, 7
"""Rows of a step over all ranks, divisible by 1, 2 and 3; steps before the stop."""

LENGTH, SHARDS, ROWS = 64, 12, 20
"""Tokens of a row; shards; rows of a shard: 20 steps per epoch."""

Steps = list[Counter]
"""For each step, the hashes of the rows on all ranks."""


def corpus() -> Corpus:
    """The data of these checks."""
    return make_corpus(SHARDS, ROWS * LENGTH, LENGTH)


def check(
    kind: str,
    folder: Path,
    say: Callable[[str], None],
    before: tuple[int, int] = BEFORE,
    after: Iterable[tuple[int, int]] = AFTER,
    timeout: float = 120,
) -> list[dict[str, Any]]:
    """Stop a reader and resume it with each of ``after``; the data is written to ``folder``."""
    root = written(kind, corpus(), folder)
    rows = []
    try:
        uninterrupted, _ = run(kind, root, before, timeout)
        started, states = run(kind, root, before, timeout, steps=STOP)
    except probe.ProbeError as error:
        # Without the two runs to compare with, no restart can be judged.
        return [cell(kind, before, to) | {"outcome": "not run", "error": str(error)} for to in after]
    for to in after:
        row = cell(kind, before, to)
        try:
            resumed, _ = run(kind, root, to, timeout, states=states)
        except probe.ProbeError as error:
            row |= {"outcome": "refused", "error": str(error)}
        else:
            row |= compare(uninterrupted, started, resumed)
        rows.append(row)
        say(f"  {kind} {before} -> {to}: {row['outcome']}")
    return rows


def cell(kind: str, before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
    """The part of a result that identifies it."""
    return {"kind": kind, "before": list(before), "after": list(after)}


def run(
    kind: str,
    root: Path,
    shape: tuple[int, int],
    timeout: float,
    *,
    steps: int | None = None,
    states: Sequence[Any] | None = None,
) -> tuple[Steps, list[Any]]:
    """Run all ranks at the same time.

    Args:
        kind: of the reader.
        root: its data.
        shape: (ranks, workers of each rank).
        timeout: seconds to wait for each rank.
        steps: number of steps; None for the rest of the epoch.
        states: of the ranks of an earlier run, to resume from; see :func:`state_for`.

    Returns:
        (the rows of each step, the states of the ranks).

    Raises:
        ProbeError: a rank failed.
    """
    ranks, workers = shape
    settings = Settings(str(root), LENGTH, GLOBAL_BATCH // ranks, workers=workers, world_size=ranks, slots=12)
    port = _free_port()  # where the ranks of one run find each other
    processes = []
    for rank in range(ranks):
        more = {} if states is None else {"restore": True, "state": state_for(kind, states, rank)}
        processes.append(probe.start("rows", kind, replace(settings, rank=rank), port=port, steps=steps, **more))
    results, errors = [], []
    for process in processes:
        try:
            results.append(probe.finish(process, timeout))
        except probe.ProbeError as error:
            errors.append(error)
            timeout = 5  # the other ranks may wait for this one forever
    if errors:
        raise errors[0]
    return join([result["rows"] for result in results]), [result["state"] for result in results]


def state_for(kind: str, states: Sequence[Any], rank: int) -> Any:
    """The state that a rank resumes from, according to each library's documentation.

    torchdata's states differ by rank; a rank that did not exist before gets the last rank's. The others' states are the
    same on all ranks, and rank 0 saves them.
    """
    return states[min(rank, len(states) - 1)] if kind == "torchdata" else states[0]


def join(ranks: Sequence[Sequence[Sequence[str]]]) -> Steps:
    """The rows of each step over all ranks, which may differ in their number of steps."""
    count = max(len(steps) for steps in ranks)
    return [Counter(row for steps in ranks if n < len(steps) for row in steps[n]) for n in range(count)]


def compare(uninterrupted: Steps, started: Steps, resumed: Steps) -> dict[str, Any]:
    """Which rows of the uninterrupted run were lost or repeated in the run that was stopped and resumed."""
    expected, found = sum(uninterrupted, Counter()), sum(started + resumed, Counter())
    lost, repeated = (expected - found).total(), (found - expected).total()
    same = started + resumed == uninterrupted
    if lost or repeated:
        outcome = f"{lost} lost, {repeated} repeated"
    else:
        # All rows once; the stricter question is whether each step has the same ones.
        outcome = "same batches" if same else "exact, in other batches"
    return {
        "outcome": outcome,
        "rows": expected.total(),
        "lost": lost,
        "repeated": repeated,
        "same_batches": same,
        "error": None,
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
