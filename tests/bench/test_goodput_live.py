"""Killing ranks at random and starting again, with a program that takes no time to start."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from dcscale.bench.goodput.live import LiveError, train_live, train_with_kills
from dcscale.bench.goodput.times import KILLS

RANKS = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
meeting = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    server = socket.create_server(meeting)
    other, _ = server.accept()
else:
    while True:
        try:
            other = socket.create_connection(meeting)
            break
        except ConnectionRefusedError:
            pass
if "CODE" in os.environ:
    os._exit(int(os.environ["CODE"]))
try:
    other.recv(1)  # returns when the other rank is gone
except ConnectionResetError:
    pass
print("lost a rank", flush=True)
os._exit(76)
"""
"""Two ranks that train for ever, and end with 76 if the other is lost and with 75 after SIGTERM."""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "ranks.py"
    path.write_text(RANKS)
    return path


def test_killed_ranks_are_started_again_until_the_time_is_up(program: Path, tmp_path: Path) -> None:
    said: list[str] = []
    log = tmp_path / "log"
    starts = train_with_kills(
        program, [], minutes=0.06, mean_seconds=0.6, seed=1, log=log, grace_seconds=0.3, say=said.append
    )
    assert len(starts) == len(said) > 1
    for start, following in pairwise(starts):
        assert start.codes[start.rank] == -9
        # 75 if it was killed before the two had met, or even before the other could handle SIGTERM.
        assert start.codes[1 - start.rank] in (76, 75, -signal.SIGTERM, -9)
        assert start.began < start.killed < start.ended <= following.began
    assert starts[-1].ended - starts[0].began >= 3.6


def test_other_codes_end_it(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", "2")
    message = r"start 1 ended with the codes \[2, 2\], after which a run is not started again: read .*log"
    with pytest.raises(LiveError, match=message):
        train_with_kills(program, [], minutes=1, mean_seconds=100, log=tmp_path / "log", say=lambda _: None)


STUBBORN = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
meeting = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
if os.path.exists(sys.argv[1]):
    sys.exit(2)
if os.environ["RANK"] == "0":
    socket.create_server(meeting).accept()
    open(sys.argv[1], "w").close()
    sys.exit(76)
while True:
    try:
        socket.create_connection(meeting)
        signal.pause()
    except ConnectionRefusedError:
        pass
"""
"""Rank 0 ends with 76 when rank 1 can no longer be ended by SIGTERM; the second start ends with 2."""


def test_ranks_that_do_not_end_are_stopped(tmp_path: Path) -> None:
    program, said = tmp_path / "stubborn.py", []
    program.write_text(STUBBORN)
    arguments = {"minutes": 1, "mean_seconds": 1000, "grace_seconds": 0.1, "log": tmp_path / "log", "say": said.append}
    with pytest.raises(LiveError, match="start 2 ended with the codes"):
        train_with_kills(program, [str(tmp_path / "second")], **arguments)
    assert said[0].endswith("with 76 and -9")


def test_the_kills_of_a_run_are_written_into_its_folder(program: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_live(program, [f"run.folder={run}"], 0.02, 100, 2, 0) == run
    kills = json.loads((run / KILLS).read_text())
    assert (kills["format"], kills["ranks"], len(kills["starts"])) == (1, 2, 1)
    assert kills["starts"][0]["killed"] is None
    (run / "checkpoints").mkdir()
    with pytest.raises(LiveError, match="has a run already; give a new folder"):
        train_live(program, [f"run.folder={run}"], 0.02, 100, 2, 0)
