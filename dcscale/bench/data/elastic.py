"""Runs that are stopped and taken up by other numbers of ranks and workers: what is lost, what comes twice.

The uninterrupted run is read to the end of an epoch. The other one is stopped after some steps, its state goes through
JSON, and new processes read on from it to the end. Every row has a name, so both are compared as sets and step by step.
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
"""(ranks, workers of each) before the stop and after it."""

GLOBAL_BATCH, STOP = 12, 7
"""Rows a step over all ranks, which 1, 2 and 3 divide; steps before the stop."""

LENGTH, SHARDS, ROWS = 64, 12, 20
"""Tokens a row; shards, and rows of each: 20 steps an epoch."""

Steps = list[Counter]
"""Of each step, the rows that all ranks together got."""


def corpus() -> Corpus:
    return make_corpus(SHARDS, ROWS * LENGTH, LENGTH)


def check(
    kind: str,
    folder: Path,
    say: Callable[[str], None],
    before: tuple[int, int] = BEFORE,
    after: Iterable[tuple[int, int]] = AFTER,
    timeout: float = 120,
) -> list[dict[str, Any]]:
    """Stop a reader and take it up in each way; ``folder`` gets the data."""
    root = written(kind, corpus(), folder)
    rows = []
    try:
        whole, _ = run(kind, root, before, timeout)
        begun, states = run(kind, root, before, timeout, steps=STOP)
    except probe.ProbeError as error:
        return [cell(kind, before, to) | {"outcome": "not run", "error": str(error)} for to in after]
    for to in after:
        row = cell(kind, before, to)
        try:
            rest, _ = run(kind, root, to, timeout, states=states)
        except probe.ProbeError as error:
            row |= {"outcome": "refused", "error": str(error)}
        else:
            row |= compare(whole, begun, rest)
        rows.append(row)
        say(f"  {kind} {before} -> {to}: {row['outcome']}")
    return rows


def cell(kind: str, before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
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
    """(the rows of each step, the states of the ranks) of one run of so many (ranks, workers).

    With ``states`` a rank goes on from that of the same rank before, or of rank 0 where there was none; see
    :func:`state_for`.
    """
    ranks, workers = shape
    settings = Settings(str(root), LENGTH, GLOBAL_BATCH // ranks, workers=workers, world_size=ranks, slots=12)
    port = _free_port()
    processes = []
    for rank in range(ranks):
        more = {} if states is None else {"restore": True, "state": state_for(kind, states, rank)}
        mine = replace(settings, rank=rank)
        processes.append(probe.start("rows", kind, mine, port=port, steps=steps, **more))
    results, errors = [], []
    for process in processes:
        try:
            results.append(probe.finish(process, timeout))
        except probe.ProbeError as error:
            errors.append(error)
            timeout = 5  # the others wait for it in vain
    if errors:
        raise errors[0]
    return join([result["rows"] for result in results]), [result["state"] for result in results]


def state_for(kind: str, states: Sequence[Any], rank: int) -> Any:
    """The state that a rank goes on from, as each library's documentation has it: torchdata's is of one rank, so that
    a new rank gets that of the last; those of the others are the same on all ranks and are written by rank 0."""
    return states[min(rank, len(states) - 1)] if kind == "torchdata" else states[0]


def join(of_ranks: Sequence[Sequence[Sequence[str]]]) -> Steps:
    """The rows of each step over all ranks; ranks may have unlike numbers of steps at the end."""
    most = max(len(steps) for steps in of_ranks)
    return [Counter(row for steps in of_ranks if n < len(steps) for row in steps[n]) for n in range(most)]


def compare(whole: Steps, begun: Steps, rest: Steps) -> dict[str, Any]:
    """What became of the rows of the uninterrupted run in one that was stopped and taken up."""
    wanted, found = sum(whole, Counter()), sum(begun + rest, Counter())
    lost, repeated = (wanted - found).total(), (found - wanted).total()
    same = begun + rest == whole
    if lost or repeated:
        outcome = f"{lost} lost, {repeated} repeated"
    else:
        outcome = "same batches" if same else "exact, in other batches"
    return {
        "outcome": outcome,
        "rows": wanted.total(),
        "lost": lost,
        "repeated": repeated,
        "same_batches": same,
        "error": None,
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
