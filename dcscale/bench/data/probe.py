"""Measurements that run in a process of their own (probes), so that libraries cannot affect each other.

    python -m dcscale.bench.data.probe '{"task": "rate", ...}'

The tasks are in :data:`TASKS`. The last line that a probe prints is its result as JSON. :func:`run` runs one probe,
:func:`start` and :func:`finish` several at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dcscale.bench import meter
from dcscale.bench.data import KINDS
from dcscale.bench.data.corpus import EOS_ID, VOCAB_SIZE
from dcscale.bench.data.order import planning
from dcscale.bench.data.reader import Reader, Settings


def rate(kind: str, settings: Settings, histogram: str, epochs: int) -> dict[str, Any]:
    """Read one epoch and compare its tokens with the corpus, then time more epochs.

    The first epoch warms up: it starts worker processes and brings files into the page cache.

    Args:
        kind: of the reader.
        settings: of the reader.
        histogram: .npy file with :meth:`Corpus.histogram`.
        epochs: number of epochs to time.

    Returns:
        ``first_batch_seconds``; ``wrong``, how the tokens differ, or None; and ``epochs``, if nothing is wrong.
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
    before, tokens = meter.read(), 0
    for batch in reader.epoch():
        tokens += batch.numel()
    spent = meter.read().since(before)
    return {"tokens": tokens, "wall_seconds": spent.wall, "cpu_seconds": spent.cpu}


def difference(expected: np.ndarray, found: np.ndarray, length: int, rows: int) -> str | None:
    """How an epoch's tokens differ from those of the corpus; None if they do not.

    Args:
        expected: histogram of the corpus.
        found: histogram of the epoch.
        length: tokens of a row.
        rows: number of rows in the epoch.
    """
    total = int(expected.sum())
    if rows * length != total:
        return f"{rows * length:,} tokens in an epoch instead of {total:,}"
    # In a reader that packs, the last token of the last row may be used as a target only; padding with EOS replaces it.
    surplus = found - expected
    if np.abs(surplus).sum() == 0 or (surplus[EOS_ID] == 1 and np.abs(surplus).sum() == 2):
        return None
    return f"{int(np.maximum(surplus, 0).sum()):,} of {total:,} tokens differ from the data"


def first_batch(kind: str, settings: Settings, state: Any = None, batches: int = 1) -> dict[str, Any]:
    """Seconds from opening a reader, or restoring a state, to its first batches, without importing its library."""
    reader_type = KINDS[kind].load()  # imports the library before the clock starts
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
    """The states after each of these numbers of batches."""
    reader, found = _open(kind, settings), []
    for number, _ in enumerate(reader.epoch(), start=1):
        if number in batches:
            found.append(reader.state())
    reader.close()
    return found


def rows(
    kind: str, settings: Settings, steps: int | None = None, state: Any = None, restore: bool = False
) -> dict[str, Any]:
    """The hashes of each batch's rows on this rank, for ``steps`` batches or the epoch, and the state after them."""
    reader = _open(kind, settings)
    if restore:
        reader.restore(state)
    found = [[row_hash(row) for row in batch.numpy()] for batch in islice(reader.epoch(), steps)]
    result = {"rows": found, "state": None if steps is None else reader.state()}
    reader.close()
    return result


def row_hash(row_L: np.ndarray) -> str:
    """A hash that identifies a row."""
    return hashlib.blake2b(row_L.astype(np.int64).tobytes(), digest_size=8).hexdigest()


def peak(kind: str, settings: Settings) -> dict[str, Any]:
    """Peak memory of an epoch in bytes, above that of the process after all imports."""
    reader_type = KINDS[kind].load()
    meter.reset_peak()
    before = meter.memory_bytes("VmRSS")
    reader = reader_type(settings)
    for _ in reader.epoch():
        pass
    reader.close()
    return {"bytes": meter.memory_bytes("VmHWM") - before}


def plan(kind: str, settings: Settings, shards: int) -> dict[str, Any]:
    """See :func:`planning`; ``kind`` and ``settings``, the arguments of every task, are not used."""
    return planning(shards)


def _open(kind: str, settings: Settings) -> Reader:
    return KINDS[kind].load()(settings)


TASKS = {"rate": rate, "first_batch": first_batch, "states": states, "rows": rows, "peak": peak, "plan": plan}


def written(kind: str, corpus: Any, folder: Path) -> Path:
    """Write the corpus in a kind's format inside ``folder``, unless it exists; returns the format's folder."""
    reader_type = KINDS[kind].load()
    target = folder / reader_type.format
    if not target.exists():
        target.mkdir(parents=True)
        reader_type.write(corpus, target)
    return target


_MARK = "probe result: "


class ProbeError(Exception):
    """A probe failed; the message is the last line of its error."""


class Probe(NamedTuple):
    """A probe that was started."""

    process: subprocess.Popen
    output: IO[str]


def run(task: str, kind: str, settings: Settings, *, timeout: float = 600, **more: Any) -> Any:
    """Run one probe and return its result; arguments as :func:`start` and :func:`finish`."""
    return finish(start(task, kind, settings, **more), timeout)


def start(
    task: str,
    kind: str,
    settings: Settings,
    *,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    **more: Any,
) -> Probe:
    """Start a probe.

    Args:
        task: of :data:`TASKS`.
        kind: of the reader.
        settings: of the reader.
        port: for the rendezvous of several ranks, which must have the same.
        environment: additional environment variables.
        **more: further arguments of the task.
    """
    rank, world_size = str(settings.rank), str(settings.world_size)
    # What torch.distributed, mosaicml-streaming and litdata read to find their rank.
    ranks = {"RANK": rank, "GLOBAL_RANK": rank, "LOCAL_RANK": rank}
    ranks |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "NNODES": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    message = json.dumps({"task": task, "kind": kind, "settings": asdict(settings), **more})
    # A file, because a pipe could fill up and block this rank while another one is awaited.
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    command = [sys.executable, "-m", __name__, message]
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | ranks | (environment or {}),
        start_new_session=True,
    )
    return Probe(process, output)


def finish(probe: Probe, timeout: float) -> Any:
    """Wait for a probe and return its result.

    If the result is an object, its key ``logged`` has the last error that was printed but not raised, or None.

    Raises:
        ProbeError: it ended without a result, or did not end within ``timeout`` seconds.
    """
    try:
        probe.process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"timed out after {timeout:.0f} s") from None
    finally:
        stop(probe)
        probe.output.seek(0)
        lines = probe.output.read().splitlines()
        probe.output.close()
    # The last exception in the output: the cause of a failure, or an error that was only logged.
    error = next((line.strip() for line in reversed(lines) if _is_error(line.strip())), None)
    for line in reversed(lines):
        if line.startswith(_MARK):
            result = json.loads(line.removeprefix(_MARK))
            return result | {"logged": error} if isinstance(result, dict) else result
    raise ProbeError(error or f"exit code {probe.process.returncode}")


def stop(probe: Probe) -> None:
    """Kill a probe and its remaining workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(probe.process.pid, signal.SIGKILL)
    probe.process.wait()


def _is_error(line: str) -> bool:
    """Whether a line looks like the last line of a traceback: the name of an exception, then its message."""
    kind = line.partition(":")[0].rpartition(".")[2]
    return kind.isidentifier() and kind[0].isupper() and kind.endswith(("Error", "Exception", "Exit", "Timeout"))


def main() -> None:
    message = json.loads(sys.argv[1])
    settings = Settings(**message.pop("settings"))
    result = TASKS[message.pop("task")](message.pop("kind"), settings, **message)
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
    os._exit(0)  # do not wait for threads and workers that a library left running


if __name__ == "__main__":
    main()
