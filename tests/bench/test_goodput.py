"""The simulated goodput equals Daly's formula and what can be computed by hand, and real runs are read as they were."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dcscale.bench.goodput import study
from dcscale.bench.goodput.simulate import (
    Times,
    best_interval,
    daly_interval,
    expected_goodput,
    exponential,
    fixed,
    simulate,
    young_interval,
)
from dcscale.bench.goodput.times import (
    CAMPAIGN_FAULTS,
    HASH_GB_PER_SECOND,
    LIVE,
    LIVE_DURABLE,
    LIVE_STALL,
    PAGEABLE_GB_PER_SECOND,
    RunError,
    Value,
    campaign_faults,
    cluster_values,
    measure_run,
    repository_values,
)
from dcscale.cli import ResultError
from dcscale.config.cluster import load_cluster
from dcscale.hardware import PEAK_TFLOPS_BF16

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster" / "8xh100-infiniband.yaml"
COSTS = Times(stall=5, durable=60, notice=40, restart=100)
TOLERANCE = 0.005
"""Of a simulation of 4,000 failures, absolute: more than four standard errors of each case here."""


def daly(times: Times, interval: float, mtbf: float) -> float:
    """Daly (2006), equation 20: useful time / expected wall-clock time if saves block and all is noticed at once."""
    wall = mtbf * math.exp(times.restart / mtbf) * math.expm1((interval + times.stall) / mtbf)
    return interval / wall


def test_the_formula_is_dalys_if_saves_block() -> None:
    for stall, restart, interval, mtbf in [(30, 120, 600, 2700), (1, 10, 60, 300), (60, 600, 3600, 86_400)]:
        times = Times(stall, stall, notice=0, restart=restart)
        assert expected_goodput(times, interval, mtbf) == pytest.approx(daly(times, interval, mtbf), rel=1e-12)


@pytest.mark.parametrize(
    ("times", "interval", "mtbf"),
    [
        (Times(30, 30, 0, 120), 600, 2700),
        (Times(60, 60, 0, 300), 300, 900),
        (COSTS, 300, 2700),
        (replace(COSTS, durable=400), 300, 2700),
        (replace(COSTS, durable=100, slowdown=0.3), 300, 2700),
        (replace(COSTS, durable=500, slowdown=0.3), 300, 2700),
        (replace(COSTS, notice=1000, restart=1000), 300, 2700),
    ],
    ids=["blocking", "many failures", "background", "writes overlap", "slowed", "slowed and overlap", "long outages"],
)
def test_the_simulation_equals_the_formula(times: Times, interval: float, mtbf: float) -> None:
    outcome = simulate(times, interval, exponential(mtbf, seed=1), wall=4000 * mtbf)
    assert outcome.goodput == pytest.approx(expected_goodput(times, interval, mtbf), abs=TOLERANCE)


def test_the_parts_of_a_simulation_add_up() -> None:
    generator = random.Random(0)
    for seed in range(60):
        stall = generator.choice([0, 3])
        times = Times(
            stall=stall,
            durable=stall + generator.uniform(0, 80),
            notice=generator.uniform(0, 60),
            restart=generator.uniform(0, 200),
            slowdown=generator.choice([0, 0.25]),
            time_limit=generator.choice([None, 1800]),
        )
        arrivals = exponential if seed % 2 else fixed
        out = simulate(times, generator.uniform(20, 400), arrivals(900, seed), wall=20_000)
        parts = out.useful + out.lost + out.stalled + out.slowed + out.down + out.planned
        assert parts == pytest.approx(out.wall, abs=1e-6)
        assert min(out.useful, out.lost, out.stalled, out.slowed, out.down, out.planned) >= 0


def test_without_failures_only_saves_cost_time() -> None:
    out = simulate(replace(COSTS, slowdown=0.0), 95, [], wall=1000)
    assert (out.useful, out.stalled, out.failures) == (950, 50, 0)
    assert expected_goodput(COSTS, 95, 1e9) == pytest.approx(0.95, abs=1e-5)


# Saves begin at 100 and 205 s of a run with COSTS and an interval of 100; the first is complete at 160.
@pytest.mark.parametrize(
    ("failures", "useful", "lost"),
    [
        ([50], 1000 - 50 - 140 - 7 * 5, 50),  # nothing saved yet: starts from 0
        ([102], None, 100),  # while the loop waits for the copy
        ([159], None, 154),  # the checkpoint is not complete
        ([160], None, 55),  # it is complete at this moment
        ([204.5], None, 99.5),
        ([206], None, 100),
    ],
)
def test_a_failure_loses_what_is_not_complete(failures: list[float], useful: float | None, lost: float) -> None:
    out = simulate(COSTS, 100, failures, wall=1000)
    assert out.failures == 1
    assert out.lost == pytest.approx(lost)
    assert out.down == 140
    if useful is not None:
        assert out.useful == pytest.approx(useful)


def test_failures_while_one_is_noticed_change_nothing_and_those_of_a_start_begin_it_again() -> None:
    assert simulate(COSTS, 100, [50, 60, 89], wall=1000).down == 140
    again = simulate(COSTS, 100, [50, 150], wall=1000)  # 60 s after the restart began
    assert (again.failures, again.down) == (2, 40 + 60 + 140)
    assert simulate(COSTS, 100, [950], wall=1000).down == 50  # the end comes while it starts


def test_a_save_waits_for_the_one_before() -> None:
    out = simulate(Times(stall=0, durable=150, notice=0, restart=0), 100, [], wall=1000)
    # Saves begin at 100, 250, 400, ...: each waits 50 s.
    assert (out.stalled, out.checkpoints) == (6 * 50, 6)


def test_a_time_limit_costs_a_save_and_a_start_and_loses_nothing() -> None:
    out = simulate(replace(COSTS, time_limit=450), 100, [], wall=1000)
    # The stop at 450 waits until the save of 415 is complete at 475, and its own at 535. The next is 450 s later, at
    # 985, and waits for the save of 945 until the end.
    assert (out.lost, out.planned) == (0, 100)
    assert out.stalled == pytest.approx((4 * 5 + 25 + 60) + (3 * 5 + 15))
    failing = simulate(replace(COSTS, time_limit=450), 1000, [480], wall=1000)
    assert failing.lost == 450


def test_fixed_failures_are_one_period_apart() -> None:
    times = fixed(2700, seed=3)
    first, second, third = next(times), next(times), next(times)
    assert 0 <= first < 2700
    assert (second - first, third - second) == pytest.approx((2700, 2700))


def test_the_best_interval_is_dalys_if_saves_block_rarely() -> None:
    times = Times(30, 30, 0, 120)
    best = best_interval(times, 2700)
    assert best == pytest.approx(daly_interval(times, 2700), rel=0.01)
    assert young_interval(times, 2700) == pytest.approx(math.sqrt(2 * 30 * 2700))
    assert expected_goodput(times, best, 2700) >= expected_goodput(times, young_interval(times, 2700), 2700)
    assert daly_interval(Times(600, 600, 0, 0), 200) == 200  # where his series does not hold


def test_a_slow_write_bounds_the_best_interval_where_young_would_save_more_often() -> None:
    times = Times(stall=0.01, durable=300, notice=0, restart=60)
    assert young_interval(times, 2700) < 10
    assert best_interval(times, 2700) >= 299
    assert best_interval(times, 2700, shortest=1000) == pytest.approx(1000, rel=0.01)


def test_the_longest_outage_is_where_the_target_is_just_reached() -> None:
    longest = study.longest_outage(COSTS, 2700, 1.0, 0.85)
    for change, reached in ((-1, True), (1, False)):
        times = replace(COSTS, notice=0, restart=longest + change)
        assert (expected_goodput(times, best_interval(times, 2700), 2700) >= 0.85) is reached
    assert study.longest_outage(COSTS, 2700, 1.0, 0.99) is None


def test_intervals_that_are_equal_share_a_row() -> None:
    usual = study.by_interval(COSTS, 2700, seeds=1, shortest=1.0)
    assert [row["name"] for row in usual["rows"] if row["name"]] == ["best, Daly", "Young"]
    fast = study.by_interval(Times(0.01, 300, 0, 60), 2700, seeds=1, shortest=1.0)
    assert [row["name"] for row in fast["rows"] if row["name"]] == ["Young, Daly", "best"]


def test_a_run_whose_checkpoints_never_complete_makes_no_progress() -> None:
    assert expected_goodput(replace(COSTS, durable=1e6), 1e5, 100) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stall": -1}, "stall is -1: it must be a number of at least 0"),
        ({"restart": math.nan}, "restart is nan"),
        ({"durable": 4}, "durable is 4 s, and stall 5 s: .* at least as long"),
        ({"slowdown": 1}, "slowdown is 1: it must be below 1"),
        ({"time_limit": 100}, "time_limit is 100 s: it must be above restart, 100 s"),
    ],
)
def test_impossible_times_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(COSTS, **change)
    with pytest.raises(ValueError, match="interval is 0: it must be above 0"):
        simulate(COSTS, 0, [])
    with pytest.raises(ValueError, match=r"interval is 0.001 s: at most 1,000,000 intervals can be simulated"):
        simulate(COSTS, 0.001, [])


# -- where times come from ----------------------------------------------------------------------------------------


def test_the_campaign_of_the_repository_is_read() -> None:
    faults = campaign_faults(ROOT / "launch" / "README.md")
    assert [fault.title for fault in faults] == list(CAMPAIGN_FAULTS)
    assert all(0 < fault.ended < 300 and 0 < fault.next_start < 300 for fault in faults)
    values = repository_values(faults)
    assert values["notice"].seconds == pytest.approx(sum(fault.ended for fault in faults) / len(faults))
    assert not any(value.assumed for value in values.values())


def test_the_costs_of_a_checkpoint_are_those_of_the_published_run() -> None:
    times = json.loads((ROOT / LIVE).read_text())["times"]
    assert times["stall"]["seconds"] == pytest.approx(LIVE_STALL, abs=0.005)
    assert times["durable"]["seconds"] == pytest.approx(LIVE_DURABLE, abs=0.005)


def test_a_page_without_the_campaign_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    with pytest.raises(ValueError, match=r"README.md cannot be read .*give --notice and --restart"):
        campaign_faults(page)
    text = (ROOT / "launch" / "README.md").read_text()
    page.write_text(text.replace("| node powered off |", "| node on fire |"))
    with pytest.raises(ValueError, match="no times of the fault 'node powered off'"):
        campaign_faults(page)


def test_what_a_checkpoint_costs_follows_from_the_bandwidths() -> None:
    cluster, notice = load_cluster(CLUSTER, PEAK_TFLOPS_BF16), Value(40, "measured")
    few, many = (cluster_values(cluster, nodes, 8e9, notice) for nodes in (1, 64))
    part = 12 * 8 / 8  # GB of each of 8 ranks
    assert few["stall"].seconds == pytest.approx(part / PAGEABLE_GB_PER_SECOND)
    rest = 4 * 8 / 8 + 2 * 8 / 4 + 2 * 8 / HASH_GB_PER_SECOND
    parts = 12 * 8 / 4 + part / HASH_GB_PER_SECOND
    assert few["durable"].seconds == pytest.approx(few["stall"].seconds + parts + rest)
    assert many["stall"].seconds == pytest.approx(few["stall"].seconds / 64)
    # All nodes together write at most 80 GB/s, and rank 0 writes the weights alone.
    assert many["durable"].seconds > 12 * 8 / 80 + rest
    assert few["restart"].assumed
    assert not few["notice"].assumed


# -- real runs ----------------------------------------------------------------------------------------------------


def at(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"2026-11-27T10:{int(minutes):02d}:{seconds:06.3f}+00:00"


def write_run(run: Path, end_code: int = 76) -> Path:
    """A run of two ranks and steps of 1 s, a checkpoint each 10, that fails at 25 s and trains again at 45 s."""
    (run / "events").mkdir(parents=True)
    events: list[list[dict]] = [[], []]

    def train(begin: float, first: int, last: int, first_takes: float) -> float:
        now = begin + first_takes - 1
        for step in range(first, last + 1):
            now += 1
            for of_rank in events:
                of_rank.append({"event": "steps", "time": at(now), "step": step, "steps": 1, "seconds": 1.0})
            if step % 10 == 2:
                name = f"{run}/checkpoints/step-{step - 2:08d}"
                events[0].append({"event": "checkpoint", "time": at(now), "step": step, "checkpoint": name})
        return now

    for rank, of_rank in enumerate(events):
        of_rank.append({"event": "start", "time": at(0), "step": 0, "checkpoint": None, "rank": rank})
    ended = train(0, 1, 25, 1) + 4
    events[1].append({"event": "ending", "time": at(ended), "code": end_code, "reason": "lost rank", "step": 25})
    for of_rank in events:
        of_rank.append({"event": "start", "time": at(45), "step": 20, "checkpoint": "step-00000020"})
    ended = train(45, 21, 40, 3)
    events[0].append({"event": "ending", "time": at(ended), "code": 0, "reason": "done", "step": 40})
    for rank, of_rank in enumerate(events):
        text = "".join(json.dumps(event) + "\n" for event in of_rank)
        (run / "events" / f"rank-{rank}.jsonl").write_text(text + "{\n")  # a line that a crash has cut
    lines = []
    for step in range(1, 41):
        lines.append({"step": step, "step_seconds": 1.0})
        if step in (11, 21, 31):
            lines[-1]["checkpoint_stall_seconds"] = 0.25
        if step in (12, 22, 32):
            lines[-1]["checkpoint_write_seconds"] = 1.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_times_of_a_run_are_read(tmp_path: Path) -> None:
    run = measure_run(write_run(tmp_path / "run"))
    assert (run.steps, run.useful, run.step_seconds, run.interval_steps, run.checkpoints) == (40, 40, 1, 10, 3)
    assert (run.stall, run.durable, run.interval) == (0.25, 1.5, 10)
    assert run.wall == pytest.approx(45 + 3 + 19)
    assert run.goodput == pytest.approx(40 / 67)
    (outage,) = run.failures
    assert (outage.lost_steps, outage.code) == (5, 76)
    values = run.values("run", {})
    assert values["notice"].seconds == pytest.approx(4)
    assert values["restart"].seconds == pytest.approx(45 - 29 + 2)  # and the first step takes 3 s instead of 1
    assert run.failed_at == pytest.approx([25])
    compared = study.compare(run, "run", {}, seeds=2)["compared"]
    assert compared["real"] == run.goodput
    # What the simulation adds to reality is less than a stall and a step.
    assert compared["replayed"] == pytest.approx(run.goodput, abs=0.03)


def test_kills_that_were_written_down_are_when_the_run_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    began = 1795773600.0  # 2026-11-27 10:00 UTC
    times = [(-9, -3, -2), (-2, 25.4, 30), (30, 33, 34), (34, None, 67)]
    keys = ("began", "killed", "ended")
    starts = [{key: None if x is None else began + x for key, x in zip(keys, row)} for row in times]
    (run / "kills.json").write_text(json.dumps({"format": 1, "starts": starts}))
    measured = measure_run(run)
    assert measured.failed_at == pytest.approx([25.4, 33])  # the first was killed before it had trained
    values = measured.values("run", {})
    assert values["notice"].seconds == pytest.approx((1 + 4.6 + 1) / 3)
    assert values["restart"].seconds == pytest.approx(45 - 34 + 2)  # only of the start that got to train
    (run / "kills.json").write_text(json.dumps({"starts": [{**start, "killed": None} for start in starts]}))
    with pytest.raises(RunError, match="kills.json has no kill: give --notice and --restart"):
        measure_run(run).values("run", {})
    for damaged, message in [
        ([3], r"kills.json: starts must be a list of objects"),
        ([{**starts[1], "killed": "soon"}], "killed is 'soon'"),
        ([{"began": began}], "ended is None"),
        ([{"began": began + 1, "killed": None, "ended": began + 2}], "it is of another run"),
        ([starts[0], {**starts[1], "ended": began}], "start 2 must begin before its kill"),
        ([], "it is of another run"),
    ]:
        (run / "kills.json").write_text(json.dumps({"starts": damaged}))
        with pytest.raises(RunError, match=message):
            measure_run(run)


def test_a_failure_that_nobody_could_write_down_counts_as_noticed_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "events" / "rank-1.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"ending"' not in line))
    values = measure_run(run).values("run", {})
    assert (values["notice"].seconds, values["restart"].seconds) == (0, pytest.approx(45 - 25 + 2))


def test_a_stop_that_was_asked_for_is_no_failure(tmp_path: Path) -> None:
    run = measure_run(write_run(tmp_path / "run", end_code=75))
    assert run.failures == []
    with pytest.raises(RunError, match="nothing failed in this run: give --notice and --restart"):
        run.values("run", {})
    given = {"notice": Value(1, "command line"), "restart": Value(2, "command line")}
    assert run.values("run", given)["restart"].seconds == 2
    assert study.compare(run, "run", given, seeds=2)["compared"] is None


METRICS = "metrics.jsonl"
DAMAGE = [
    ("events/rank-0.jsonl", None, None, r"rank-0.jsonl cannot be read \(No such file"),
    (METRICS, None, None, r"metrics.jsonl cannot be read"),
    ("events/rank-0.jsonl", '"start"', '"begin"', "no event 'start': the run has not begun"),
    ("events/rank-0.jsonl", "T10:", "T99:", "no event 'start'"),
    (
        "events/rank-0.jsonl",
        't", "time": "2026-11-27T10:00:45',
        't", "time": "2025-11-27T10:00:45',
        "a clock was",
    ),
    ("events/rank-1.jsonl", '"ending", "time": "2026', '"ending", "time": "9026', "a run lasts .* at most ten years"),
    ("events/rank-0.jsonl", '"checkpoint", "time"', '"x", "time"', "no start completed two checkpoints"),
    ("events/rank-0.jsonl", '"steps": 1', '"steps": "a"', "steps is 'a', but must be a number"),
    (METRICS, "step_seconds", "seconds", "no record with step_seconds"),
    (METRICS, "checkpoint_write_seconds", "other", "no checkpoint_write_seconds: no checkpoint was complete"),
    (METRICS, '"step_seconds": 1.0', '"step_seconds": NaN', "step_seconds is nan, but must be a number"),
    (METRICS, '"step_seconds": 1.0', '"step_seconds": true', "step_seconds is True"),
    (METRICS, '"step": 7', '"step": -7', "step is -7"),
    (METRICS, '{"step": 7', '{{"step": 7', r"metrics.jsonl, line 7 cannot be read: it is not JSON"),
    (METRICS, '{"step": 7, "step_seconds": 1.0}', "7", "line 7: is not a record of a run"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), DAMAGE, ids=[str(i) for i in range(len(DAMAGE))])
def test_a_folder_that_times_cannot_be_read_from_is_refused(
    tmp_path: Path, name: str, old: str | None, new: str | None, message: str
) -> None:
    run = write_run(tmp_path / "run")
    if old is None or new is None:
        (run / name).unlink()
    else:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    with pytest.raises(RunError, match=message):
        measure_run(run)


# -- the tool -----------------------------------------------------------------------------------------------------

QUICK = ["--seeds", "1", "--step", "100"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs the tool in this process, in the repository; returns exit code, output and errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import goodput

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = goodput.main(list(arguments))
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_the_tool_measures_a_run_and_writes_tables_and_plot(tool: Callable, tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "out.json"
    code, printed, _ = tool("--from", str(run), *QUICK, "--output", str(output))
    assert code == 0
    assert re.search(r"\| .*run \| 67 s \| 1 \| 10 steps \| 59.70 % \|", printed)
    assert output.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(output.read_text())
    assert {"times", "day", "rates", "runs", "machine"} <= set(result)
    assert result["times"]["stall"]["seconds"] == 0.25
    assert study.markdown(result) in printed
    assert study.markdown(result) in tool("--markdown", str(output))[1]
    del result["day"]["rows"][0]["formula"]
    with pytest.raises(ResultError, match="it is not a result of goodput: KeyError"):
        study.markdown(result)


def test_the_tool_marks_what_a_cluster_assumes(tool: Callable) -> None:
    code, printed, _ = tool("--cluster", str(CLUSTER), "--restart", "300", "--mtbf", "8h", *QUICK)
    assert code == 0
    assert "| restart | 5 min | command line |" in printed
    assert "| stall | 0.105 s | **assumed**: 2.8e+09 parameters, 64 GPUs" in printed
    assert "A day with a failure every 8 h on average" in printed
    assert "launch/README.md, column 'ended'" in printed


def test_a_machine_of_its_own_has_one_node(tool: Callable) -> None:
    code, printed, _ = tool("--cluster", str(CLUSTER.with_name("1xh200.yaml")), *QUICK)
    assert code == 0
    assert "2.8e+09 parameters, 1 GPU:" in printed


def test_the_tool_compares_the_faults_of_the_campaign(tool: Callable) -> None:
    code, printed, _ = tool(*QUICK)
    assert code == 0
    assert all(f"| {title} |" in printed for title in CAMPAIGN_FAULTS)
    assert "assumed" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a"], "runs/a: settings are for --live only"),
        (["--live", "1"], "--live: give a config"),
        (["--mtbf", "soon"], "'soon' must be a duration of 0 or more, such as 90, 45min"),
        (["--mtbf=-1h"], "must be a duration"),
        (["--mtbf", "0"], "--mtbf is 0 s: it must be at least 60 s"),
        (["--live", "1", "x.yaml", "--kill-every", "0"], "--kill-every is 0 s: it must be at least 1 s"),
        (["--output", "none/a.json"], "is not a writable folder"),
        (["--from", "none"], "error: none/events/rank-0.jsonl cannot be read"),
        (["--cluster", "none.yaml"], "none.yaml: there is no such file; those in configs/cluster are"),
        (["--cluster", str(CLUSTER), "--nodes", "65"], "8xh100-infiniband.yaml has nodes: 64; change it there"),
        (["--nodes", "9"], "--nodes: give --cluster, such as"),
        (["--slowdown", "2", *QUICK], "slowdown is 2.0: it must be below 1"),
        (["--markdown", "pyproject.toml"], "--markdown pyproject.toml: pyproject.toml cannot be read"),
    ],
    ids=[str(i) for i in range(13)],
)
def test_the_tool_refuses_what_it_cannot_use(tool: Callable, arguments: list[str], message: str) -> None:
    code, _, errors = tool(*arguments)
    assert code == 2
    assert message in errors


def test_help_comes_at_once() -> None:
    code = "import sys, goodput\ntry: goodput.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--kill-every" in done.stdout
