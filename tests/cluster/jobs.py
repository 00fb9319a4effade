"""Jobs that ``launch/slurm/submit.py`` submits to a :class:`nodes.Cluster`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from nodes import HERE, ROOT, Cluster, wait_until

from dcscale.observe import read_metrics


def curve(run: Path) -> list:
    """Step, loss and gradient norm of each record."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run / "metrics.jsonl")]


def warm_srun(cluster: Cluster) -> Path:
    """The folder with the srun of ``warm_srun.py``."""
    program = cluster.folder / "jobs" / "bin" / "srun"
    program.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(HERE / "warm_srun.py"), str(cluster.folder)]
    temporary = program.with_name(f"srun.{threading.get_ident()}")
    temporary.write_text(f'#!/bin/bash\nexec {shlex.join(words)} "$@"\n')
    temporary.chmod(0o755)
    temporary.replace(program)
    return program.parent


class Submitted:
    """A job that was submitted by ``submit.py``, or by sbatch as by hand.

    Args:
        cluster: where.
        run: the run folder; its name is that of the job.
        settings: arguments of ``launch/train.py``, without run.folder and run.name.
        options: further options of ``submit.py``.
        faults: see ``faults.py``; None: the job script's own srun, without warm servers.
        root: the checkout that is submitted.
        by_hand: options of sbatch, which submits the job script of the checkout instead of ``submit.py``.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        settings: Sequence[str],
        *options: str,
        faults: Sequence[dict] | None = (),
        root: Path = ROOT,
        by_hand: Sequence[str] = (),
    ):
        self.cluster, self.run, self.name = cluster, run, run.name
        environment = cluster.environment() | {"PYTHONPATH": str(root)}
        if faults is not None:
            environment["PATH"] = f"{warm_srun(cluster)}:{environment['PATH']}"
            (cluster.folder / "jobs" / f"{self.name}.json").write_text(json.dumps(list(faults)))
        # In YAML's quotes, $ that is not a variable is written with a backslash in a path.
        folder = json.dumps(str(run).replace("$", "\\$"))
        arguments = [*settings, f"run.folder={folder}", f"run.name={json.dumps(self.name)}"]
        if by_hand:
            run.mkdir()
            log = f"--output={run}/slurm-%j.log"
            command = ["sbatch", f"--job-name={self.name}", log, *by_hand, str(root / "launch/slurm/job.sbatch")]
        else:
            command = [sys.executable, str(root / "launch/slurm/submit.py"), "--gpus=0", "--nodes=2", *options]
        done = subprocess.run(
            cluster.command("ctl", *command, *arguments),
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        self.code, self.text = done.returncode, done.stdout + done.stderr
        found = re.search(r"job (\d+)", self.text)
        self.id = found[1] if found else ""
        """SLURM's number of the job; empty if it was refused."""

    @property
    def log(self) -> str:
        path = self.run / f"slurm-{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ask(self, key: str, task: str = "") -> str:
        """A value that SLURM shows of the job, such as JobState."""
        return re.search(rf"\b{key}=(\S+)", self.cluster.slurm("scontrol", "show", "job", "-o", self.id + task))[1]

    def step(self) -> int:
        """The last step that was logged."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def reach(self, step: int, seconds: float = 90) -> None:
        self.wait(lambda: self.step() >= step, seconds, f"step {step}")

    def signal(self, *words: str) -> None:
        """scancel with these options."""
        self.cluster.slurm("scancel", *words, self.id)

    def kill(self, rank: int, restart: int = 0) -> None:
        """Kills a rank of a start."""
        path = self.cluster.folder / "jobs" / f"{self.name}.start-{restart}.pid-{rank}"
        self.cluster.do("node", self.cluster.nodes[rank], "kill", "-KILL", path.read_text(), log=self.name)

    def wait(self, condition, seconds: float, what: str) -> None:
        try:
            wait_until(condition, seconds, f"{what} of {self.name}")
        except TimeoutError as error:
            state = self.cluster.slurm("squeue", "--all")
            raise TimeoutError(f"{error}\n{self.text}\n{state}\n{self.log}") from None

    def end(self, seconds: float = 300, task: str = "") -> str:
        """Waits until the job has ended for good; returns its state and exit code, such as ``COMPLETED 0:0``."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.ask("JobState", task) in final, seconds, "the end")
        return f"{self.ask('JobState', task)} {self.ask('ExitCode', task)}"

    def restarts(self, task: str = "") -> int:
        """How often SLURM has started it again."""
        return int(self.ask("Restarts", task))
