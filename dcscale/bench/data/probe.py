"""What a probe does: read and time epochs, start anew, or list the rows that one rank gets.

One measurement in a process of its own, so that no library meets what another has left behind.

    python -m dcscale.bench.data.probe '{"task": "rate", ...}'

A probe ends its output with a line of JSON; :func:`run` starts one, and :func:`start` and :func:`finish` several.
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
from dcscale.bench.data.corpus import EOS_ID, VOCAB_SIZE
from dcscale.bench.data.order import planning
from dcscale.bench.data.reader import KINDS, Reader, Settings


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
    before, tokens = meter.read(), 0
    for batch in reader.epoch():
        tokens += batch.numel()
    spent = meter.read().since(before)
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
    meter.reset_peak()
    before = meter.memory_bytes("VmRSS")
    reader = reader_type(settings)
    for _ in reader.epoch():
        pass
    reader.close()
    return {"bytes": meter.memory_bytes("VmHWM") - before}


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


_MARK = "probe result: "


class ProbeError(Exception):
    """A probe that ended with an error, whose last line this is."""


class Probe(NamedTuple):
    """One that was started."""

    process: subprocess.Popen
    output: IO[str]


def run(task: str, kind: str, settings: Settings, *, timeout: float = 600, **more: Any) -> Any:
    """The result of one probe."""
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
    """Start a probe, with more in its environment; several ranks that are to find each other need the same ``port``."""
    rank, world_size = str(settings.rank), str(settings.world_size)
    ranks = {"RANK": rank, "GLOBAL_RANK": rank, "LOCAL_RANK": rank}
    ranks |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "NNODES": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    message = json.dumps({"task": task, "kind": kind, "settings": asdict(settings), **more})
    # Not a pipe: it would fill up while another rank is waited for.
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
    """The result of a probe that was started; an object also has the last error that was ``logged`` and not raised.

    Raises:
        ProbeError: it ended without one, or did not end in time.
    """
    try:
        probe.process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no end after {timeout:.0f} s") from None
    finally:
        stop(probe)
        probe.output.seek(0)
        lines = probe.output.read().splitlines()
        probe.output.close()
    error = next((line.strip() for line in reversed(lines) if _is_error(line.strip())), None)
    for line in reversed(lines):
        if line.startswith(_MARK):
            result = json.loads(line.removeprefix(_MARK))
            return result | {"logged": error} if isinstance(result, dict) else result
    raise ProbeError(error or f"exit code {probe.process.returncode}")


def stop(probe: Probe) -> None:
    """End a probe and the workers it has left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(probe.process.pid, signal.SIGKILL)
    probe.process.wait()


def _is_error(line: str) -> bool:
    """Whether a line is the last of a traceback, with the kind of error first."""
    kind = line.partition(":")[0].rpartition(".")[2]
    return kind.isidentifier() and kind[0].isupper() and kind.endswith(("Error", "Exception", "Exit", "Timeout"))


def main() -> None:
    message = json.loads(sys.argv[1])
    settings = Settings(**message.pop("settings"))
    result = TASKS[message.pop("task")](message.pop("kind"), settings, **message)
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
    os._exit(0)  # whatever threads and workers a library has left


if __name__ == "__main__":
    main()
