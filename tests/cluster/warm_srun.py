"""The ``srun`` of a job script under test: the real one, but its tasks are forked from warm servers (``warm.py``).

A job script finds it first on PATH (``jobs.py``), and so its starts take a second instead of ten, without a change of
it. Takes the job's faults from ``FOLDER/jobs/NAME.json``, and writes what ``task.py`` reads next to it, for each start.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(folder: Path, words: list[str]) -> None:
    os.environ["PATH"] = os.environ["PATH"].partition(":")[2]  # without this srun
    at = next(number for number, word in enumerate(words) if word.endswith("/launch/train.py"))
    name, restart = os.environ["SLURM_JOB_NAME"], os.environ.get("SLURM_RESTART_COUNT", "0")
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    start = folder / "jobs" / f"{name}{task and '-' + task}.start-{restart}.json"
    values = {
        "arguments": {"all": words[at:]},
        "cold": False,
        "faults": json.loads((folder / "jobs" / f"{name}.json").read_text()),
        "environment": {"FAULT_TIMES": str(start.with_suffix(".times"))},
        "servers": str(folder),
    }
    start.write_text(json.dumps(values))
    program, options = words[at - 1], words[: at - 1]
    os.execvp("srun", ["srun", *options, program, str(HERE / "task.py"), str(start)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
