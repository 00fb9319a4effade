"""What a probe does: read and time epochs, start anew, or list the rows that one rank gets."""

from __future__ import annotations

import hashlib
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dcscale.bench.data import clock
from dcscale.bench.data.corpus import EOS_ID, VOCAB_SIZE
from dcscale.bench.data.planning import planning
from dcscale.bench.data.reader import Reader, Settings
from dcscale.bench.data.readers import KINDS


def rate(kind: str, settings: Settings, histogram: str, epochs: int) -> dict[str, Any]:
    """Read one epoch and compare its tokens with the corpus; then time each of the next ones.

    These find processes started and files in the machine's memory. ``histogram`` is a file of how often each
    token is in the corpus.
    """
    reader = _open(kind, settings)
    expected, found = np.load(histogram), np.zeros(VOCAB_SIZE, np.int64)
    began, first, rows = time.perf_counter(), None, 0
    for batch in reader.epoch():
        first = first or time.perf_counter() - began
        rows += len(batch)
        found += np.bincount(batch.numpy().reshape(-1), minlength=VOCAB_SIZE)
    result = {"first_batch_seconds": first, "wrong": difference(expected, found, settings.length, rows)}
    if result["wrong"] is None:
        result["epochs"] = [_timed(reader) for _ in range(epochs)]
    reader.close()
    return result


def _timed(reader: Reader) -> dict[str, float]:
    before, tokens = clock.read(), 0
    for batch in reader.epoch():
        tokens += batch.numel()
    spent = clock.read().since(before)
    return {"tokens": tokens, "wall_seconds": spent.wall, "cpu_seconds": spent.cpu}


def difference(expected: np.ndarray, found: np.ndarray, length: int, rows: int) -> str | None:
    """How an epoch's tokens differ from those of the corpus; None where they do not.

    A reader that packs by itself may end with a row whose last token is only a target: then that token is missing, and
    a token of padding, which is the end-of-document token, is in its place. So one token may be exchanged for it.
    """
    total = int(expected.sum())
    if rows * length != total:
        return f"{rows * length:,} tokens in an epoch instead of {total:,}"
    surplus = found - expected
    if np.abs(surplus).sum() == 0 or (surplus[EOS_ID] == 1 and np.abs(surplus).sum() == 2):
        return None
    return f"{int(np.maximum(surplus, 0).sum()):,} of {total:,} tokens are not those of the data"


def first_batch(kind: str, settings: Settings, state: Any = None, batches: int = 1) -> dict[str, Any]:
    """Seconds from opening, or restoring, to the first batch; libraries are imported before."""
    reader_type = KINDS[kind].load()
    began = time.perf_counter()
    reader = reader_type(settings)
    if state is not None:
        reader.restore(state)
    for _ in islice(reader.epoch(), batches):
        pass
    result = {"seconds": time.perf_counter() - began}
    if hasattr(reader, "stream"):
        result["shards_read"] = reader.stream.shards_read
    reader.close()
    return result


def states(kind: str, settings: Settings, batches: list[int]) -> list[Any]:
    """The states after so many batches."""
    reader, found = _open(kind, settings), []
    for number, _ in enumerate(reader.epoch(), start=1):
        if number in batches:
            found.append(reader.state())
    reader.close()
    return found


def rows(
    kind: str, settings: Settings, steps: int | None = None, state: Any = None, restore: bool = False
) -> dict[str, Any]:
    """The rows of each batch of this rank, as hashes, of so many steps or to the epoch's end, and the state then."""
    reader = _open(kind, settings)
    if restore:
        reader.restore(state)
    found = [[name_of(row) for row in batch.numpy()] for batch in islice(reader.epoch(), steps)]
    result = {"rows": found, "state": None if steps is None else reader.state()}
    reader.close()
    return result


def name_of(row_L: np.ndarray) -> str:
    """The name by which a row is known."""
    return hashlib.blake2b(row_L.astype(np.int64).tobytes(), digest_size=8).hexdigest()


def peak(kind: str, settings: Settings) -> dict[str, Any]:
    """Peak memory of an epoch, above what the process has when all is imported and nothing read."""
    reader_type = KINDS[kind].load()
    clock.reset_peak()
    before = clock.memory_bytes("VmRSS")
    reader = reader_type(settings)
    for _ in reader.epoch():
        pass
    reader.close()
    return {"bytes": clock.memory_bytes("VmHWM") - before}


def plan(kind: str, settings: Settings) -> dict[str, Any]:
    """Of a very large epoch; neither argument is used."""
    return planning()


def _open(kind: str, settings: Settings) -> Reader:
    return KINDS[kind].load()(settings)


TASKS = {"rate": rate, "first_batch": first_batch, "states": states, "rows": rows, "peak": peak, "plan": plan}


def written(kind: str, corpus: Any, folder: Path) -> Path:
    """The folder of a kind's format inside ``folder``, written if it is not there."""
    reader_type = KINDS[kind].load()
    target = folder / reader_type.format
    if not target.exists():
        target.mkdir(parents=True)
        reader_type.write(corpus, target)
    return target
