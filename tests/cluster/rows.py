"""The faults of the campaign. Each row starts a run, makes its fault, and says what it expects of the run.

A row is a function of a :class:`Case`. It must start the job (:meth:`Case.begin`), make the fault and say when
(:meth:`Case.now`, or the fault writes it down itself). Codes are those of srun, which are the highest of its tasks'.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nodes import Cluster, Start, wait_until

from dcscale.testing.runs import tiny_settings

STEPS = 60
INTERVAL = 10
"""Steps between checkpoints."""

PACE = 0.1
"""Seconds by which each step is slowed down, so that a fault can be made at a certain step."""

BATCH = """#!/bin/bash
#SBATCH --time=1 --signal=USR1@60 --requeue --open-mode=append
SRUN
code=$?; echo "srun ended with $code"
if [ $code = 75 ]; then scontrol requeue $SLURM_JOB_ID; exit 0; fi
exit $code
"""


@dataclass
class Case:
    """One try of a row, and what is expected of it."""

    cluster: Cluster
    shards: Path
    run: Path
    zero_stage: int
    repetition: int
    random: random.Random
    rank: int | None = None
    """The rank at fault, if one is: it must be named, on the terminal and in ``ending.json``."""

    words: str = ""
    """Regular expression of what the terminal or ``ending.json`` must say besides."""

    codes: Sequence[int] = (76,)
    """Exit codes that are right."""

    ending: int | None = None
    """Code in ``ending.json``; None: as the first of ``codes``. -1: that is not looked at."""

    equal: bool = True
    """Whether the run must end with the losses of an uninterrupted one, bit for bit."""

    run_settings: tuple[str, ...] = ()
    """Settings that the uninterrupted run needs too, to have the same losses."""

    limit: float = 120
    """Seconds until the job must have ended."""

    next_limit: float = 120
    """Seconds until the next start must have finished the run."""

    settings: list[str] = field(default_factory=list)
    heal: Callable[[], object] = lambda: None
    """Takes the fault away, before the next start."""

    noticed: bool = True
    """Whether there is something to notice."""

    start: Start | None = None
    at: float | None = None
    """Unix time of the fault; None: ``faults.py`` has written it down."""

    def begin(self, *settings: str, faults: Sequence[dict] = (), pace: float = PACE, **options: object) -> Start:
        """Starts the job. ``settings`` also hold for the next start."""
        self.settings += settings
        slow = [] if options.get("cold") else [{"kind": "pace", "seconds": pace}]
        self.start = self.cluster.start(self.all_settings(), faults=[*faults, *slow], **options)
        return self.start

    def all_settings(self) -> list[str]:
        return [
            *tiny_settings(self.run, self.shards),
            f"train.steps={STEPS}",
            f"parallel.zero_stage={self.zero_stage}",
            f"checkpoint.interval={INTERVAL}",
            "validation.interval=20",
            "log.compose_interval=0",
            *self.run_settings,
            *self.settings,
        ]

    def reach(self, step: int, seconds: float = 60) -> None:
        """Waits until the run has logged this step."""
        self.start.wait_for(lambda: steps_of(self.run) >= step, seconds, f"step {step}")

    def now(self) -> None:
        """The fault happens now."""
        self.at = time.time()

    def any_rank(self) -> int:
        """Rank 0 and rank 1 in turns."""
        self.rank = self.repetition % 2
        return self.rank

    def any_step(self) -> int:
        """A random step between two checkpoints, after the first one."""
        return self.random.randrange(INTERVAL + 1, STEPS - 15)

    def in_process(self, kind: str, step: int | None = None, **facts: object) -> None:
        """Starts the job with a fault of ``faults.py`` on ``rank``."""
        step = self.any_step() if step is None else step
        self.begin(faults=[{"kind": kind, "rank": self.rank, "step": step, **facts}])


def steps_of(run: Path) -> int:
    """The last step in the metrics file so far."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@dataclass(frozen=True)
class Row:
    title: str
    make: Callable[[Case], None]
    hang: bool = False
    """Whether it counts among the hangs of which 19 in 20 must be named within 60 s."""


ROWS: dict[str, Row] = {}


def row(title: str, hang: bool = False) -> Callable:
    def add(make: Callable[[Case], None]) -> Callable[[Case], None]:
        ROWS[make.__name__.replace("_", "-")] = Row(title, make, hang)
        return make

    return add


# -- signals -----------------------------------------------------------------------------------------------------------


@row("USR1 while the ranks import torch")
def usr1_early(case: Case) -> None:
    case.codes = (75,)
    case.ending = -1
    start = case.begin(cold=True, kill_on_bad_exit=case.repetition % 2 == 0)
    for rank in (0, 1):
        start.wait_for_handler(rank, signal.SIGUSR1)
    time.sleep(case.random.uniform(0, 3))
    case.now()
    start.signal("USR1")


@row("USR1 20 s after the start")
def usr1(case: Case) -> None:
    case.codes = (75,)
    begun = time.time()
    start = case.begin(pace=0.6, kill_on_bad_exit=case.repetition % 2 == 0)
    time.sleep(begun + 20 - time.time())
    case.now()
    start.signal("USR1")


@row("time limit, requeued by the job script")
def time_limit(case: Case) -> None:
    case.codes, case.limit = (0,), 240
    # SLURM looks at its limits every 30 s. The first start is so slow that it meets its limit, the second is not.
    slow = {"kind": "pace", "seconds": 1.5, "restart": 0}
    start = case.begin(faults=[slow], pace=0, batch=BATCH)
    output = start.path.with_suffix(".out")
    start.wait_for(lambda: output.exists() and "srun ended with 75" in output.read_text(), 120, "the limit")
    case.now()
    case.noticed = False


@row("HUP to all ranks")
def hup(case: Case) -> None:
    case.codes = (75,)
    start = case.begin()
    case.reach(case.any_step())
    case.now()
    start.signal("HUP")


@row("Ctrl-C twice")
def ctrl_c_twice(case: Case) -> None:
    case.codes = (130,)
    start = case.begin(pace=2)  # so that both come within a step
    case.reach(INTERVAL + 1)
    case.now()
    start.signal("INT")
    time.sleep(0.5)
    start.signal("INT")


# -- lost ranks --------------------------------------------------------------------------------------------------------


@row("a rank SIGKILLed at a random moment")
def sigkill(case: Case) -> None:
    case.codes, case.ending = (137, 76), 76
    rank = case.any_rank()
    start = case.begin(kill_on_bad_exit=case.random.random() < 0.5)
    start.pid(rank)
    time.sleep(case.random.uniform(3, 10))
    if not (case.run / "checkpoints").exists():  # it has not got as far as having a run folder
        case.ending = -1
    case.now()
    start.kill(rank)


@row("node powered off")
def poweroff(case: Case) -> None:
    case.any_rank()
    lost_node(case, case.cluster.power_off)


@row("link of a node cut")
def link_cut(case: Case) -> None:
    # Between two ranks, neither can know whose link is cut. Here they still share a disk: the one that writes
    # ending.json first speaks, and if that one is cut off, the terminal does not hear it.
    case.words = r"rank [01] \(.*(does not answer|cut)"
    lost_node(case, lambda node: case.cluster.do("linkdown", node))


def lost_node(case: Case, lose: Callable[[str], object]) -> None:
    # srun's own code is that of a node failure. The rank that is left, or both, must have ended before its limit.
    case.codes, case.ending, case.next_limit = (76, 1, 137, 143), 76, 240
    node = case.cluster.nodes[case.repetition % 2]
    case.begin()
    case.reach(case.any_step())
    case.now()
    lose(node)
    case.heal = lambda: case.cluster.power_on(node)


@row("OOM-killed data worker")
def worker(case: Case) -> None:
    rank = case.any_rank()
    case.words = "worker"
    # Larger batches, so that the worker has not prepared the whole run when it is killed.
    case.run_settings = ("train.global_batch_size=64", "train.micro_batch_size=32")
    case.begin("data.workers=1")
    case.reach(case.random.randrange(INTERVAL + 1, 2 * INTERVAL))
    case.now()
    case.cluster.kill_worker(case.cluster.nodes[rank])


# -- hangs -------------------------------------------------------------------------------------------------------------


@row("SIGSTOP", hang=True)
def sigstop(case: Case) -> None:
    case.codes, case.ending = (76, 137), 76
    rank = case.any_rank()
    start = case.begin()
    case.reach(case.any_step())
    case.now()
    start.kill(rank, "STOP")


@row("hang in Python", hang=True)
def hang(case: Case) -> None:
    case.any_rank()
    case.in_process("hang")


@row("hang in C that keeps the interpreter's lock", hang=True)
def hang_in_c(case: Case) -> None:
    case.codes, case.ending = (76, 137), 76
    case.any_rank()
    case.in_process("hang_in_c")


@row("skipped collective", hang=True)
def skipped_collective(case: Case) -> None:
    case.any_rank()
    case.in_process("skip_collective", skip=case.repetition % 3)


@row("a rank slower than the others")
def slow(case: Case) -> None:
    case.codes, case.words = (0,), "slower than the other ranks"
    rank = case.any_rank()
    # Steps during which a checkpoint is written are not compared.
    case.begin("checkpoint.interval=0", faults=[{"kind": "pace", "rank": rank, "seconds": PACE}])
    case.reach(1)
    case.now()


# -- numerics ----------------------------------------------------------------------------------------------------------


@row("NaN, `on_nonfinite=stop`")
def nan(case: Case) -> None:
    case.codes, case.words = (3,), "sequence"
    case.any_rank()
    case.in_process("scale_loss", factor="nan")


@row("NaN, `on_nonfinite=skip`")
def nan_skip(case: Case) -> None:
    case.codes, case.words, case.equal = (0,), "skip", False
    case.any_rank()
    case.settings = ["train.on_nonfinite=skip"]
    case.in_process("scale_loss", factor="nan")


@row("loss and gradient x 1000, `on_spike=warn`, `skip`, `rollback` in turns")
def spike(case: Case) -> None:
    policy = ("warn", "skip", "rollback")[case.repetition % 3]
    case.codes, case.words, case.equal = (0,), "spike|far above", False
    case.settings = [f"train.on_spike={policy}"]
    case.begin(faults=[{"kind": "scale_loss", "step": 45, "factor": 1000}])


# -- disks -------------------------------------------------------------------------------------------------------------


@row("disk full while logging")
def disk_log(case: Case) -> None:
    case.run = case.cluster.disk / case.run.name
    case.words = "No space left"
    case.begin("checkpoint.interval=0", "validation.interval=0", pace=0.2)
    case.reach(12)
    filler = fill(case)
    if case.repetition % 2 == 0:  # there is space again before the run ends
        case.codes = (0,)
        wait_until(lambda: re.search(case.words, case.start.text), 30, "a warning about the full disk")
        filler.unlink()
    else:
        case.heal = filler.unlink
        case.ending = -1  # there may be no space for it


@row("disk full while saving")
def disk_save(case: Case) -> None:
    case.run = case.cluster.disk / case.run.name
    case.words = "No space left|free"
    case.ending = -1  # there may be no space for it
    case.begin()
    case.reach(INTERVAL + 2)
    case.heal = fill(case).unlink


def fill(case: Case) -> Path:
    """Fills the small disk; returns the file that does."""
    path = case.cluster.disk / "filler"
    case.now()
    with path.open("wb") as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    os.write(file.fileno(), bytes(size))
            except OSError:  # full
                continue
    return path


# -- starts ------------------------------------------------------------------------------------------------------------


@row("second start of the same run")
def second_start(case: Case) -> None:
    case.codes, case.ending = (0,), None
    first = case.begin(pace=0.3)
    case.reach(3)
    case.now()
    node = case.cluster.nodes[case.repetition % 2]
    second = case.cluster.start([*case.all_settings(), "train.seed=1"], srun=[f"--nodelist={node}", "--ntasks=1"])
    code = second.wait(60)
    first.lines += second.lines
    case.words = f"in use by process \\d+ on {case.cluster.nodes[0]} \\(job {first.job_id()}"
    if code != 76:
        raise AssertionError(f"the second start ended with {code}:\n{second.text}")


@row("another config on a rank")
def config(case: Case) -> None:
    case.codes, case.ending = (2,), -1
    case.words = r"optimizer\.learning_rate"
    case.rank = 1
    case.now()
    case.begin(rank_settings={1: ["optimizer.learning_rate=0.02"]})


@row("other code on a node")
def code(case: Case) -> None:
    case.codes, case.ending = (2,), -1
    case.words = "source"
    case.rank = 1
    with case.cluster.other_code(case.cluster.nodes[1], "dcscale/ops/loss.py"):
        case.now()
        case.begin().wait(60)


@row("a rank that never arrives")
def missing_rank(case: Case) -> None:
    case.codes, case.ending, case.limit = (76, 137, 143), -1, 150
    case.rank, case.words = 1, "waiting    for rank 1"
    case.now()
    case.begin("parallel.start_timeout_minutes=1.3", rank_settings={1: None})


@row("port taken")
def port(case: Case) -> None:
    case.codes, case.ending, case.words = (76,), -1, "29555"
    case.now()
    with case.cluster.listening(case.cluster.nodes[0], 29555):
        environment = {"MASTER_ADDR": case.cluster.nodes[0], "MASTER_PORT": "29555"}
        case.begin(environment=environment).wait(60)


def make_case(cluster: Cluster, shards: Path, folder: Path, name: str, zero_stage: int, repetition: int) -> Case:
    """A try of a row. The same arguments make the same random choices."""
    run = folder / f"{name}-zero{zero_stage}-{repetition}-{time.monotonic_ns()}"
    return Case(cluster, shards, run, zero_stage, repetition, random.Random(f"{name} {zero_stage} {repetition}"))
