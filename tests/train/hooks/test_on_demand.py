"""Traces, memory and requests of a running job, on two ranks: they appear, change no loss, and end no run."""

import gzip
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcscale.observe import Console, read_metrics
from dcscale.observe.events import event_path, read_events
from dcscale.observe.requests import RequestFiles
from dcscale.parallel import discover, start_distributed, stop_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import build_trainer
from dcscale.train.hooks import Hook
from dcscale.train.hooks.on_demand import OnDemand

pytestmark = pytest.mark.distributed

PHASES = ("data", "forward", "backward", "update")
COMMON = ("train.steps=6", "validation.interval=3", "log.compose_interval=0", "checkpoint.keep_last=1")


class Lines:
    def __init__(self):
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)

    progress = Console.progress
    _enabled = False


class User(Hook):
    """Writes request files into the run folder, or stops the run, before given steps."""

    name = "user"

    def __init__(self, actions):
        self._actions = actions

    def before_step(self, trainer):
        if not trainer.environment.is_main:
            return
        for name, content in self._actions.get(trainer.state.step + 1, {}).items():
            if name == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                (trainer.run / name).write_text(content)


def _train(runs):
    """Trains configs, each with the actions of a user; returns what rank 0 printed in each."""
    environment, printed = discover(), []
    start_distributed(environment, 1)
    for config, actions in runs:
        console = Lines()
        trainer = build_trainer(config, environment, console)
        trainer.request_files = RequestFiles(trainer.run, seconds=0)
        trainer.hooks = [User(actions), *trainer.hooks]
        trainer.fit()
        trainer.close()
        printed.append(console.lines)
    stop_distributed()
    return printed


ASKED = {
    1: {"profile": "steps=2 ranks=all shapes"},
    4: {"memory": "ranks=0,1", "profile": "setps=5"},
    6: {"profile": ""},
}
"""The request of step 1 is followed from step 2 on; the last one comes too late."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """Folder and printed lines of each run, by name."""
    folder = tmp_path_factory.mktemp("on-demand")
    planned = "log.profile_steps=[2,3,5]"
    scripts = {
        "plain": ((), {}),
        "asked": ((), ASKED),
        "zero-2": (("parallel.zero_stage=2", planned), {}),
        "zero-3 plain": (("parallel.zero_stage=3",), {}),
        "zero-3": (("parallel.zero_stage=3", planned), {1: {"memory": "ranks=1"}}),
        "in the way": ((planned,), {2: {"memory": ""}}),
        "stopped": ((), {2: {"profile": "steps=5"}, 4: {"stop": "", "memory": ""}}),
        "resumed": ((), {}),
        "planned, stopped": ((planned,), {3: {"stop": ""}}),
    }
    configs = []
    for name, (overrides, actions) in scripts.items():
        run = folder / ("stopped" if name == "resumed" else name)
        run.mkdir(exist_ok=True)
        configs.append((tiny_config(run, shards, *COMMON, *overrides), actions))
    (folder / "in the way" / "profiles").write_text("no folder")
    printed, _ = run_distributed(_train, 2, configs)
    return {name: (Path(config.run.folder), lines) for name, (config, _), lines in zip(scripts, configs, printed)}


def outputs(run):
    return {path.relative_to(run / "profiles").as_posix() for path in (run / "profiles").rglob("*") if path.is_file()}


def losses(run):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def events(run, rank, *kinds):
    return [event for event in read_events(event_path(run, rank)) if event["event"] in kinds]


def read_trace(path):
    """The complete spans of a trace, checked against what the format of Chrome's traces demands."""
    trace = json.loads(gzip.decompress(path.read_bytes()), parse_constant=pytest.fail)
    assert trace["schemaVersion"] == 1
    spans, by_thread = [], {}
    for event in trace["traceEvents"]:
        assert event["ph"] in "XMisfC"
        assert isinstance(event["name"], str)
        assert isinstance(event.get("ts", 0), (int, float))
        if event["ph"] in "sf":
            assert "id" in event
        if event["ph"] == "X":
            assert event["dur"] >= 0
            spans.append(event)
            by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], -event["dur"]))
    for thread in by_thread.values():  # viewers nest the spans of a thread, so none may overlap another
        ends = []
        for start, negative in sorted(thread):
            while ends and ends[-1] <= start + 0.01:
                ends.pop()
            assert not ends or start - negative <= ends[-1] + 0.01
            ends.append(start - negative)
    return spans


def test_what_is_asked_for_appears_on_the_chosen_ranks_and_is_removed(runs):
    run, _ = runs["asked"]
    traces = {f"step-2/rank-{rank}.{suffix}" for rank in (0, 1) for suffix in ("json.gz", "txt")}
    assert outputs(run) == traces | {f"step-5/rank-{rank}-memory.txt" for rank in (0, 1)}
    assert not {"profile", "memory", ".profile-taken", ".memory-taken"} & {path.name for path in run.iterdir()}


@pytest.mark.parametrize(("plain", "looked_into"), [("plain", "asked"), ("zero-3 plain", "zero-3")])
def test_losses_are_those_of_a_run_without_to_the_last_bit(runs, plain, looked_into):
    expected = losses(runs[plain][0])
    assert [step for step, *_ in expected] == [1, 2, 3, 4, 5, 6]
    assert losses(runs[looked_into][0]) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trace_has_the_steps_and_their_phases_and_no_other(runs, rank):
    spans = read_trace(runs["asked"][0] / f"profiles/step-2/rank-{rank}.json.gz")
    steps = [span for span in spans if span["name"].startswith("ProfilerStep#")]
    assert [step["name"] for step in steps] == ["ProfilerStep#2", "ProfilerStep#3"]
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [span["name"] for span in spans if step["ts"] <= span["ts"] and span["ts"] + span["dur"] <= end]
        # Two micro-batches of two sequences are a rank's share.
        assert [inside.count(name) for name in PHASES] == [1, 2, 2, 1]
        assert "aten::mm" in inside
    assert any("Input Dims" in span.get("args", {}) for span in spans)


def test_the_table_says_what_it_is_of(runs):
    text = (runs["asked"][0] / "profiles/step-2/rank-1.txt").read_text()
    assert text.startswith("profile of steps 2 to 3, rank 1 of 2 on ")
    assert [line.split()[:2] for line in text.splitlines()[3:5]] == [["step", "2"], ["step", "3"]]
    assert re.search(r"  [\w:]+ \[\[\d", text)  # with shapes
    memory = (runs["asked"][0] / "profiles/step-5/rank-1-memory.txt").read_text()
    assert memory.startswith("memory of step 5, rank 1 of 2 on ")
    for part in (" MiB resident, ", "Python's allocations", "engine.py:", "live tensors", "[257, 32] float32 on cpu"):
        assert part in memory


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_writes_an_event_of_what_it_wrote(runs, rank):
    run, _ = runs["asked"]
    profile, memory = events(run, rank, "profile", "memory")
    assert (profile["event"], profile["step"], profile["steps"]) == ("profile", 2, 2)
    assert profile["files"] == [f"{run}/profiles/step-2/rank-{rank}.{suffix}" for suffix in ("json.gz", "txt")]
    assert profile["bytes"] == sum(os.path.getsize(path) for path in profile["files"])
    assert (memory["event"], memory["step"], memory["steps"]) == ("memory", 5, 1)


def test_what_is_refused_is_reported_and_the_run_goes_on(runs):
    run, lines = runs["asked"]
    typo, late = events(run, 0, "request_failure")
    assert typo["error"].startswith(f"{run}/profile: 'setps=5' is not a setting: ")
    assert (typo["step"], typo["request"]) == (4, "profile")
    assert late["error"] == f"{run}/profile came too late: the run is complete"
    for event in (typo, late):
        assert f"warning    {event['error']}" in lines
    assert events(run, 1, "request_failure") == []


@pytest.mark.parametrize(("name", "more"), [("zero-2", set()), ("zero-3", {"step-2/rank-1-memory.txt"})])
def test_planned_steps_in_a_row_are_one_trace_of_rank_0(runs, name, more):
    run, lines = runs[name]
    assert outputs(run) == more | {f"step-{step}/rank-0.{suffix}" for step in (2, 5) for suffix in ("json.gz", "txt")}
    for step, last in ((2, 3), (5, 5)):
        names = {span["name"] for span in read_trace(run / f"profiles/step-{step}/rank-0.json.gz")}
        assert {n for n in names if n.startswith("Prof")} == {f"ProfilerStep#{n}" for n in range(step, last + 1)}
    assert any(line.startswith(f"profile    step 5: {run}/profiles/step-5/rank-0.json.gz (") for line in lines)


def test_a_folder_that_cannot_be_written_ends_no_run(runs):
    run, _ = runs["in the way"]
    assert losses(run) == losses(runs["plain"][0])
    failures = events(run, 0, "request_failure")
    # When rank 0 looks for the request is a matter of time.
    assert sorted(event["request"] for event in failures) == ["memory", "profile", "profile"]
    assert all(f"{run}/profiles" in event["error"] for event in failures)


def test_a_run_that_stops_drops_what_is_not_done_and_the_next_start_does_it(runs):
    run, lines = runs["stopped"]
    for kind in ("profile", "memory"):
        assert f"warning    {run / kind} is left for the next start, since the run stops" in lines
    assert not [line for line in lines if str(run / "profiles") in line]
    (profile,) = events(run, 0, "profile")
    assert (profile["step"], profile["steps"]) == (5, 2)
    assert outputs(run) == {f"step-5/rank-0{suffix}" for suffix in (".json.gz", ".txt", "-memory.txt")}
    assert events(run, 0, "request_failure") == []
    assert losses(run) == losses(runs["plain"][0])


def test_a_planned_trace_that_a_stop_cuts_off_is_reported(runs):
    run, _ = runs["planned, stopped"]
    (failure,) = events(run, 0, "request_failure")
    assert failure["error"] == "profile of step 2: the run stops or goes back before its last step is done"
    assert not (run / "profiles").exists()


@pytest.fixture
def trainer(tmp_path):
    """A trainer of one rank at step 4 of 10, in whose run folder a user may touch files."""
    lines, written = [], []
    return SimpleNamespace(
        run=tmp_path,
        config=SimpleNamespace(train=SimpleNamespace(steps=10, stop_after=None)),
        environment=SimpleNamespace(is_main=True, rank=0, world_size=1, device=torch.device("cpu")),
        engine=SimpleNamespace(gather_objects=lambda value: [value]),
        events=SimpleNamespace(write=lambda kind, **facts: written.append((kind, facts))),
        state=SimpleNamespace(step=4),
        request_files=RequestFiles(tmp_path, seconds=0),
        look_requested=True,
        watchdog=SimpleNamespace(patient=False),
        line=lines.append,
        lines=lines,
        written=written,
    )


def do_steps(hook, trainer, count):
    for _ in range(count):
        hook.before_step(trainer)
        trainer.state.step += 1
        hook.after_step(trainer)


def test_what_a_rollback_interrupts_is_done_after_it(trainer):
    hook = OnDemand()
    (trainer.run / "profile").write_text("steps=3 ranks=all")
    do_steps(hook, trainer, 2)
    assert not (trainer.run / "profile").exists()
    hook.before_step(trainer)
    hook.before_rollback(trainer)
    trainer.state.step = 0
    assert (trainer.run / "profile").read_text() == "steps=3 ranks=all"
    do_steps(hook, trainer, 3)
    assert outputs(trainer.run) == {"step-1/rank-0.json.gz", "step-1/rank-0.txt"}
    assert [kind for kind, _ in trainer.written] == ["profile"]


def test_ranks_may_be_silent_until_all_have_written(trainer):
    hook, seen = OnDemand([6, 7]), []
    for _ in range(5):
        hook.before_step(trainer)
        seen.append(trainer.watchdog.patient)
        trainer.state.step += 1
        hook.after_step(trainer)
    assert seen == [False, True, True, True, False]  # in step 8 others may still write what they have recorded


def test_a_request_waits_for_the_end_of_another(trainer):
    hook = OnDemand([6, 7])
    (trainer.run / "profile").write_text("steps=2")
    do_steps(hook, trainer, 1)
    (trainer.run / "profile").write_text("steps=1")
    do_steps(hook, trainer, 1)
    assert (trainer.run / "profile").exists()
    do_steps(hook, trainer, 1)  # it replaces the planned one of step 7
    assert [(facts["step"], facts["steps"]) for _, facts in trainer.written] == [(5, 2), (7, 1)]


def test_a_library_that_fails_ends_no_run(trainer, monkeypatch):
    def fail(self):
        raise RuntimeError("CUPTI is in use")

    hook = OnDemand([5, 7])
    monkeypatch.setattr("dcscale.train.hooks.on_demand.StepTrace.start", fail)
    do_steps(hook, trainer, 1)
    monkeypatch.undo()
    monkeypatch.setattr("dcscale.train.hooks.on_demand.StepTrace.write", lambda *arguments: fail(None))
    do_steps(hook, trainer, 2)
    assert trainer.lines == [f"warning    profile of step {step}: CUPTI is in use" for step in (5, 7)]
    assert [kind for kind, _ in trainer.written] == ["request_failure"] * 2


def test_a_full_disk_ends_no_run_and_leaves_no_half_file(small_disk, tmp_path, shards):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profiles").symlink_to(small_disk.folder)
    small_disk.fill()
    config = tiny_config(run, shards, *COMMON, "train.steps=2", "validation.interval=0", "log.profile_steps=[1]")
    ((lines,),) = run_distributed(_train, 1, [(config, {1: {"memory": ""}})])
    failures = events(run, 0, "request_failure")
    assert [event["request"] for event in failures] == ["profile", "memory"]
    assert all("No space left on device" in event["error"] for event in failures)
    assert [path.name for path in small_disk.folder.rglob("*") if path.is_file()] == ["filling"]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert len([line for line in lines if "No space left on device" in line]) == 2
