"""A rank that hangs is named, and all ranks end with exit code 76: real processes, gloo, and short limits.

All runs go on at once, since they mostly wait.
"""

import ctypes
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcscale.cluster.ending import Ending, ExitCode
from dcscale.cluster.flight_recorder import recorded_collectives
from dcscale.cluster.limits import MARGIN_SECONDS, Limits
from dcscale.cluster.watchdog import Watchdog
from dcscale.observe import Console
from dcscale.parallel import discover, start_distributed
from dcscale.parallel.collectives import set_timeouts
from dcscale.testing.distributed import run_distributed, start_ranks
from dcscale.testing.runs import tiny_config
from dcscale.train import build_trainer
from dcscale.train.hooks import Hook

pytestmark = pytest.mark.distributed

LIMITS = Limits(start=60, step=1.5, pause=60, lost=1.5, beat=0.2, answer=0.5)
STEPS, FAULT_STEP = 30, 3
LONG = 60


class Rank:
    """One process of a run that does nothing but collectives, in two groups.

    Args:
        run: the run folder.
        fault: called in the middle of each step with this object and the step; it is in the place of a collective if
            it returns true.
    """

    def __init__(self, run: Path, fault: Any):
        os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"  # as start_distributed does
        self.rank, self.world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, self.world_size, self.rank == 0, timeout=timedelta(seconds=30))
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        self.control = dist.new_group(backend="gloo")
        self.run, self.fault = run, fault
        self.ending = Ending(seconds=10)
        self.ending.rank = self.rank
        self.ending.hold(run, "")
        self.ending.open_log()

        def open_store():
            return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)

        self.watchdog = Watchdog(
            self.rank, [self.ending.host] * self.world_size, LIMITS, self.ending, open_store, set_timeouts
        )
        heard = self.watchdog._heartbeats.statuses  # on a busy machine, the first heartbeats come late
        wait_for(lambda: all(heard[rank].pid for rank in (range(self.world_size) if self.rank == 0 else [0])))
        dist.barrier()

    def train(self):
        for step in range(1, STEPS + 1):
            with self.watchdog.phase("data"):
                dist.all_reduce(torch.ones(4), group=self.control)
            with self.watchdog.phase("step"):
                dist.all_reduce(torch.ones(4))
                if not self.fault(self, step):
                    dist.all_reduce(torch.ones(4))
                dist.all_reduce(torch.ones(4))
            self.watchdog.step_done(step, 0.01)

    def note(self):
        """Tells the test that this rank is where it wants it."""
        (self.run / f"reached-{self.rank}").touch()


def run_rank(run, fault):
    rank = Rank(run, fault)
    try:
        rank.train()
    except RuntimeError as error:  # as Failures does
        lost = rank.watchdog.lost_ranks(2.0)
        if rank.ending.decide(ExitCode.RETRY, "lost", f"lost {lost}: {error}", min(lost, default=-1)):
            rank.ending.error(f"error: lost {lost}")
        rank.ending.exit()
    rank.watchdog.close()
    rank.note()
    os._exit(0)


# -- faults ------------------------------------------------------------------------------------------------------------


def sleep_in_python(rank, step):
    if rank.rank == 1 and step == FAULT_STEP:
        time.sleep(LONG)


def leave_out_a_collective(rank, step):
    return rank.rank == 1 and step == FAULT_STEP


def hold_the_lock(rank, step, who=1):
    if rank.rank == who and step == FAULT_STEP:
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)  # unlike sleep, it is not ended by a signal


def hold_the_lock_of_rank_0(rank, step):
    hold_the_lock(rank, step, who=0)


def reach(rank, step):
    """The fault comes from outside, after this step."""
    if step == FAULT_STEP:
        rank.note()
    if step >= FAULT_STEP:
        time.sleep(0.1)


@dataclass
class Result:
    """How a run ended."""

    codes: list[int | None]
    run: Path

    @property
    def ending(self) -> dict[str, Any]:
        return json.loads((self.run / "ending.json").read_text())

    def reports(self) -> dict[str, str]:
        """Content of the files below ``hangs``, by name."""
        return {path.name: path.read_text() for path in self.run.glob("hangs/*/*")}

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank-{rank}.log").read_text()


RUNS = {
    # name: number of ranks, fault, signals from outside
    "python": (3, sleep_in_python, []),
    "collective": (2, leave_out_a_collective, []),
    "lock": (2, hold_the_lock, []),
    "lock_0": (2, hold_the_lock_of_rank_0, []),
    "stopped": (2, reach, [(1, signal.SIGSTOP)]),
    "stopped_0": (3, reach, [(0, signal.SIGSTOP)]),
    "killed": (2, reach, [(1, signal.SIGKILL)]),
    "killed_0": (2, reach, [(0, signal.SIGKILL)]),
    "suspended": (2, reach, [(0, signal.SIGSTOP), (1, signal.SIGSTOP)]),
}
STAY = [("lock", 1), ("lock_0", 0), ("stopped", 1), ("stopped_0", 0)]
"""Ranks that only a launcher, or the batch system, can end."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hangs")
    runs, queues = {}, []
    for name, (ranks, fault, _) in RUNS.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        runs[name], answers = start_ranks(run_rank, ranks, folder / name, fault)
        queues.append(answers)  # the processes need them until they have started
    try:
        for name, (ranks, _, signals) in RUNS.items():
            for rank in range(ranks if signals else 0):
                wait_for((folder / name / f"reached-{rank}").exists)
            for rank, number in signals:
                os.kill(runs[name][rank].pid, number)
        time.sleep(2 * LIMITS.lost)
        for process in runs["suspended"]:
            os.kill(process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 20
        for name, processes in runs.items():
            for rank, process in enumerate(processes):
                if (name, rank) not in STAY:
                    process.join(max(0.1, deadline - time.monotonic()))
        yield {name: Result([p.exitcode for p in processes], folder / name) for name, processes in runs.items()}
    finally:
        for processes in runs.values():
            for process in processes:
                process.kill()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hang_in_python_is_named_with_its_place(results):
    result = results["python"]
    assert result.codes == [76, 76, 76]
    ending = result.ending
    assert (ending["code"], ending["reason"], ending["rank"]) == (76, "hang", 1)
    assert re.fullmatch(
        r"rank 1 \(\S+, pid \d+\) hangs outside of collectives: step 3, phase step, for \d s, at test_hangs.py:\d+ in "
        r"sleep_in_python; ranks 0, 2 wait for it in all_reduce 9 of group 0 \(4\)",
        ending["error"],
    )


def test_every_rank_writes_its_stacks_and_collectives(results):
    reports = results["python"].reports()
    assert sorted(reports) == ["rank-0.txt", "rank-1.txt", "rank-2.txt"]
    assert "time.sleep(LONG)" in reports["rank-1.txt"]
    assert "waits in: no collective" in reports["rank-1.txt"]
    assert "waits in: all_reduce 9 of group 0 (4)" in reports["rank-2.txt"]
    assert "  in flight all_reduce 9 of group 0 (4)\n  done      all_reduce 8 of group 0 (4)\n" in reports["rank-0.txt"]


def test_the_block_is_printed_once_and_the_other_logs_have_a_line(results):
    result = results["python"]
    first, *ranks, last = result.log(0).splitlines()[1:]
    assert first == f"error: {result.ending['error']}"
    assert [line.partition(":")[0] for line in ranks] == ["  ranks 0, 2", "  rank 1", "  limit of phase step"]
    (folder,) = (result.run / "hangs").iterdir()
    assert last == f"  stacks: {folder}; exit code 76 (try again: the same command resumes)"
    for rank in (1, 2):
        assert result.log(rank).splitlines()[1:] == [f"rank {rank} ends because of a hang: {result.ending['error']}"]


def test_the_rank_that_left_out_a_collective_is_named(results):
    result = results["collective"]
    assert result.codes == [76, 76]
    assert result.ending["rank"] == 1
    assert re.search("rank 1 .* left out all_reduce . of group 0 .* of a step before", result.ending["error"])


@pytest.mark.parametrize(("name", "rank"), [("lock", 1), ("lock_0", 0)])
def test_a_rank_that_holds_the_lock_of_python_is_named_and_its_stacks_are_in_its_log(results, name, rank):
    result = results[name]
    assert result.codes[1 - rank] == 76
    assert result.ending["rank"] == rank
    assert "a call in C may hold the lock of Python" in result.ending["error"]
    assert "in hold_the_lock\n" in result.log(rank)
    assert "in hold_the_lock\n" not in result.log(1 - rank)


def test_a_stopped_rank_is_named(results):
    result = results["stopped"]
    assert result.codes[0] == 76
    assert (result.ending["code"], result.ending["rank"]) == (76, 1)
    assert re.search(
        "rank 1 .* does not answer: no heartbeat for . s, .*; its process is stopped, as by SIGSTOP or Ctrl-Z",
        result.ending["error"],
    )
    assert list(result.reports()) == ["rank-0.txt"]


def test_if_rank_0_is_stopped_with_its_store_the_others_end_by_themselves_and_one_speaks(results):
    result = results["stopped_0"]
    assert result.codes[1:] == [76, 76]
    assert (result.ending["code"], result.ending["rank"]) == (76, 0)
    assert "its process is stopped, as by SIGSTOP or Ctrl-Z; so rank" in result.ending["error"]
    assert set(result.reports()) == {"rank-1.txt", "rank-2.txt"}
    assert sorted("error: rank 0 " in result.log(rank) for rank in (1, 2)) == [False, True]


@pytest.mark.parametrize(("name", "rank"), [("killed", 1), ("killed_0", 0)])
def test_lost_ranks_names_a_killed_rank(results, name, rank):
    result = results[name]
    assert (result.codes[rank], result.codes[1 - rank]) == (-signal.SIGKILL, 76)
    assert (result.ending["reason"], result.ending["rank"]) == ("lost", rank)
    assert result.reports() == {}


def test_a_run_that_was_suspended_as_a_whole_continues(results):
    result = results["suspended"]
    assert result.codes == [0, 0]
    assert result.reports() == {}
    assert not (result.run / "ending.json").exists()


def _train_watched(config):
    """What the watchdog of a real run knows."""
    environment = discover()
    start_distributed(environment, config.parallel.start_timeout_minutes)
    ending = Ending()
    ending.know(environment)
    trainer = build_trainer(config, environment, Console(enabled=False), ending)
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = []

    class Look(Hook):
        name = "look"

        def after_step(self, trainer):
            timeouts.append({g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups})

    trainer.hooks = [Look(), *trainer.hooks]
    trainer.fit(ending.signals)
    recorded = {collective.op for collective in recorded_collectives()}
    answer = trainer.watchdog._answer([])
    lost = ending.lost_ranks(3.0)
    trainer.close()
    return len(groups), timeouts, recorded, answer.status.step, answer.deviation, lost


def test_a_run_is_watched_and_all_its_process_groups_have_the_timeout_of_the_phase(shards, tmp_path):
    config = tiny_config(tmp_path / "run", shards, "train.steps=3", "validation.interval=0", "parallel.zero_stage=2")
    for groups, timeouts, recorded, step, deviation, lost in run_distributed(_train_watched, 2, config):
        assert groups >= 3  # the world, DeepSpeed's clone of it, and that of the CPU
        assert timeouts == [{60 * config.parallel.pause_timeout_minutes + MARGIN_SECONDS}] * 3
        assert {"all_reduce", "all_gather"} <= recorded
        assert step == 3
        assert deviation is None
        assert lost == {}
