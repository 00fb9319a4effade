"""Writes run folders as they are at one moment, ``NOW``, for tests of what reads them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dcscale.cluster.status import RunStatus, page, read_status, table
from dcscale.lease import LEASE, this_process

NOW = 1_800_000_000.0


def iso(seconds_ago: float) -> str:
    """A time before ``NOW`` as files have it."""
    return datetime.fromtimestamp(NOW - seconds_ago, timezone.utc).isoformat(timespec="milliseconds")


class RunFolder:
    """A run folder; each method writes a part of it, and returns the folder."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, content: str | bytes, seconds_ago: float = 0.0) -> RunFolder:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.utime(path, (NOW - seconds_ago, NOW - seconds_ago))
        return self

    def config(self, steps: int = 100, **settings: Any) -> RunFolder:
        """``settings``: values by path, with ``__`` for the dot."""
        lines = [f"train:\n  steps: {steps}\n  stop_after: null\nmodel:\n  windows: [8, null]\n"]
        lines += [f"{name.partition('__')[0]}:\n  {name.partition('__')[2]}: {settings[name]}\n" for name in settings]
        return self.file("config.yaml", "".join(lines))

    def records(self, *steps: int, seconds_ago: float = 0.0, **more: Any) -> RunFolder:
        records = [{"step": step, "tokens": 100 * step, "loss": 5.0 - step / 100, **more} for step in steps]
        old = self.path / "metrics.jsonl"
        text = (old.read_text() if old.exists() else "") + "".join(json.dumps(record) + "\n" for record in records)
        return self.file("metrics.jsonl", text, seconds_ago)

    def event(self, kind: str, seconds_ago: float, rank: int = 0, **facts: Any) -> RunFolder:
        path = self.path / "events" / f"rank-{rank}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"event": kind, "time": iso(seconds_ago), **facts}) + "\n")
        return self

    def start(self, seconds_ago: float, step: int = 0, world_size: int = 2) -> RunFolder:
        return self.event("start", seconds_ago, step=step, checkpoint=None, host="n1", pid=7, world_size=world_size)

    def steps(self, *steps: int, seconds_ago: float, each: float = 1.0) -> RunFolder:
        """Records and events of steps, the last one ``seconds_ago``, ``each`` seconds a step."""
        for step in steps:
            self.event("steps", seconds_ago + each * (steps[-1] - step), step=step, steps=1, seconds=each)
        return self.records(*steps, seconds_ago=seconds_ago)

    def ending(self, code: Any, seconds_ago: float, reason: str = "why", **more: Any) -> RunFolder:
        content = {"format": 1, "code": code, "reason": reason, "rank": None, "host": None, "error": None}
        return self.file("ending.json", json.dumps({**content, "step": None, "time": iso(seconds_ago), **more}))

    def lease(self, seconds_ago: float, since: float, **changes: Any) -> RunFolder:
        """Of this process, but for ``changes``; renewed ``seconds_ago``, taken ``since`` seconds ago."""
        taken = datetime.fromtimestamp(NOW - since, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        lease = {**asdict(this_process("srun")), "since": taken, "token": "1", "renewals": 3, **changes}
        return self.file(LEASE, json.dumps(lease), seconds_ago)

    def checkpoint(self, step: int, seconds_ago: float = 50.0, complete: bool = True) -> RunFolder:
        name = f"checkpoints/step-{step:08d}"
        return self.file(f"{name}/{'COMPLETE' if complete else 'state.json'}", "{}", seconds_ago)

    def restarts(self, action: str, seconds_ago: float, **more: Any) -> RunFolder:
        last = {"time": iso(seconds_ago), "action": action, "code": 76, "reason": "hang", "wait_seconds": 60}
        content = {"format": 1, "job_id": "17", "step": 5, "restarts": 3, "without_progress": 2, "faults": ["n2"]}
        content = {**content, "excluded": {"n2": "the cause of 2 failures"}, "last": last, **more}
        return self.file("restarts.json", json.dumps(content))


def status_of(run: RunFolder) -> RunStatus:
    """The status, which must also be printable in all forms."""
    status = read_status(run.path, NOW)
    json.loads(json.dumps(status.as_json(), allow_nan=False))
    assert page(status).isprintable() or "\n" in page(status)
    assert table([status, status]).encode()
    return status


def training(run: RunFolder, seconds_ago: float = 1.0) -> RunFolder:
    return run.config().start(200).steps(*range(1, 41), seconds_ago=seconds_ago).checkpoint(30)
