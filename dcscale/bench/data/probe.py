"""One measurement in a process of its own, so that no library meets what another has left behind.

    python -m dcscale.bench.data.probe '{"task": "rate", ...}'

A probe ends its output with a line of JSON; :func:`run` starts one, and :func:`start` and :func:`finish` several.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any, NamedTuple

from dcscale.bench.data.reader import Settings

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
    from dcscale.bench.data import tasks

    message = json.loads(sys.argv[1])
    settings = Settings(**message.pop("settings"))
    result = tasks.TASKS[message.pop("task")](message.pop("kind"), settings, **message)
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
    os._exit(0)  # whatever threads and workers a library has left


if __name__ == "__main__":
    main()
