"""Files of runs that are large, being written, malformed or no files: nothing is raised, and each is named."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from run_folders import NOW, RunFolder, status_of, training

from dcscale.cluster.status import State, page, read_status, run_files, table
from dcscale.cluster.status.run_files import lines_backwards
from dcscale.config import load_config, to_yaml


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "code").mkdir()  # so that it is a run
    return folder


def test_a_line_that_is_being_written_is_left_out(run: RunFolder) -> None:
    training(run)
    for name in ("metrics.jsonl", "events/rank-0.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 41, "los')
    status = status_of(run)
    assert (status.step, status.problems) == (40, [])


def test_lines_that_are_no_records_are_counted(run: RunFolder) -> None:
    run.records(1).file(
        "metrics.jsonl", b'{"step": 1, "loss": 4.0}\n[1]\n\xff\n{"step": true}\n{"step": 2, "loss": "nan"}\n'
    )
    status = status_of(run)
    assert (status.step, status.loss) == (2, 4.0)
    assert status.problems == [f"{run.path}/metrics.jsonl: 3 lines are left out: it has no integer 'step'"]


def test_of_a_large_file_the_end_is_read(run: RunFolder) -> None:
    run.records(1, validation_loss=9.0)
    with (run.path / "metrics.jsonl").open("r+b") as file:
        file.seek(3 << 30)  # sparse: takes no space
        file.write(b"\n")
    run_records = "".join(json.dumps({"step": step, "loss": 3.0}) + "\n" for step in range(1, 1001))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(run_records)
    tracemalloc.start()
    status = status_of(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status.step, status.validation_loss) == (1000, None)
    assert peak < 64 << 20


def test_the_last_validation_is_found_far_back(run: RunFolder) -> None:
    run.records(7, validation_loss=4.5).records(*range(8, 1000), padding="x" * 2000)
    assert (run.path / "metrics.jsonl").stat().st_size > 2 * run_files.MOST_BYTES * 0.9
    status = status_of(run)
    assert (status.validation_step, status.validation_loss) == (7, 4.5)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"abc", []),
        (b"\n", [b""]),
        (b"ab\ncd\n", [b"cd", b"ab"]),
        (b"ab\n\ncdefgh\nxy", [b"cdefgh", b"", b"ab"]),
    ],
)
def test_lines_come_backwards_whatever_is_read_at_once(
    tmp_path: Path, block: int, content: bytes, lines: list[bytes]
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    assert list(lines_backwards(path, 1000, block)) == lines


def test_of_a_part_of_a_file_only_complete_lines_come(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"ab\ncd\nef\n")
    assert list(lines_backwards(path, 5)) == [b"ef"]


NAMES = ("config.yaml", "metrics.jsonl", "ending.json", "lease.json", "summary.json", "restarts.json")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("name", [*NAMES, "events/rank-0.jsonl"])
def test_what_is_no_file_is_a_problem(run: RunFolder, name: str, kind: str) -> None:
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    (problem,) = status_of(run).problems
    assert problem.startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("name", ["checkpoints", "hangs", "events"])
def test_what_is_no_folder_is_a_problem(run: RunFolder, name: str) -> None:
    (problem,) = status_of(run.file(name, "text")).problems
    assert problem.startswith(f"{run.path / name}")
    assert problem.endswith("Not a directory")


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1' + b"0" * 400 + b"}", b" " * 2**21]
)
@pytest.mark.parametrize("name", NAMES)
def test_malformed_files_are_problems(run: RunFolder, name: str, content: bytes) -> None:
    status = status_of(run.file(name, content + b"\n" * (name == "metrics.jsonl")))
    if name == "metrics.jsonl" and not content:
        assert status.problems == [
            f"{run.path / name}: a line is left out: the line cannot be read: it is not JSON: "
            "Expecting value: line 1 column 1 (char 0)"
        ]
    elif (name, content) != ("metrics.jsonl", b" " * 2**21):
        assert len(status.problems) == 1, status.problems
        assert str(run.path / name) in status.problems[0]


@pytest.mark.parametrize(
    "content", ["train: [1, 2]\n", "- 1\n", "train:\n  steps: many\n", "steps: 7\n", "  steps: 7\n"]
)
def test_a_config_without_steps_is_a_problem(run: RunFolder, content: str) -> None:
    status = status_of(training(run).file("config.yaml", content))
    assert status.steps is None
    assert "progress   40 steps, of a number that is not known" in page(status)
    assert status.problems == [
        f"{run.path}/config.yaml has no train.steps: is it the config of a run, as the run has written it?"
    ]


def test_settings_are_read_as_they_are_written(run: RunFolder) -> None:
    config = load_config([], ['run.folder="/a b/c: d"', "train.steps=12345", "validation.interval=7"]).config
    files = run_files.RunFiles(run.file("config.yaml", to_yaml(config)).path)
    settings = files.config()
    names = ("run.folder", "train.steps", "validation.interval", "parallel.pause_timeout_minutes", "samples.interval")
    assert [settings[name] for name in names] == ["/a b/c: d", "12345", "7", "30.0", "0"]
    assert files.problems == []


STRANGE = [
    None,
    True,
    -1,
    0.5,
    float("nan"),
    1e308,
    10**200,
    "0001-01-01T00:00:00+23:59",
    "",
    "\x1b[2J\n\ud800",
    "9" * 5000,
    [],
    [[1]],
    {},
    {"a": {}},
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: repr(value)[:20])
def test_values_of_any_type_raise_nothing_and_cannot_control_the_terminal(run: RunFolder, strange: Any) -> None:
    training(run).ending(76, 5).lease(1, 210).restarts("stop", 3)
    run.file("summary.json", '{"completed": true, "steps": 100}').event("straggler", 3, rank=0, excess=1)
    for name in (*NAMES[2:], "metrics.jsonl", "events/rank-0.jsonl"):
        path = run.path / name
        before = path.read_text()
        values = [json.loads(line) for line in (before.splitlines() if name.endswith("l") else [before])]
        for key in {key for value in values for key in value}:
            path.write_text("".join(json.dumps({**value, key: strange}) + "\n" for value in values))
            status = status_of(run)
            text = page(status) + table([status])
            assert "\x1b" not in text
            assert text.encode()
        path.write_text(before)


def test_an_ending_of_another_format_is_a_problem(run: RunFolder) -> None:
    status = status_of(training(run, 100).ending(42, 5))
    assert status.ending is None
    assert status.problems == [
        f"{run.path}/ending.json has format 1 and code 42: this version reads format 1 and the codes 0, 1, 2, 3, 75, "
        "76, 130"
    ]
    assert status_of(run.ending(0, 5, format=2)).problems[0].startswith(f"{run.path}/ending.json has format 2")


def test_a_damaged_lease_is_one_as_long_as_it_is_renewed(run: RunFolder) -> None:
    status = status_of(training(run).file("lease.json", "{", seconds_ago=10))
    assert (status.state, status.lease.holder, status.lease.alive) == (State.RUNNING, "an unknown process", True)
    assert status.problems == [f"{run.path}/lease.json is damaged, so who holds the run is not known"]
    assert status_of(run.file("lease.json", "{", seconds_ago=100)).lease.alive is False


def test_a_clock_that_differs_is_a_problem(run: RunFolder) -> None:
    assert status_of(training(run, -20).lease(-20, 210)).problems == []
    status = status_of(run.event("steps", -90, step=41))
    assert (status.state, status.record_age_seconds) == (State.RUNNING, 0)
    assert status.problems == [
        f"{run.path} has times that are 90 s ahead of the clock of this machine: the state and all ages may be wrong"
    ]


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    status = read_status(tmp_path / "none", NOW)
    assert (status.state, status.problems) == (State.NOT_STARTED, [f"{tmp_path}/none does not exist"])
    (tmp_path / "file").write_text("")
    assert read_status(tmp_path / "file", NOW).problems == [f"{tmp_path}/file is not a folder"]
    status = read_status(RunFolder(tmp_path / "run").checkpoint(7).path / "checkpoints" / "step-00000007", NOW)
    assert status.problems[0].endswith(
        "step-00000007 has nothing of a run: give the folder that is run.folder in its config"
    )
