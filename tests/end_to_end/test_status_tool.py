"""tools/status.py as a user calls it: a page, a table, JSON, and watching until Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, "tools/status.py"]


@pytest.fixture
def call(caller, load_tool):
    return caller(load_tool("status"))


def make_run(path: Path, step: int, code: int | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("train:\n  steps: 100\n")
    (path / "metrics.jsonl").write_text(json.dumps({"step": step, "tokens": 10 * step, "loss": 2.5}) + "\n")
    if code is not None:
        ending = {"format": 1, "code": code, "reason": "why", "step": step, "time": "2026-11-27T00:00:00+00:00"}
        (path / "ending.json").write_text(json.dumps(ending))
    return path


def test_a_run_is_a_page_and_a_folder_of_runs_a_table(tmp_path: Path, call) -> None:
    for name, code in (("run-10", 3), ("run-9", 0)):
        make_run(tmp_path / name, 100, code)
    code, page, errors = call(tmp_path / "run-9")
    assert (code, errors) == (0, "")
    assert page.splitlines()[:4] == [
        f"run        {tmp_path}/run-9",
        "state      done",
        "progress   100 of 100 steps (100.0%), 1,000 tokens",
        "loss       2.5000 over the last 1 record, 2.5000 in the last one",
    ]
    code, table, _ = call(tmp_path)
    assert [line.split()[:2] for line in table.splitlines()] == [
        [str(tmp_path)],
        ["run", "state"],
        ["run-9", "done"],
        ["run-10", "diverged"],
        ["2", "runs:"],
    ]
    assert call(tmp_path / "run-9", tmp_path / "run-10", tmp_path)[1] == table


def test_json_has_everything(tmp_path: Path, call) -> None:
    make_run(tmp_path / "run", 7, 76)
    code, output, _ = call(tmp_path / "run", "--json")
    content = json.loads(output)
    (run,) = content["runs"]
    assert (code, content["format"], run["state"], run["step"], run["done"]) == (0, 1, "resumable", 7, 0.07)
    assert run["ending"]["code"] == 76
    assert run["record"]["tokens"] == 70


def test_a_run_that_is_not_there_is_an_error_after_what_is(tmp_path: Path, call) -> None:
    make_run(tmp_path / "run", 7, 75)
    code, output, errors = call(tmp_path / "run", tmp_path / "none")
    assert (code, errors.startswith(f"error: {tmp_path}/none is no folder: give the folder of a run")) == (2, True)
    assert "1 resumable, 1 not started" in output


def test_an_interval_that_is_none_is_refused(tmp_path: Path, call) -> None:
    code, _, errors = call("--watch", tmp_path)
    assert code == 2
    assert "must be a number above 0, or left out; name runs before --watch" in errors


def test_an_empty_folder_is_a_run_that_has_not_started(tmp_path: Path, call) -> None:
    assert call(tmp_path)[:2] == (0, f"run        {tmp_path}\nstate      not started\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_prints_again_until_ctrl_c(tmp_path: Path, as_json: bool) -> None:
    run = make_run(tmp_path / "run", 7, 75)
    command = [*TOOL, str(run), "--watch", "0.05", *["--json"] * as_json]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        (run / "metrics.jsonl").write_text('{"step": 8}\n')
        (run / "ending.json").unlink()
        while not re.search(r'"step": 8|progress   8', lines[-1]):
            lines.append(process.stdout.readline())
            assert lines[-1]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert "\033" not in "".join(lines) + output
    if as_json:
        assert json.loads(lines[0])["runs"][0]["step"] == 7
    else:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\n", lines[0])


def test_on_a_terminal_the_page_is_drawn_in_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 7, 75)
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    command = [*TOOL, str(run), "--watch", "0.05"]
    with subprocess.Popen(command, cwd=ROOT, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        drawn = b""
        while drawn.count(b"\033[H\033[2J") < 2:
            drawn += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
        try:
            while more := os.read(terminal, 1000):
                drawn += more
        except OSError:  # the other end is closed
            pass
    os.close(terminal)
    assert process.returncode == 0
    assert b"Traceback" not in drawn


def test_a_pipe_that_is_closed_is_no_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 7, 75)
    command = f"{sys.executable} tools/status.py {run} --watch 0.01 | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_it_answers_without_torch_and_what_reads_configs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 7, 75)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: print(ended.code, sorted({'torch', 'omegaconf', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "tools/status.py", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
