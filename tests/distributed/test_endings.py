"""launch/train.py on two ranks, ended from outside and by errors: exit codes, ending.json, what each rank prints."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import pytest

from dcscale.cluster.ending import ENDING
from dcscale.observe import read_metrics
from dcscale.observe.events import event_path, read_events
from dcscale.testing.distributed import start_ranks
from dcscale.testing.runs import tiny_settings
from dcscale.train.hooks import Hook

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"

pytestmark = pytest.mark.distributed


class Fail(Hook):
    """Raises an error on rank 1 after step 3."""

    name = "fail"

    def after_step(self, trainer):
        if trainer.state.step == 3 and trainer.environment.rank == 1:
            raise TypeError("a bug")


def _launch(terminals, settings, hook=None):
    terminal = os.open(Path(terminals) / f"rank-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hook is not None:
        from dcscale.train import trainer

        fit = trainer.Trainer.fit
        trainer.Trainer.fit = lambda self, signals: (self.hooks.append(hook), fit(self, signals))[1]
    module.main(settings)


class Start:
    """A start of a run on two ranks."""

    def __init__(self, tmp_path, shards, *more, hook=None):
        self.run, self.terminals = tmp_path / "run", tmp_path / "terminals"
        self.terminals.mkdir(exist_ok=True)
        settings = {s.partition("=")[0]: s for s in [*tiny_settings(self.run, shards), "samples.interval=0", *more]}
        self.processes, self._answers = start_ranks(_launch, 2, str(self.terminals), list(settings.values()), hook)

    def wait_for_steps(self, steps):
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + 60
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert all(process.is_alive() for process in self.processes), self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def codes(self):
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def printed(self):
        return [(self.terminals / f"rank-{rank}").read_text() for rank in range(2)]

    def ending(self):
        return json.loads((self.run / ENDING).read_text())


def test_a_signal_stops_all_ranks_with_75_and_a_killed_rank_is_76(shards, tmp_path):
    endless = ["train.steps=100000", "schedule.warmup_steps=2"]
    start = Start(tmp_path, shards, *endless)
    start.wait_for_steps(3)
    for process in start.processes:
        os.kill(process.pid, signal.SIGUSR1)
    assert start.codes() == [75, 75], start.printed()
    ending, (terminal, other_terminal) = start.ending(), start.printed()
    assert (ending["code"], ending["reason"], ending["error"]) == (75, "a stop signal was received", None)
    assert ending["checkpoint"] == f"{start.run}/checkpoints/step-{ending['step']:08d}"
    assert "ended      a stop signal was received" in terminal
    assert other_terminal == ""
    assert "ended      a stop signal was received" in (start.run / "logs" / "rank-0.log").read_text()
    assert (start.run / "logs" / "rank-1.log").exists()
    assert not (start.run / "lease.json").exists()
    for rank in range(2):
        first, *_, last = read_events(event_path(start.run, rank))
        assert (first["event"], first["step"], first["checkpoint"]) == ("start", 0, None)
        facts = (last["event"], last["code"], last["reason"], last["step"])
        assert facts == ("ending", 75, "a stop signal was received", ending["step"])

    start = Start(tmp_path, shards, *endless)
    start.wait_for_steps(ending["step"] + 2)
    assert not (start.run / ENDING).exists()
    os.kill(start.processes[1].pid, signal.SIGKILL)
    assert start.codes() == [76, -signal.SIGKILL], start.printed()
    last, printed = start.ending(), start.printed()[0]
    assert (last["code"], last["rank"], last["step"] > ending["step"]) == (76, 1, True)
    assert printed.count("error: lost rank 1 (") == 1
    assert "exit code 76 (try again: the same command resumes)" in printed
    assert "Traceback" not in printed
    assert "Traceback" in (start.run / "logs" / "rank-0.log").read_text()
    steps = [record["step"] for record in read_metrics(start.run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_an_error_of_one_rank_is_said_once_and_all_have_its_code(shards, tmp_path):
    start = Start(tmp_path, shards, "train.steps=100000", "schedule.warmup_steps=2", hook=Fail())
    assert start.codes() == [1, 1], start.printed()
    main, other = start.printed()
    assert main.splitlines()[-1].startswith("rank 0 (")
    assert main.splitlines()[-1].endswith("): a bug")
    assert "error: " not in main
    error, where, trace, *_ = other.splitlines()
    assert error == "error: TypeError: a bug"
    assert where.startswith("  rank 1 (")
    assert where.endswith(f"log {start.run}/logs/rank-1.log; exit code 1 (an error of the program)")
    assert trace == "Traceback (most recent call last):"
    assert start.ending()["error"] == "a bug"
    assert (start.ending()["rank"], start.ending()["reason"]) == (1, "TypeError")
