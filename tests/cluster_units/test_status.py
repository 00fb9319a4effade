"""The status of runs, read from their files: numbers and states, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import NOW, RunFolder, iso, status_of, training

from dcscale.checkpoint import layout
from dcscale.cluster import restarts
from dcscale.cluster.job import submission
from dcscale.cluster.status import State, find_runs, page, read, read_status, run_files, table
from dcscale.cluster.status.page import clean, duration
from dcscale.cluster.status.run_status import COUNTERS
from dcscale.lease import process_state
from dcscale.observe.events import EVENTS
from dcscale.observe.metrics import METRICS
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_all

GONE = {"process_start": 1}
ELSEWHERE = {"host": "n7", "boot_id": "other"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


ENDED = "the next start resumes from step 30, and does 10 steps again"
WITHOUT_A_WORD = f"all of its processes ended without a word, as if killed at once; {ENDED}"
STATES: dict[str, tuple[Callable[[RunFolder], Any], State, str]] = {
    "trains here": (lambda run: training(run).lease(1, 210), State.RUNNING, ""),
    "trains elsewhere": (lambda run: training(run).lease(80, 210, **ELSEWHERE), State.RUNNING, ""),
    "is prepared": (
        lambda run: run.config().lease(1, 500),
        State.RUNNING,
        "training has not begun yet",
    ),
    "is prepared for too long": (
        lambda run: run.config(parallel__start_timeout_minutes=5).lease(1, 400),
        State.STALLED,
        "nothing was recorded for 400 s; 300 s would be long",
    ),
    "is prepared again": (
        lambda run: training(run, 900).lease(1, 100),
        State.RUNNING,
        "training has not begun yet",
    ),
    "records nothing": (
        lambda run: training(run, 70).lease(1, 270),
        State.STALLED,
        "nothing was recorded for 70 s; 60 s would be long",
    ),
    "records seldom": (
        lambda run: run.config().start(200).steps(1, 11, 21, seconds_ago=170, each=6).lease(1, 999),
        State.RUNNING,
        "",
    ),
    "has lost its holder here": (lambda run: training(run).lease(1, 210, **GONE), State.RESUMABLE, WITHOUT_A_WORD),
    "has lost its holder elsewhere": (
        lambda run: training(run, 100).lease(95, 400, **ELSEWHERE),
        State.RESUMABLE,
        WITHOUT_A_WORD,
    ),
    "was killed before training": (
        lambda run: run.config().lease(500, 600, **GONE),
        State.NOT_STARTED,
        "a start ended before training began",
    ),
    "was killed while it was prepared again": (
        lambda run: training(run, 900).event("ending", 890, code=75, reason="stopped").lease(95, 700, **ELSEWHERE),
        State.RESUMABLE,
        WITHOUT_A_WORD,
    ),
    "is complete": (lambda run: training(run).ending(0, 5, step=100), State.DONE, ""),
    "has reached stop_after": (
        lambda run: training(run).ending(0, 5, "train.stop_after was reached", step=40),
        State.RESUMABLE,
        f"exit code 0: train.stop_after was reached; {ENDED}",
    ),
    "has failed": (lambda run: training(run).ending(1, 5, "TypeError"), State.FAILED, ""),
    "does not fit": (lambda run: training(run).ending(2, 5), State.FAILED, ""),
    "has diverged": (lambda run: training(run).ending(3, 5), State.DIVERGED, ""),
    "was stopped": (
        lambda run: training(run).ending(75, 5, "signal"),
        State.RESUMABLE,
        f"exit code 75: signal; {ENDED}",
    ),
    "was stopped before the first checkpoint": (
        lambda run: run.config().start(9).ending(130, 5, "SIGINT"),
        State.RESUMABLE,
        "exit code 130: SIGINT; the next start begins at step 0, as there is no checkpoint",
    ),
    "has lost a rank": (
        lambda run: training(run).ending(76, 5, "lost rank", rank=3, host="n2", step=40).lease(3, 210),
        State.RESUMABLE,
        f"exit code 76: lost rank, rank 3 (n2); {ENDED}",
    ),
    "has said in its events only how it ended": (
        lambda run: training(run).event("ending", 1, code=75, reason="signal", step=40),
        State.RESUMABLE,
        f"exit code 75: signal; {ENDED}",
    ),
    "trains again without removing how it ended": (
        lambda run: training(run).ending(75, 300).lease(1, 210),
        State.RUNNING,
        "",
    ),
    "is of a version without leases": (
        lambda run: training(run, 20),
        State.RUNNING,
        "no start holds the folder, but something was recorded 20 s ago",
    ),
    "was of a version without leases": (lambda run: training(run, 70), State.RESUMABLE, WITHOUT_A_WORD),
    "is complete, of a version without endings": (
        lambda run: training(run).file("summary.json", '{"completed": true, "steps": 100}'),
        State.DONE,
        "",
    ),
    "has stopped, of a version without endings": (
        lambda run: training(run).file("summary.json", '{"completed": false, "steps": 40}'),
        State.RESUMABLE,
        ENDED,
    ),
    "is queued again": (
        lambda run: training(run).ending(76, 5, "hang").restarts("restart", 3),
        State.RESUMABLE,
        f"exit code 76: hang; {ENDED}; job 17 is queued again",
    ),
    "is given up by its job": (
        lambda run: training(run).ending(76, 5, "hang").restarts("stop", 3),
        State.RESUMABLE,
        f"exit code 76: hang; {ENDED}; job 17 does not start it again",
    ),
    "was given up before the last start": (
        lambda run: training(run).ending(76, 5, "hang").restarts("stop", 300),
        State.RESUMABLE,
        f"exit code 76: hang; {ENDED}",
    ),
    "is only a folder": (lambda run: run, State.NOT_STARTED, ""),
    "is submitted": (lambda run: run.file("code/config.yaml", "train:\n  steps: 7\n"), State.NOT_STARTED, ""),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_run_that(name: str, run: RunFolder) -> None:
    write, state, why = STATES[name]
    write(run)
    status = status_of(run)
    assert (status.state, status.why, status.problems) == (state, why, [])


@pytest.mark.parametrize(("seconds", "state"), [(70, State.RUNNING), (1900, State.STALLED)])
@pytest.mark.parametrize("settings", [{"validation__interval": 20}, {"samples__interval": 40}, {"steps": 40}])
def test_validation_samples_and_the_end_may_take_long(
    run: RunFolder, settings: dict[str, int], seconds: int, state: State
) -> None:
    training(run, seconds).config(**settings).lease(1, 3000)
    assert status_of(run).state is state


def test_a_stopped_process_is_stalled_at_once(run: RunFolder) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        training(run).lease(1, 210, pid=process.pid, process_start=process_state(process.pid)[1])
        assert status_of(run).state is State.RUNNING
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        status = status_of(run)
        assert (status.state, status.why[:22]) == (State.STALLED, "its process is stopped")
        assert "UTC; stopped on this machine, renewed 1 s ago" in page(status)
    finally:
        process.kill()
        process.wait()


def test_after_the_validation_a_record_is_expected_again(run: RunFolder) -> None:
    training(run, 70).config(validation__interval=20).records(40, validation_loss=3.0).lease(1, 3000)
    assert status_of(run).state is State.STALLED


def test_numbers_of_a_run(run: RunFolder) -> None:
    run.config(steps=1000).start(900).event("ending", 800, code=75, reason="signal").start(700, step=10)
    run.records(*range(1, 61), tokens_per_second=50.0, step_seconds=0.5)
    run.records(60, validation_loss=3.5, bits_per_byte=1.25)
    run.records(*range(61, 121), tokens_per_second=100.0, step_seconds=0.5)
    for step in range(11, 121):
        run.event("steps", 10 + 2 * (120 - step), step=step, steps=1)
    run.checkpoint(90).checkpoint(110, 25).checkpoint(115, complete=False).lease(1, 710)
    (run.path / "checkpoints" / "quarantined-step-00000117").mkdir()
    status = status_of(run)
    assert (status.step, status.steps, status.tokens, status.done) == (120, 1000, 12_000, 0.12)
    assert status.loss == pytest.approx(5.0 - 1.2)
    assert (status.smoothed_loss, status.smoothed_over) == (pytest.approx(5.0 - 0.955), 50)
    assert (status.validation_loss, status.validation_step, status.bits_per_byte) == (3.5, 60, 1.25)
    assert status.tokens_per_second == 100.0
    assert status.seconds_per_step == pytest.approx(2.0)
    assert status.seconds_left == pytest.approx(880 * 2.0)
    assert status.record_age_seconds == pytest.approx(10)
    checkpoint = status.checkpoint
    assert (checkpoint.step, checkpoint.age_seconds, checkpoint.bytes) == (110, pytest.approx(25), None)
    assert [start.step for start in status.starts] == [0, 10]


def test_without_events_speed_and_age_are_those_of_the_metrics(run: RunFolder) -> None:
    run.config(steps=60).records(*range(1, 41), step_seconds=0.5, seconds_ago=30)
    status = status_of(run)
    assert (status.seconds_per_step, status.seconds_left, status.record_age_seconds) == (0.5, 10.0, pytest.approx(30))


def test_a_rollback_does_not_count_as_speed(run: RunFolder) -> None:
    run.config().start(500).steps(*range(1, 31), seconds_ago=300).event("rollback", 290, step=31, reason="spike")
    run.steps(*range(11, 21), seconds_ago=5, each=3)
    assert status_of(run).seconds_per_step == pytest.approx(3.0)


def test_a_step_that_is_done_but_not_recorded_counts(run: RunFolder) -> None:
    assert status_of(training(run).start(50, step=47).lease(1, 60)).step == 47
    assert status_of(run.ending(75, 1, step=49)).step == 49


def test_only_the_checkpoints_are_left(run: RunFolder) -> None:
    status = status_of(run.checkpoint(30))
    assert (status.step, status.state, status.loss) == (30, State.RESUMABLE, None)


def test_restarts_say_how_the_start_before_ended(run: RunFolder) -> None:
    run.start(900).event("ending", 800, code=75, reason="a signal", step=10)
    run.start(700, step=10).event("ending", 600, rank=2, code=76, reason="lost rank 0", step=15)
    run.start(500, step=10).start(100, step=20).steps(21, 22, seconds_ago=3).lease(1, 110)
    status = status_of(run)
    ended = [start.ended and (start.ended.code, start.ended.reason) for start in status.starts]
    assert ended == [(75, "a signal"), (76, "lost rank 0"), None, None]
    text = page(status)
    place = text.index("restarts   ")
    assert text[place:].splitlines() == [
        "restarts   2027-01-15 07:48:20 UTC: from step 10 with 2 ranks, after exit code 75, a signal, at step 10",
        "           2027-01-15 07:51:40 UTC: from step 10 with 2 ranks, after exit code 76, lost rank 0, at step 15",
        "           2027-01-15 07:58:20 UTC: from step 20 with 2 ranks, after all processes ended without a word",
    ]


def test_many_restarts_are_counted_and_the_last_ones_listed(run: RunFolder) -> None:
    for number in range(9):
        run.start(1000 - number, step=number)
    text = page(status_of(run))
    assert "restarts   8, the last 5:" in text
    assert text.count("after all processes ended") == 5


def test_stragglers_are_those_that_have_not_recovered_since_the_start(run: RunFolder) -> None:
    slow = {"excess": 0.25, "seconds": 1.0, "phase": "data", "phase_seconds": 0.2}
    run.start(900).event("straggler", 850, rank=0, step=5, host="n1", **slow).start(800)
    path = run.path / "events" / "rank-0.jsonl"
    lines = [
        {"event": "straggler", "time": iso(700), "step": 10, "rank": 1, "host": "n1", **slow},
        {"event": "straggler", "time": iso(690), "step": 20, "rank": 3, "host": "n2", **slow},
        {"event": "recovered", "time": iso(680), "step": 30, "rank": 1, "host": "n1"},
    ]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    status = status_of(run)
    assert [(slow.rank, slow.host, slow.excess, slow.step) for slow in status.stragglers] == [(3, "n2", 0.25, 20)]
    assert "rank 3 on n2 is 25% slower than the others, most in data, seen at step 20" in page(status)


def test_what_was_skipped_what_happened_and_hangs(run: RunFolder) -> None:
    run.records(1, 2, skipped_shards=2, skipped_tokens=5000, skipped_updates=1, spikes=0)
    for step in range(8):
        run.event("spike", 50 - step, step=step, reason="loss 9.0", action="skip")
    for name in ("2027-01-15T07-00-00Z", "2027-01-15T08-00-00Z"):
        run.file(f"hangs/{name}/rank-0.txt", "stacks")
    status = status_of(run)
    assert status.skipped == {"skipped_shards": 2, "skipped_tokens": 5000, "skipped_updates": 1}
    assert [event["step"] for event in status.incidents] == [3, 4, 5, 6, 7]
    text = page(status)
    assert "skipped    2 shards skipped, 5,000 tokens missing from every epoch, 1 update skipped" in text
    assert "spike at step 7, loss 9.0, skip" in text
    assert f"hangs      2; stacks of the last: {run.path}/hangs/2027-01-15T08-00-00Z" in text


def test_the_names_are_those_of_the_modules_that_write_the_files() -> None:
    assert run_files.MARKER == layout.MARKER
    assert run_files.CHECKPOINT_NAME.pattern == layout._NAME.pattern
    assert (run_files.CODE, read.RESTARTS) == (submission.CODE, restarts.RESTARTS)
    assert set(read.INCIDENTS) <= set(EVENTS)
    assert set(COUNTERS) <= set(METRICS)


# -- several runs, and what is printed --------------------------------------------------------------------------------


def test_runs_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("sweep/lr=1e-3", "sweep/lr=3e-4", "sweep/lr=2", "run-10", "run-9"):
        RunFolder(tmp_path / name).records(1)
    (tmp_path / "run-9" / "checkpoints").mkdir()
    RunFolder(tmp_path / "a" / "b" / "c").records(1)  # too deep
    RunFolder(tmp_path / ".data.building").lease(1, 9)  # of data that are being prepared
    (tmp_path / "empty").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert names == ["run-9", "run-10", "sweep/lr=3e-4", "sweep/lr=1e-3", "sweep/lr=2"]
    assert find_runs(tmp_path / "run-9") == [tmp_path / "run-9"]
    assert find_runs(tmp_path / "empty") == []
    assert find_runs(tmp_path / "none") == [tmp_path / "none"]


def test_tasks_of_an_array_that_wait_are_found(tmp_path: Path) -> None:
    array = RunFolder(tmp_path / "sweep")
    for number in range(3):
        array.file(f"code/config-{number}.yaml", f"run:\n  folder: x/sweep/{number}-lr={number}\ntrain:\n  steps: 9\n")
    array.file("code/config-10.yaml", "nothing")  # the submission was killed
    RunFolder(array.path / "1-lr=1").records(1)
    found = find_runs(array.path)
    assert [path.name for path in found] == ["0-lr=0", "1-lr=1", "2-lr=2", "10"]
    assert [read_status(path, NOW).steps for path in found[:3]] == [9, 9, 9]


def test_a_page(run: RunFolder) -> None:
    training(run).lease(5, 210, pid=7, host="n7", job="17", boot_id="other").restarts("restart", 300)
    run.event("checkpoint", 20, step=31, checkpoint=f"/elsewhere/step-{30:08d}", seconds=1.5, bytes=3 << 29)
    lines = page(status_of(run)).splitlines()
    assert lines.pop(5).startswith("left       60 s, until ")
    assert lines == [
        f"run        {run.path}",
        "state      running",
        "progress   40 of 100 steps (40.0%), 4,000 tokens",
        "loss       4.7950 over the last 40 records, 4.6000 in the last one",
        "speed      1 s a step",
        "recorded   1 s ago",
        f"checkpoint step 30, 20 s ago, 1.5 GiB in 1.5 s: {run.path}/checkpoints/step-00000030",
        "holder     process 7 on n7 (job 17, srun), since 2027-01-15 07:56:30 UTC; renewed 5 s ago",
        "job        SLURM job 17, requeued 3 times, no newer checkpoint in the last 2 starts",
        "           decided 2027-01-15 07:55:00 UTC: restart after 60 s: hang",
        "           without n2: the cause of 2 failures",
    ]


def test_a_table(tmp_path: Path) -> None:
    training(RunFolder(tmp_path / "a")).lease(1, 210).start(50)
    training(RunFolder(tmp_path / "b")).ending(1, 5, "TypeError", error="a bug\nin line 3")
    statuses = [read_status(path, NOW) for path in [*find_runs(tmp_path), tmp_path / "c"]]
    assert table(statuses).splitlines() == [
        str(tmp_path),
        "run  state        step   of   done    loss  left  recorded  saved  restarts  remarks",
        "a    running        40  100  40.0%  4.7950  60 s   1 s ago     30         1",
        "b    failed         40  100  40.0%  4.7950         1 s ago     30            a bug in line 3",
        f"c    not started                                                             {tmp_path}/c does not exist",
        "3 runs: 1 running, 1 failed, 1 not started",
    ]


def test_what_is_left_is_only_a_prediction_while_a_run_trains(run: RunFolder) -> None:
    training(run).ending(75, 1)
    assert "left       60 s of training at the last speed; it does not train now" in page(status_of(run))
    assert "\nleft " not in page(status_of(run.ending(3, 1)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "119 min"), (18_720, "5 h 12 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_texts_of_files_become_one_printable_line() -> None:
    assert clean("a\n\tb\x1b[0m\ud800", before=", ") == ", a b\\x1b[0m\\ud800"
    assert clean("x" * 400) == "x" * 297 + "..."
    assert clean(None, before=", ") == clean("") == ""


def test_a_real_run(shards: Path, tmp_path: Path) -> None:
    few = ["train.steps=3", "validation.interval=2", "samples.interval=0"]
    run_distributed(train_all, 1, [tiny_config(tmp_path / "run", shards, *few)])
    status = read_status(tmp_path / "run")
    assert (status.state, status.step, status.steps, status.done) == (State.DONE, 3, 3, 1.0)
    assert (status.validation_step, status.checkpoint.step, len(status.starts)) == (3, 3, 1)
    assert status.loss == status.record["loss"] > 0
    assert status.checkpoint.bytes > 0
    assert (status.seconds_per_step > 0, status.seconds_left, status.lease, status.problems) == (True, 0.0, None, [])
