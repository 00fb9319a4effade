"""``touch RUN/stacks``: every rank writes its stacks, also while a step hangs, and the run goes on."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dcscale.cluster.ending import Ending
from dcscale.cluster.limits import Limits
from dcscale.cluster.watchdog import Watchdog
from dcscale.parallel.collectives import set_timeouts
from dcscale.testing.distributed import run_distributed

LIMITS = Limits(start=60, step=60, pause=60, lost=30, beat=0.1, answer=0.5)
SECONDS = 60


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def never():
    raise AssertionError("a single process needs no store")


@pytest.fixture
def watchdog(tmp_path):
    """The watchdog of a single process, which a user asks for stacks; and the folders that it has reported."""
    codes, folders = [], []
    ending = Ending(codes.append, seconds=60)
    ending.hold(tmp_path, "")
    watchdog = Watchdog(0, ["n0"], LIMITS, ending, never, lambda seconds: None)
    watchdog.on_stacks = folders.append
    yield watchdog, folders
    watchdog.close()
    assert codes == []


def test_a_single_process_writes_its_stacks_and_goes_on(watchdog, tmp_path, capsys):
    watchdog, folders = watchdog
    with watchdog.phase("step"):
        (tmp_path / "stacks").touch()
        report = wait_for(lambda: next((tmp_path / "profiles").glob("stacks-*/rank-0.txt"), None))
        text = wait_for(report.read_text)
    assert text.startswith("rank 0 (")
    assert ": step 1, phase step, for " in text
    assert "thread MainThread:" in text
    assert "in test_a_single_process_writes_its_stacks_and_goes_on" in text
    assert "thread dcscale-watchdog:" in text
    assert not (tmp_path / "stacks").exists()
    (folder,) = wait_for(lambda: folders)
    assert re.fullmatch(r"profiles/stacks-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", folder)
    assert f"stacks     of all ranks: {tmp_path}/{folder}" in capsys.readouterr().err


def test_a_request_that_is_none_is_refused_once(watchdog, tmp_path, capsys):
    (tmp_path / "stacks").write_text("of rank 0")
    wait_for(lambda: not (tmp_path / "stacks").exists())
    reason = f"warning    {tmp_path}/stacks: 'of' is not a setting: leave the file empty\n"
    shown = wait_for(lambda: capsys.readouterr().err)
    (tmp_path / "stacks").touch()
    wait_for(lambda: list((tmp_path / "profiles").glob("stacks-*/rank-0.txt")))
    assert shown == reason


def test_a_folder_that_cannot_be_written_is_reported(watchdog, tmp_path, capsys):
    (tmp_path / "profiles").write_text("in the way")
    (tmp_path / "stacks").touch()
    printed = []
    wait_for(lambda: printed.append(capsys.readouterr().err) or "could not be written" in "".join(printed))
    assert re.search(r"warning    \S+/rank-0.txt could not be written: Not a directory", "".join(printed))


def _hang(run):
    """A step in which rank 1 never comes; rank 0 asks for stacks as a user would. Returns those of all ranks."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"  # as start_distributed does
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ending = Ending(seconds=10)
    ending.rank = rank
    ending.hold(run, "")

    def open_store():
        return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)

    watchdog = Watchdog(rank, [ending.host] * 2, LIMITS, ending, open_store, set_timeouts)
    dist.barrier()
    paths = [run / "profiles" / "*" / f"rank-{number}.txt" for number in range(2)]

    def reports():
        found = [next(run.glob(str(path.relative_to(run))), None) for path in paths]
        return found if all(path and path.stat().st_size for path in found) else None

    with watchdog.phase("step"):
        if rank == 0:
            (run / "stacks").touch()
            dist.all_reduce(torch.ones(4))
        else:
            wait_for(reports)
            dist.all_reduce(torch.ones(4))
    texts = [path.read_text() for path in reports()]
    # A second request is a folder of its own, on all ranks.
    if rank == 0:
        first = next(run.glob("profiles/*"))
        wait_for(lambda: time.strftime("%H-%M-%SZ", time.gmtime()) not in first.name)
        (run / "stacks").touch()
    wait_for(lambda: len(list(run.glob("profiles/*/rank-*.txt"))) == 4)
    watchdog.step_done(1, 0.1)
    dist.barrier()
    watchdog.close()
    dist.destroy_process_group()
    return texts


@pytest.mark.distributed
def test_all_ranks_write_their_stacks_while_a_step_hangs_and_then_go_on(tmp_path):
    (rank_0, rank_1), _ = run_distributed(_hang, 2, tmp_path)
    assert rank_0.startswith("rank 0 (")
    assert "waits in: all_reduce" in rank_0.splitlines()[1]
    assert "dist.all_reduce(torch.ones(4))" in rank_0
    assert rank_1.startswith("rank 1 (")
    assert "waits in: no collective" in rank_1
    assert "wait_for(reports)" in rank_1
