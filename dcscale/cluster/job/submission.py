"""What ``launch/slurm/submit.py`` submits: a job script, a config for each task of an array, and a copy of the code."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcscale.cluster.job.slurm import in_queue
from dcscale.config import Config, ConfigError, check_config, load_arguments, raise_problems, to_yaml
from dcscale.files import parse_json, replace_folder, sha256_of, write_atomically, write_json
from dcscale.provenance import REVISION, ROOT, git_revision

CODE, JOBS, JOB_SCRIPT = "code", "jobs.json", "job.sbatch"
"""In the folder of a run or an array: the copy of the code, so that a start days later runs what was submitted; its
jobs; and in the copy the job script."""

SETUP = "code=$SLURM_SUBMIT_DIR python=python task=(python)"
"""The line of the job script that says what it runs."""

NOT_RUN = "# --container: for pyxis and enroot; this line is rendered as documented, and has not been run."
_FOLDERS = ("dcscale", "launch")
_MOST_NAMED = 5
_SAFE = re.compile(r"[\w.,:;%@=+/*\[\]?&|()~-]+")


class SubmissionError(ValueError):
    """A job cannot be submitted so."""


@dataclass(frozen=True)
class Resources:
    """What sbatch is asked for; an empty text or None leaves it to the job script or to SLURM."""

    nodes: int = 1
    gpus: int = 8
    """Of each node; one task each. 0: one task on each node, without a GPU."""

    cpus: int | None = None
    """Of each task."""

    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    dependency: str = ""
    container: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * max(1, self.gpus)

    def options(self, array: str = "") -> dict[str, str]:
        """Options of sbatch by name.

        Raises:
            SubmissionError: a value is not what SLURM takes, or could end the line of the script.
        """
        values = {
            "nodes": str(self.nodes),
            "gpus-per-node": str(self.gpus) if self.gpus else "",
            "ntasks-per-node": str(max(1, self.gpus)),
            "cpus-per-task": str(self.cpus or (8 if self.gpus else 1)),
            **{name: getattr(self, name) for name in ("time", "partition", "account", "qos", "dependency")},
            "array": array,
        }
        for name, value in values.items():
            if value and not _SAFE.fullmatch(value):
                raise SubmissionError(f"--{name} {value!r}: sbatch takes letters, digits and {r'.,:;%@=+/*[]?&|()~-'}")
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Task:
    """One run of a submission."""

    config: Config

    name: str
    """Of its folder in that of the array; empty for the only run of a job."""

    config_file: str
    """Name of its resolved config in the copy of the code."""


def parse_array(text: str) -> tuple[list[int], str]:
    """The task numbers that SLURM's ``0-6:2,9%4`` means, and its limit of tasks at a time, ``%4`` here or empty.

    Raises:
        SubmissionError: it is not of this form, or names a number twice.
    """
    numbers, percent, most = text.partition("%")
    found: list[int] = []
    for part in numbers.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7})(?::([1-9]\d{0,6}))?)?", part)
        if match is None:
            break
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1, int(match[3] or 1))
    else:
        if found and len(set(found)) == len(found) and (not percent or re.fullmatch(r"[1-9]\d*", most)):
            return sorted(found), f"%{most}" if percent else ""
    raise SubmissionError(f"--array {text}: must be numbers and ranges, such as 0-6:2,9 or 0-99%8, each number once")


def parse_sweep(text: str) -> list[str]:
    """``key=a,b,c`` as ``["key=a", "key=b", "key=c"]``. Commas within brackets or quotes do not divide.

    Raises:
        SubmissionError: it is not of this form, or has a value twice.
    """
    key, equals, rest = text.partition("=")
    values, depth, quote = [""], 0, ""
    for character in rest:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not values[-1].strip():
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not quote and depth == 0:
            values.append("")
        else:
            values[-1] += character
    if not key or not equals or "" in values or len(set(values)) < len(values):
        raise SubmissionError(f"--sweep {text}: must be key=value,value,... with each value once")
    return [f"{key}={value}" for value in values]


def make_tasks(settings: Sequence[str], world_size: int, sweeps: Sequence[str], array: str) -> dict[int, Task]:
    """The runs of a submission by task number; number 0 alone without ``sweeps`` and ``array``.

    Args:
        settings: arguments of launch/train.py; in those of an array, ``%a`` stands for the task number.
        world_size: ranks of each run.
        sweeps: ``key=value,value,...``; several make all combinations, the last one varies fastest.
        array: which task numbers, in SLURM's form; empty for all of ``sweeps``.

    Raises:
        SubmissionError: of :func:`parse_sweep` and :func:`parse_array`, and if tasks would share a folder.
        ConfigError: the config of a task is invalid; says of which.
    """
    if not sweeps and not array:
        return {0: Task(_check(settings, world_size), "", "config.yaml")}
    choices = list(itertools.product(*map(parse_sweep, sweeps)))
    numbers = parse_array(array)[0] if array else list(range(len(choices)))
    if sweeps and numbers[-1] >= len(choices):
        raise SubmissionError(f"--array {array}: the sweep has the tasks 0 to {len(choices) - 1}")
    tasks: dict[int, Task] = {}
    for number in numbers:
        swept = choices[number] if sweeps else ()
        try:
            config = _check([s.replace("%a", str(number)) for s in (*settings, *swept)], world_size)
        except ConfigError as error:
            words = f" ({', '.join(swept)})" if swept else ""
            raise SubmissionError(f"task {number}{words}: {error}") from error
        values = [f"{setting.partition('=')[0].rpartition('.')[2]}={setting.partition('=')[2]}" for setting in swept]
        name = re.sub(r"[^A-Za-z0-9.=+_-]+", "_", "-".join([str(number), *values]))[:120]
        tasks[number] = Task(config, name, f"config-{number}.yaml")
    folders = {task.config.run.folder for task in tasks.values()}
    if len(folders) > 1:
        raise SubmissionError(
            f"run.folder is {' and '.join(sorted(folders)[:2])} in two tasks: it must be the same in all, since each "
            "gets a folder of its own in it"
        )
    return {number: replace(task, config=_in_folder(task)) for number, task in tasks.items()}


def _check(settings: Sequence[str], world_size: int) -> Config:
    loaded = load_arguments(settings)
    raise_problems(check_config(loaded.config, world_size), loaded.origins)
    return loaded.config


def _in_folder(task: Task) -> Config:
    run = task.config.run
    return replace(task.config, run=replace(run, folder=str(Path(run.folder) / task.name)))


def folder_of(tasks: dict[int, Task]) -> Path:
    """The absolute folder of a run, or the one that has those of all tasks of an array.

    Raises:
        SubmissionError: SLURM cannot use it.
    """
    first = next(iter(tasks.values()))
    folder = Path(first.config.run.folder).absolute()
    folder = folder.parent if first.name else folder
    if any(character in str(folder) for character in "%\\:") or not str(folder).isprintable():
        raise SubmissionError(
            f"run.folder {str(folder)!r}: must have no %, \\ or line break, which SLURM does not take in names of "
            "logs, nor a colon, which divides PYTHONPATH; use another folder"
        )
    return folder


def configs_of(tasks: dict[int, Task]) -> dict[str, str]:
    """File name and content of the resolved config of each task."""
    return {task.config_file: to_yaml(task.config) for task in tasks.values()}


def render(template: str, resources: Resources, folder: Path, python: str, array: str = "") -> str:
    """The job script, which runs the copy of the code in ``folder``.

    Args:
        template: text of ``launch/slurm/job.sbatch``.
        resources: replace those of the template.
        folder: of the run or of the array.
        python: the interpreter.
        array: task numbers in SLURM's form.

    Raises:
        SubmissionError: of :meth:`Resources.options`, or the container's mounts cannot be written down.
    """
    options = resources.options(array)
    lines = [line for line in template.splitlines() if not _is_replaced(line, options)]
    at = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    lines[at:at] = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    place = lines.index(SETUP)
    lines[place : place + 1] = _setup(resources.container, folder, python)
    return "\n".join(lines) + "\n"


def _is_replaced(line: str, options: dict[str, str]) -> bool:
    match = re.match(r"#SBATCH --([a-z-]+)=", line)
    # The name and the log are given on the command line, which takes any character.
    return match is not None and match[1] in {*options, "gpus-per-node", "job-name", "output"}


def _setup(container: str, folder: Path, python: str) -> Iterator[str]:
    task = [python]
    if container:
        mounts = [str(folder), str(Path.cwd())]
        if bad := [path for path in mounts if "," in path or ":" in path]:
            raise SubmissionError(f"--container: {bad[0]} cannot be mounted, since it has a comma or colon in its name")
        yield NOT_RUN
        task = [
            f"--container-image={container}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
            f"--container-workdir={mounts[1]}",
            "python",
        ]
    yield f"code={shlex.quote(str(folder / CODE))} python={shlex.quote(python)} task=({shlex.join(task)})"


def sbatch_command(tasks: dict[int, Task], folder: Path, more: Sequence[str]) -> list[str]:
    """The command that submits the rendered script; no shell reads it."""
    single = "" in {task.name for task in tasks.values()}
    run_name = next(iter(tasks.values())).config.run.name
    return [
        "sbatch",
        "--parsable",
        f"--job-name={run_name}",
        f"--output={folder}/slurm-{'%j' if single else '%A_%a'}.log",
        *more,
        str(folder / CODE / JOB_SCRIPT),
        str(folder / CODE / ("config.yaml" if single else "config-%a.yaml")),
    ]


# -- the copy of the code ----------------------------------------------------------------------------------------------


def copy_code(folder: Path, configs: Mapping[str, str], queued: Callable[[str], str | None] = in_queue) -> str:
    """Copies the package, ``launch/`` and configs to ``folder/code``, atomically; returns a line for the user.

    An earlier copy is used again if it is the same, and replaced if it is not and no job in the queue uses it.

    Args:
        folder: folder of a run, or of the runs of an array.
        configs: file name and content of the resolved configs.
        queued: state of a job, None if it has ended.

    Raises:
        SubmissionError: a job in the queue uses another copy, or :func:`read_jobs`.
    """
    target = folder / CODE
    sources = {str(path.relative_to(ROOT)): path for name in _FOLDERS for path in _files(ROOT / name)}
    jobs = [job["job_id"] for job in read_jobs(folder)]
    if not target.exists():
        _write(target, sources, configs)
        return f"{target}: a copy of {ROOT}, which the job runs"
    changed = _changed(target, sources, configs)
    if not changed:
        return f"{target}: the same as before" + (f", of job {jobs[-1]}" if jobs else "")
    more = len(changed) - _MOST_NAMED
    names = ", ".join(changed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    for job in jobs[::-1]:
        if (state := queued(job)) is not None:
            raise SubmissionError(
                f"job {job} ({state}) runs the code in {target}, and its next start would run other files: {names}. "
                f"Wait for its end, or `scancel {job}`, or use another run.folder"
            )
    _write(target, sources, configs)
    return f"{target}: replaces the copy of earlier jobs, which have ended; other files: {names}"


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc"]


def _changed(target: Path, sources: Mapping[str, Path], configs: Mapping[str, str]) -> list[str]:
    """Names of files that are other, new or missing in a copy; but for the job script, of which SLURM has its own."""
    old = {str(path.relative_to(target)): path for path in _files(target)}
    old = {name: path for name, path in old.items() if name not in (JOB_SCRIPT, REVISION)}
    other = [name for name, text in configs.items() if name not in old or old[name].read_text() != text]
    other += [name for name, path in sources.items() if name not in old or sha256_of(old[name]) != sha256_of(path)]
    return sorted({*other, *(old.keys() - sources.keys() - configs.keys())})


def _write(target: Path, sources: Mapping[str, Path], configs: Mapping[str, str]) -> None:
    with replace_folder(target) as copy:
        for name, path in sources.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / name)
        for name, text in configs.items():
            # An address of data may have a password in it, which the config.yaml of a run leaves out.
            descriptor = os.open(copy / name, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        if (revision := git_revision()) is not None:
            write_json(copy / REVISION, revision)


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted for a folder, oldest first: ``job_id``, ``time``, ``command``.

    Raises:
        SubmissionError: ``jobs.json`` is malformed.
    """
    path = folder / JOBS
    if not path.exists():
        return []
    try:
        jobs = parse_json(path.read_bytes(), path)
    except (OSError, ValueError) as error:
        raise SubmissionError(f"{error}; if no job uses {folder}, remove the file") from error
    if not isinstance(jobs, list) or not all(
        isinstance(job, dict) and isinstance(job.get("job_id"), str) and job["job_id"].isdecimal() for job in jobs
    ):
        raise SubmissionError(f"{path} must be a list of jobs with a job_id; if no job uses {folder}, remove the file")
    return jobs


def record_job(folder: Path, job_id: str, time: str, command: list[str]) -> None:
    """Adds a job to ``folder/jobs.json``."""
    jobs = [*read_jobs(folder), {"job_id": job_id, "time": time, "command": command}]
    write_atomically(folder / JOBS, json.dumps(jobs, indent=2) + "\n")
