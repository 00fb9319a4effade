"""launch/slurm/submit.py: what it checks, renders, copies and submits. SLURM's commands are small scripts here."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dcscale.cluster.job import submission
from dcscale.cluster.job.submission import (
    Resources,
    SubmissionError,
    configs_of,
    copy_code,
    folder_of,
    make_tasks,
    parse_array,
    parse_sweep,
    read_jobs,
    record_job,
    render,
)
from dcscale.config import ConfigError, load_config
from dcscale.provenance import REVISION, git_revision

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "launch/slurm/job.sbatch").read_text()
DATA = ("data.train=x", "validation.interval=0")
AWKWARD = "a b 'c' \"d\" {e,f} $HOME $(g) `h` & ; * \\ #i"


def options_of(script):
    """Options in the header of a job script."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(word.removeprefix("--").partition("=")[::2] for line in lines for word in line.split())


# -- the job script ---------------------------------------------------------------------------------------------------


def test_the_job_script_is_short_and_valid():
    assert len(TEMPLATE.splitlines()) <= 40
    assert "MASTER" not in TEMPLATE
    assert subprocess.run(["bash", "-n", ROOT / "launch/slurm/job.sbatch"], check=False).returncode == 0


def test_what_is_asked_for_is_in_the_header():
    resources = Resources(4, 2, 6, "12:00:00", "main", "lab", "high", "singleton")
    found = options_of(render(TEMPLATE, resources, Path("/runs/a"), "/venv/python", "0-3%2"))
    assert found == {
        "nodes": "4",
        "gpus-per-node": "2",
        "ntasks-per-node": "2",
        "cpus-per-task": "6",
        "time": "12:00:00",
        "partition": "main",
        "account": "lab",
        "qos": "high",
        "dependency": "singleton",
        "array": "0-3%2",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@180",
    }


def test_without_gpus_there_is_one_task_a_node():
    found = options_of(render(TEMPLATE, Resources(2, 0), Path("/runs/a"), "python"))
    assert (found["nodes"], found["ntasks-per-node"], found["cpus-per-task"]) == ("2", "1", "1")
    assert "gpus-per-node" not in found
    assert found["time"] == "24:00:00"  # of the template


@pytest.mark.parametrize("value", ["main; rm", "a\n#SBATCH --uid=0", 'a"', "a#b", "$(x)"])
def test_a_value_cannot_add_to_the_script(value):
    with pytest.raises(SubmissionError, match="--partition"):
        render(TEMPLATE, Resources(partition=value), Path("/runs/a"), "python")


def test_the_container_is_rendered_and_marked_as_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = render(TEMPLATE, Resources(container="docker://a b"), Path("/runs/a b"), "/venv/python")
    assert "rendered as documented, and has not been run" in script
    setup = next(line for line in script.splitlines() if line.startswith("code="))
    program = f'{setup}; printf "%s\\n" "$code" "$python" "${{task[@]}}"'
    words = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == [
        "/runs/a b/code",
        "/venv/python",
        "--container-image=docker://a b",
        f"--container-mounts=/runs/a b:/runs/a b,{tmp_path}:{tmp_path}",
        f"--container-workdir={tmp_path}",
        "python",
    ]
    with pytest.raises(SubmissionError, match=r"/runs/a:b cannot be mounted"):
        render(TEMPLATE, Resources(container="x"), Path("/runs/a:b"), "python")


def run_script(script, tmp_path, arguments, environment=None):
    """Runs a job script with an srun and a python that write their arguments down; returns these."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    file = repr(str(tmp_path / "words"))
    recorder = f"#!{sys.executable}\nimport json, sys\nopen({file}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    for name, code in (("srun", 75), ("python", 3)):
        (tools / name).write_text(f"{recorder}sys.exit({code})\n")
        (tools / name).chmod(0o755)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "/some where", **(environment or {})}
    done = subprocess.run(["bash", "-c", script, "job", *arguments], env=variables, check=False)
    words = [json.loads(line) for line in (tmp_path / "words").read_text().splitlines()]
    (tmp_path / "words").unlink()
    return done.returncode, words


def test_by_hand_arguments_arrive_unchanged_and_the_decision_ends_it(tmp_path):
    arguments = ["a b.yaml", f"run.name={AWKWARD}", "train.seed=%a"]
    code, (srun, python) = run_script(TEMPLATE, tmp_path, arguments)
    assert code == 3
    assert srun == ["--kill-on-bad-exit=1", "--wait=30", "python", "/some where/launch/train.py", *arguments]
    assert python[:5] == ["-m", "dcscale.cluster.restarts", "--code", "75", "--started"]
    assert python[6:] == arguments


def test_packages_of_the_user_are_found_after_the_code(tmp_path):
    script = TEMPLATE.replace("srun --kill", "printenv PYTHONPATH >&2; srun --kill")
    for packages, path in (("", "/some where"), ("/modules/a:/modules/b", "/some where:/modules/a:/modules/b")):
        variables = {**os.environ, "SLURM_SUBMIT_DIR": "/some where", "PYTHONPATH": packages}
        done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[0] == path


def test_a_task_of_an_array_has_its_number_in_its_arguments(tmp_path):
    variables = {"SLURM_ARRAY_TASK_ID": "7"}
    _, (srun, python) = run_script(TEMPLATE, tmp_path, ["c-%a.yaml", "x=%a&%a%b"], variables)
    assert srun[-2:] == python[-2:] == ["c-7.yaml", "x=7&7%b"]


def test_a_rendered_script_runs_the_copy(tmp_path):
    folder = Path("/runs") / "a b'$x"
    _, (srun, _) = run_script(render(TEMPLATE, Resources(), folder, "python"), tmp_path, ["config.yaml"])
    assert srun[2:] == ["python", f"{folder}/code/launch/train.py", "config.yaml"]


# -- arrays and sweeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers", "limit"),
    [("0", [0], ""), ("0-3", [0, 1, 2, 3], ""), ("7,0-4:2%3", [0, 2, 4, 7], "%3")],
)
def test_numbers_of_an_array(text, numbers, limit):
    assert parse_array(text) == (numbers, limit)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "0-3:0", "1%", "1%0", "0-3%2%2", "-1", "99999999"])
def test_a_wrong_array_is_refused(text):
    with pytest.raises(SubmissionError, match="must be numbers and ranges"):
        parse_array(text)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("train.seed=1,2", ["train.seed=1", "train.seed=2"]),
        ("model.windows=[8,null],[null]", ["model.windows=[8,null]", "model.windows=[null]"]),
        ('run.name="a,b",c\'d', ['run.name="a,b"', "run.name=c'd"]),
        ("train.seed=1", ["train.seed=1"]),
    ],
)
def test_values_of_a_sweep(text, settings):
    assert parse_sweep(text) == settings


@pytest.mark.parametrize("text", ["train.seed", "=1,2", "train.seed=", "train.seed=1,,2", "train.seed=1,1"])
def test_a_wrong_sweep_is_refused(text):
    with pytest.raises(SubmissionError, match="must be key=value,value"):
        parse_sweep(text)


def test_a_sweep_has_a_run_for_each_combination():
    sweeps = ["optimizer.learning_rate=1e-3,3e-4", "model.windows=[8],[null]"]
    tasks = make_tasks(["run.folder=runs/s", *DATA], 1, sweeps, "")
    assert [task.name for task in tasks.values()] == [
        "0-learning_rate=1e-3-windows=_8_",
        "1-learning_rate=1e-3-windows=_null_",
        "2-learning_rate=3e-4-windows=_8_",
        "3-learning_rate=3e-4-windows=_null_",
    ]
    assert tasks[3].config.run.folder == "runs/s/3-learning_rate=3e-4-windows=_null_"
    assert (tasks[3].config.optimizer.learning_rate, tasks[3].config.model.windows) == (3e-4, [None])
    assert folder_of(tasks) == Path.cwd() / "runs/s"
    assert list(make_tasks([*DATA], 1, sweeps, "1,3%1")) == [1, 3]


def test_an_array_without_a_sweep_has_its_numbers_in_the_values():
    tasks = make_tasks(["run.folder=runs/s", *DATA, "train.seed=%a"], 1, [], "4-5")
    assert {number: (task.config.train.seed, task.config.run.folder) for number, task in tasks.items()} == {
        4: (4, "runs/s/4"),
        5: (5, "runs/s/5"),
    }


@pytest.mark.parametrize(
    ("settings", "sweeps", "array", "message"),
    [
        ([*DATA], ["train.seed=0,1"], "0-2", "the sweep has the tasks 0 to 1"),
        ([*DATA], ["train.seed=1,-1"], "", r"task 1 \(train.seed=-1\): the config has a problem"),
        ([*DATA, "train.seed=1"], ["train.seed=0,1"], "", "is given twice"),
        ([*DATA], ["run.name=a,b"], "", "must be the same in all"),
        ([*DATA, "run.folder=r/%a"], [], "0-1", "must be the same in all"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused(settings, sweeps, array, message):
    with pytest.raises(SubmissionError, match=message):
        make_tasks(settings, 1, sweeps, array)


@pytest.mark.parametrize("folder", ["runs/50%", "runs/a\\b", "runs/a:b"])
def test_a_folder_that_slurm_would_rewrite_is_refused(folder):
    with pytest.raises(SubmissionError, match="must have no %"):
        folder_of(make_tasks([f"run.folder='{folder}'", *DATA], 1, [], ""))


def test_the_number_of_ranks_is_checked():
    with pytest.raises(ConfigError, match="global_batch_size"):
        make_tasks([*DATA, "train.global_batch_size=8"], Resources(3, 2).world_size, [], "")


def test_values_arrive_unchanged_in_the_resolved_config(tmp_path):
    tasks = make_tasks([*DATA, f"samples.prompts={json.dumps([AWKWARD])}"], 1, [], "")
    assert tasks[0].config.samples.prompts == [AWKWARD]
    (tmp_path / "config.yaml").write_text(configs_of(tasks)["config.yaml"])
    assert load_config([tmp_path / "config.yaml"]).config == tasks[0].config


# -- the copy of the code ---------------------------------------------------------------------------------------------


def none_queued(job):
    return None


@pytest.fixture
def small_root(tmp_path_factory, monkeypatch):
    """A checkout with two files, which is copied in a moment."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("dcscale/__init__.py", "launch/train.py"):
        (root / name).parent.mkdir()
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr(submission, "ROOT", root)


def test_the_copy_has_package_launch_and_config(tmp_path):
    line = copy_code(tmp_path, {"config.yaml": "secret"}, none_queued)
    assert "a copy of" in line
    code = tmp_path / "code"
    for name in ("dcscale/train/trainer.py", "launch/train.py", "launch/slurm/job.sbatch"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert (code / "config.yaml").stat().st_mode & 0o777 == 0o600  # an address in it may have a password
    assert not list(code.rglob("__pycache__"))
    assert git_revision(code) == git_revision()
    (code / REVISION).write_text("[]")
    assert git_revision(code) is None
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_the_second_submission_says_what_it_does(tmp_path, small_root):
    copy_code(tmp_path, {"config.yaml": "a"}, none_queued)
    assert copy_code(tmp_path, {"config.yaml": "a"}, none_queued).endswith("the same as before")
    record_job(tmp_path, "17", "2026-11-27T03:00:00+00:00", ["sbatch"])
    assert copy_code(tmp_path, {"config.yaml": "a"}, none_queued).endswith("the same as before, of job 17")
    (tmp_path / "code/dcscale/old.py").write_text("")
    (tmp_path / "code/launch/train.py").write_text("")
    with pytest.raises(SubmissionError, match=r"job 17 \(PENDING\) runs the code .*config.yaml, dcscale/old.py"):
        copy_code(tmp_path, {"config.yaml": "b"}, lambda job: "PENDING")
    assert (tmp_path / "code/config.yaml").read_text() == "a"
    line = copy_code(tmp_path, {"config.yaml": "b"}, none_queued)
    assert line.endswith("other files: config.yaml, dcscale/old.py, launch/train.py")
    assert (tmp_path / "code/config.yaml").read_text() == "b"
    assert not (tmp_path / "code/dcscale/old.py").exists()


@pytest.mark.parametrize("content", ["{", "{}", '["a"]', '[{"job_id": 17}]', '[{"job_id": "17;x"}]'])
def test_a_malformed_list_of_jobs_is_described(tmp_path, content):
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(SubmissionError, match=r"jobs\.json .*remove the file"):
        read_jobs(tmp_path)


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture
def submit(tmp_path, monkeypatch, small_root):
    """submit.py's main, with an sbatch that writes its arguments down."""
    specification = importlib.util.spec_from_file_location("submit", ROOT / "launch/slurm/submit.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("sbatch", f'printf "%s\\0" "$@" > {tmp_path}/words; echo "17;cluster"'), ("squeue", "")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return module.main


def words(tmp_path):
    return (tmp_path / "words").read_text().split("\0")[:-1]


def test_submitting(submit, tmp_path, capsys):
    folder = tmp_path / "r u'n$"
    name = "a $b"
    settings = [f"run.folder={json.dumps(str(folder))}", f"run.name={name}", *DATA]
    assert submit([*settings, "--nodes=2", "--gpus=4", "--sbatch=--mem=0"]) == 0
    script, config = f"{folder}/code/job.sbatch", f"{folder}/code/config.yaml"
    assert words(tmp_path) == [
        "--parsable",
        f"--job-name={name}",
        f"--output={folder}/slurm-%j.log",
        "--mem=0",
        script,
        config,
    ]
    assert options_of(Path(script).read_text())["gpus-per-node"] == "4"
    assert load_config([config]).config.run.name == name
    out = capsys.readouterr().out
    assert "submitted  job 17\n" in out
    assert f"follow     tail -F {shlex.quote(f'{folder}/slurm-17.log')}\n" in out
    assert "scancel 17" in out
    assert [job["job_id"] for job in read_jobs(folder)] == ["17"]


def test_submitting_a_sweep(submit, tmp_path, capsys):
    assert submit(["run.folder=s", *DATA, "--sweep=train.seed=1,2", "--array=0-1%1"]) == 0
    assert words(tmp_path)[-1] == f"{tmp_path}/s/code/config-%a.yaml"
    assert f"--output={tmp_path}/s/slurm-%A_%a.log" in words(tmp_path)
    assert options_of((tmp_path / "s/code/job.sbatch").read_text())["array"] == "0,1%1"
    configs = [load_config([tmp_path / f"s/code/config-{n}.yaml"]).config for n in (0, 1)]
    assert [(c.train.seed, c.run.folder) for c in configs] == [(1, "s/0-seed=1"), (2, "s/1-seed=2")]
    out = capsys.readouterr().out
    assert "job 17, an array of 2 runs" in out
    assert "tools/status.py s/0-seed=1 s/1-seed=2" in out


def test_a_dry_run_changes_nothing(submit, tmp_path, capsys):
    assert submit(["run.folder=s", *DATA, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/usr/bin/env bash\n")
    assert out.rstrip().splitlines()[-1].startswith("sbatch --parsable")
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=1"], "did you mean"),
        ([*DATA, "--nodes=3"], "train.global_batch_size"),
        ([*DATA, "--time=1 h"], "--time"),
        (["none.yaml"], "there is no such file"),
        ([*DATA, "--unknown"], "is not an option"),
    ],
)
def test_what_does_not_fit_is_not_submitted(submit, tmp_path, capsys, arguments, message):
    assert submit(["run.folder=s", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]


def test_a_refusal_of_slurm_is_shown(submit, tmp_path, capsys):
    (tmp_path / "tools/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2\nexit 1\n")
    assert submit(["run.folder=s", *DATA, "--partition=x"]) == 1
    assert "sbatch: error: invalid partition: x" in capsys.readouterr().err
    assert read_jobs(tmp_path / "s") == []
