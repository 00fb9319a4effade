"""Submits a run to SLURM, or a sweep of runs as one job array.

    python launch/slurm/submit.py CONFIG.yaml ... [key=value ...] --nodes 4 --gpus 8 --time 24:00:00
    python launch/slurm/submit.py CONFIG.yaml --sweep optimizer.learning_rate=1e-3,3e-4 --sweep train.seed=0,1
    python launch/slurm/submit.py CONFIG.yaml train.seed=%a --array 0-9%2

Checks the config, copies the package, launch/ and the resolved config to RUN/code, and submits launch/slurm/job.sbatch
to run that copy, now and in all later starts. Each run of an array gets a folder of its own in run.folder, named by
task number and values; the copy is in run.folder itself. Relative paths are relative to the current folder.

Exit code: 0 submitted, 1 SLURM has refused it, 2 the config or an option does not fit.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

from dcscale.cli import whole_number, whole_number_from_0
from dcscale.cluster.job.slurm import SlurmError, job_number, run_command
from dcscale.cluster.job.submission import (
    CODE,
    JOB_SCRIPT,
    Resources,
    SubmissionError,
    Task,
    configs_of,
    copy_code,
    folder_of,
    make_tasks,
    parse_array,
    record_job,
    render,
    sbatch_command,
)
from dcscale.config import ConfigError
from dcscale.files import write_atomically

TEMPLATE = Path(__file__).with_name("job.sbatch")
REFUSED, UNFIT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="CONFIG.yaml|key=value", help="as for launch/train.py")
    parser.add_argument("--nodes", type=whole_number, default=1, metavar="N", help="nodes of each run (default 1)")
    parser.add_argument(
        "--gpus",
        type=whole_number_from_0,
        default=8,
        metavar="N",
        help="GPUs of each node, with a task each (default 8); 0: one task on each node, without a GPU",
    )
    parser.add_argument("--cpus", type=whole_number, metavar="N", help="CPUs of each task (default 8; 1 without GPUs)")
    parser.add_argument("--time", default="", help="time limit of each start (default 24:00:00); the run resumes")
    for name, meaning in (("partition", "partition"), ("account", "account"), ("qos", "quality of service")):
        parser.add_argument(f"--{name}", default="", help=f"SLURM's {meaning}")
    parser.add_argument("--dependency", default="", help="such as singleton or afterok:17")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="one run for each value; several options make all combinations",
    )
    parser.add_argument(
        "--array",
        default="",
        metavar="SPEC",
        help="tasks of the array, such as 0-9%%2 (two at a time): of the sweep, or with %%a for the number in values",
    )
    parser.add_argument("--container", default="", metavar="IMAGE", help="srun's --container-image (pyxis); not tried")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further option of sbatch, as --sbatch=--mem=0"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command, and change nothing")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    names = ("nodes", "gpus", "cpus", "time", "partition", "account", "qos", "dependency", "container")
    resources = Resources(**{name: getattr(options, name) for name in names})
    try:
        tasks = make_tasks([*options.settings, *unknown], resources.world_size, options.sweep, options.array)
        folder, array = folder_of(tasks), ""
        if options.sweep or options.array:
            limit = parse_array(options.array)[1] if options.array else ""
            array = ",".join(map(str, tasks)) + limit
        script = render(TEMPLATE.read_text(), resources, folder, sys.executable, array)
        command = sbatch_command(tasks, folder, options.sbatch)
        if options.dry_run:
            print(f"{script}\n{shlex.join(command)}")
            return 0
        return submit(tasks, folder, script, command)
    except (ConfigError, SubmissionError) as error:
        print(error, file=sys.stderr)
        return UNFIT
    except SlurmError as error:
        print(f"not submitted: {error}", file=sys.stderr)
        return REFUSED


def submit(tasks: dict[int, Task], folder: Path, script: str, command: list[str]) -> int:
    """Copies the code, submits the job, and prints how to follow it."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"code       {copy_code(folder, configs_of(tasks))}")
    write_atomically(folder / CODE / JOB_SCRIPT, script)
    job = job_number(run_command(*command))
    record_job(folder, job, datetime.now(timezone.utc).isoformat(timespec="seconds"), command)
    runs = [shlex.quote(task.config.run.folder) for task in tasks.values()]
    single = len(runs) == 1 and not next(iter(tasks.values())).name
    log = f"{folder}/slurm-{job}"
    log = shlex.quote(f"{log}.log") if single else f"{shlex.quote(log)}_*.log"
    print(f"submitted  job {job}" if single else f"submitted  job {job}, an array of {len(runs)} runs")
    print(f"follow     tail -F {log}")
    print(f"           python tools/status.py {' '.join(runs)}")
    print(f"           squeue --job {job}")
    print(f"end        scancel {job}  (for good, with a checkpoint; the same command as now resumes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
