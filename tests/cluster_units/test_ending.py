"""How a start ends: its exit code, ending.json, and the log of each rank."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from dcscale.cluster.ending import ENDING, Ending, ExitCode
from dcscale.lease import Lease, LeaseLostError
from dcscale.parallel import Environment


class ExitError(BaseException):
    """Stands for the end of the process."""


def leave(code):
    raise ExitError(code)


@pytest.fixture
def run(tmp_path):
    """A run folder with a run in it."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def ending_of(rank, run=None, **options):
    ending = Ending(leave, seconds=1e6, **options)
    ending.know(Environment(rank, rank, 2, 2, torch.device("cpu")))
    ending.host = f"n{rank}"
    if run is not None:
        ending.hold(run, "")
    return ending


def content(run):
    return json.loads((run / ENDING).read_text())


def test_the_file_says_what_a_job_script_needs(run):
    ending = ending_of(1, run, variables={"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"})
    ending.progress = lambda: (40, run / "checkpoints" / "step-00000032")
    assert ending.decide(ExitCode.RETRY, "a hang", "rank 0 is stopped", rank=0, host="n0")
    written = content(run)
    assert written.pop("time").endswith("+00:00")
    assert written == {
        "format": 1,
        "code": 76,
        "reason": "a hang",
        "rank": 0,
        "host": "n0",
        "error": "rank 0 is stopped",
        "step": 40,
        "checkpoint": f"{run}/checkpoints/step-00000032",
        "job_id": "17",
        "restart_count": "2",
    }
    assert [path.name for path in run.iterdir() if path.is_file()] == [ENDING]
    with pytest.raises(ExitError, match="76"):
        ending.exit()


def test_the_first_rank_to_write_is_right_and_the_others_can_read_it(run):
    first, second = ending_of(1, run), ending_of(0, run)
    assert second.read() is None
    assert first.decide(ExitCode.DIVERGED, "NonFiniteError")
    assert not second.decide(ExitCode.RETRY, "rank 1 was lost")
    assert second.read()["code"] == 3 == content(run)["code"]
    assert first.decide(ExitCode.RETRY, "and the disk failed"), "a rank may correct its own"
    assert content(run)["reason"] == "and the disk failed"


def test_what_all_ranks_agree_on_is_written_by_rank_0(run):
    ending_of(1, run).decide(ExitCode.RESUME, "a stop signal was received", agreed=True)
    assert not (run / ENDING).exists()
    ending_of(0, run).decide(ExitCode.RESUME, "a stop signal was received", agreed=True)
    assert (content(run)["rank"], content(run)["host"]) == (None, None)


def test_a_new_start_removes_the_file_of_the_last_one(run):
    ending_of(0, run).decide(ExitCode.RESUME, "a stop signal was received")
    ending_of(1, run)
    assert (run / ENDING).exists(), "only rank 0, which has the lease, knows that the folder is held"
    with Lease(run, "wait") as lease:
        ending = Ending(leave, seconds=1e6)
        ending.lease = lease
        ending.hold(run, lease.token)
        assert not (run / ENDING).exists()
        ending.decide(ExitCode.DONE, "done")
        with pytest.raises(ExitError, match="0"):
            ending.exit()
        assert sorted(os.listdir(run)) == ["checkpoints", ENDING], "the lease is released"


def test_a_start_that_was_refused_writes_nothing(tmp_path):
    ending_of(0).decide(ExitCode.UNFIT, "LeaseHeldError")
    ending_of(0, tmp_path).decide(ExitCode.UNFIT, "ConfigError")  # held, but there is no run in it yet
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_lost_is_not_written_to(run):
    ending = ending_of(0, run)
    ending.abandon()
    ending.decide(ExitCode.UNFIT, "LeaseLostError")
    assert not (run / ENDING).exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_wakes_up_in_the_next_start_writes_nothing(run, rank):
    with Lease(run, "wait") as lease:
        suspended = ending_of(rank)
        suspended.hold(run, lease.token)
        suspended.open_log()
    with Lease(run, "wait"):
        suspended.before_exit = lambda: pytest.fail("writes into the run folder")
        written = [path.read_bytes() for path in run.glob("logs/*")]
        suspended.decide(ExitCode.RETRY, "lost rank")
        assert sorted(os.listdir(run)) == ["checkpoints", "lease.json", "logs"]
        with pytest.raises(ExitError, match="76"):
            suspended.exit()
        assert [path.read_bytes() for path in run.glob("logs/*")] == written


def test_a_rank_that_ends_after_rank_0_has_released_the_folder_flushes_its_files(run):
    with Lease(run, "wait") as lease:
        last = ending_of(1)
        last.hold(run, lease.token)
    flushed = []
    last.before_exit = lambda: flushed.append(True)
    last.decide(ExitCode.DONE, "done", agreed=True)
    with pytest.raises(ExitError, match="0"):
        last.exit()
    assert flushed


def test_a_disk_without_hard_links(run, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    first, second = ending_of(1, run), ending_of(0, run)
    assert first.decide(ExitCode.RETRY, "a hang")
    assert not second.decide(ExitCode.RETRY, "rank 1 was lost")
    assert content(run)["reason"] == "a hang"
    assert sorted(os.listdir(run)) == ["checkpoints", ENDING]


def test_a_file_that_cannot_be_written_does_not_change_the_code(run, capsys):
    ending = ending_of(0, run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file can be written to
    try:
        assert ending.decide(ExitCode.RETRY, "a full disk"), "the first of its node speaks"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"warning    {run / ENDING} cannot be written: " in capsys.readouterr().err
    assert (ending.read(), ending.code) == (None, 76)


@pytest.mark.parametrize("error", [OSError("No space left on device"), LeaseLostError("taken over by process 1")])
def test_what_cannot_be_flushed_does_not_change_the_code(run, capsys, error):
    def fail():
        raise error

    ending = ending_of(0, run)
    ending.before_exit = fail
    ending.decide(ExitCode.RETRY, "a full disk")
    with pytest.raises(ExitError, match="76"):
        ending.exit()
    assert capsys.readouterr().err == f"warning    while the process ended: {error}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)])
def test_a_signal_before_training(run, capsys, number, code):
    ended = threading.Event()
    ending = Ending(lambda code: (codes.append(code), ended.set()), seconds=1e6)
    codes = []
    ending.hold(run, "")
    with ending.signals:
        os.kill(os.getpid(), number)
        assert ended.wait(10)
    assert codes == [code] == [content(run)["code"]]
    assert content(run)["reason"] == f"{number.name} before training"
    assert (content(run)["step"], content(run)["checkpoint"]) == (None, None), "not known yet"
    assert capsys.readouterr().err.startswith(f"stopped    by {number.name} before training; earlier checkpoints are")


def test_a_signal_that_srun_sends_since_another_rank_has_failed_does_not_hide_its_code(run):
    ending_of(1, run).decide(ExitCode.FAILED, "OutOfMemoryError")
    with pytest.raises(ExitError, match="1"):
        ending_of(0, run).signalled("SIGTERM")
    assert content(run)["code"] == 1


def test_a_signal_while_another_thread_decides_does_not_change_the_code(run):
    ending = ending_of(0, run)
    with ending.signals:
        ending.decide(ExitCode.DIVERGED, "NonFiniteError")
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.signals.received is None
    other = threading.Thread(target=ending.decide, args=(ExitCode.RETRY, "a hang"), daemon=True)
    other.start()
    other.join(0.1)
    assert other.is_alive(), "it waits for the end of the process"
    assert content(run)["code"] == ending.code == 3


def test_whatever_hangs_the_process_ends(run):
    codes, ended = [], threading.Event()
    ending = Ending(lambda code: (codes.append(code), ended.set()), seconds=0.05)
    ending.decide(ExitCode.RETRY, "a disk that hangs")
    assert ended.wait(10)
    assert codes == [76]


LOGS = """
import os, sys
from pathlib import Path
from dcscale.cluster.logs import RankLog
log = RankLog(Path(sys.argv[1]), int(sys.argv[2]))
print("a line")
sys.stderr.write("\\rbar 50%")
print("an error", file=sys.stderr)
os.write(2, b"from C\\n")
log.write("a traceback\\n")
log.error("error: both")
log.close()
print("after")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_log_of_a_rank(tmp_path, rank):
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", LOGS, tmp_path, str(rank)], capture_output=True)
        assert done.returncode == 0, done.stderr
        if rank == 0:
            assert done.stdout == b"a line\nafter\n"
            assert done.stderr == b"\rbar 50%an error\nfrom C\nerror: both\n"
        else:
            assert (done.stdout, done.stderr) == (b"after\n", b"error: both\n")
    lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
    start = ["a line", "an error", *["from C"] * rank, "a traceback", "error: both"]
    assert [line for line in lines if not line.startswith("--- started ")] == 2 * start


GONE = """
import os, sys
from pathlib import Path
from dcscale.cluster.logs import RankLog
log = RankLog(Path(sys.argv[1]), int(sys.argv[2]))
full = os.open("/dev/full", os.O_WRONLY)
os.dup2(full, log._file)  # the disk is full
os.dup2(full, 1)          # the terminal is gone
os.dup2(full, 2)
print("a line", flush=True)
print("an error", file=sys.stderr, flush=True)
log.error("error")
os._exit(7)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_neither_a_full_disk_nor_a_lost_terminal_ends_a_run(tmp_path, rank):
    assert subprocess.run([sys.executable, "-c", GONE, tmp_path, str(rank)]).returncode == 7
