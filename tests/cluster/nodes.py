"""A SLURM of two nodes on this machine (``slurm.sh``), and starts of ``launch/train.py`` on it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def missing() -> str | None:
    """Why no SLURM can be started on this machine; None if it can."""
    if os.geteuid() != 0:
        return "only root can make namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    names = [n for n in ("slurmctld", "slurmd", "srun", "munged", "ip", "nsenter") if not shutil.which(n, path=path)]
    if names:
        return f"{', '.join(names)} not installed (bash tests/cluster/slurm.sh install)"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    allowed = subprocess.run(probe, capture_output=True, text=True)
    return f"no permission to make namespaces: {allowed.stderr.strip()}" if allowed.returncode else None


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits until ``condition()`` is true.

    Raises:
        TimeoutError: it is not after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


def merge(settings: Sequence[str]) -> list[str]:
    """``key=value`` settings, the last of each key."""
    return list({setting.partition("=")[0]: setting for setting in settings}.values())


class Cluster:
    """Context manager: two nodes named ``{name}1`` and ``{name}2``, each with a server of warm ranks.

    A third, ``{name}3``, is for jobs in the partition ``all`` only.

    Args:
        folder: where SLURM, the servers and the starts keep their files; made if it is missing.
        name: names the nodes; another for each cluster on the machine.
        disk_mib: size of ``folder/disk``, a small disk that all nodes share.
        kill_wait: seconds between SLURM's SIGTERM and SIGKILL; 30 is its default.
    """

    def __init__(self, folder: Path, name: str, disk_mib: int = 64, kill_wait: int = 30):
        self.folder, self.name, self.disk = folder.resolve(), name, folder.resolve() / "disk"
        self.nodes, self.third = [f"{name}1", f"{name}2"], f"{name}3"
        self._disk_mib, self._kill_wait, self._starts = disk_mib, kill_wait, 0

    def __enter__(self) -> Cluster:
        self.disk.mkdir(parents=True)
        with (self.folder / "warm.txt").open("w") as output:
            self._warm = subprocess.Popen(
                [sys.executable, str(HERE / "warm.py")],
                env=self.environment(),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
            )
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._disk_mib}m", "tmpfs", self.disk], check=True)
        try:
            self.do("up", "2", "1", log="up")
            for node in (*self.nodes, self.third):
                self._serve(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._warm.kill()
        self._warm.communicate()
        self.do("down", log="down")
        subprocess.run(["umount", "--lazy", self.disk], check=True)

    # -- nodes ----------------------------------------------------------------------------------------------------

    def command(self, action: str, *words: object) -> list[str]:
        """The command line of ``slurm.sh``'s action."""
        return ["bash", str(HERE / "slurm.sh"), action, str(self.folder), *map(str, words)]

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        # No variable of this process's launcher, nor of pytest, reaches a job.
        kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TERM", "TMPDIR", "USER")}
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PREFIX": self.name, "NODE": self.name}
        fixed["KILLWAIT"] = str(self._kill_wait)
        return {**kept, **fixed, "PATH": path}

    def do(self, action: str, *words: object, log: str | None = None) -> str:
        """Runs an action of ``slurm.sh``; returns what it printed.

        Raises:
            RuntimeError: it failed.
        """
        # A file, not a pipe: what `up` leaves running would keep a pipe open.
        path = self.folder / f"{log or 'last'}.{threading.get_ident()}.txt"
        with path.open("w") as output:
            ended = subprocess.run(
                self.command(action, *words),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        text = path.read_text()
        if ended.returncode:
            raise RuntimeError(f"slurm.sh {action} {' '.join(map(str, words))}: exit {ended.returncode}\n{text}")
        return text

    def slurm(self, *words: object) -> str:
        """Runs a command of SLURM, such as ``scancel``."""
        return self.do("ctl", *words)

    @contextlib.contextmanager
    def other_code(self, node: str, path: str) -> Iterator[None]:
        """Within this context, a node sees a comment at the end of this file of the repository."""
        changed = self.folder / "changed.py"
        changed.write_text((ROOT / path).read_text() + "# other code\n")
        self.do("node", node, "mount", "--bind", changed, ROOT / path)
        try:
            yield
        finally:
            self.do("node", node, "umount", ROOT / path)

    @contextlib.contextmanager
    def slow_link(self, node: str, rate: str) -> Iterator[None]:
        """Within this context, a node sends no faster than ``rate``, such as ``20mbit``."""
        qdisc = ["dev", "eth0", "root"]
        self.do("node", node, "tc", "qdisc", "add", *qdisc, "tbf", "rate", rate, "burst", "32k", "latency", "50ms")
        try:
            yield
        finally:
            self.do("node", node, "tc", "qdisc", "del", *qdisc)

    @contextlib.contextmanager
    def dead_link(self, node: str, other: str) -> Iterator[None]:
        """Within this context, what a node sends to another gets lost; all other links work."""
        place = [f"10.77.0.{other.removeprefix(self.name)}", "dev", "eth0"]
        self.do("node", node, "ip", "neigh", "replace", *place, "lladdr", "02:00:00:00:00:99", "nud", "permanent")
        try:
            yield
        finally:
            self.do("node", node, "ip", "neigh", "del", *place)

    @contextlib.contextmanager
    def listening(self, node: str, port: int) -> Iterator[None]:
        """Within this context, another program of the node listens on a port."""
        program = (
            f"import socket; s = socket.create_server(('', {port})); print('ready', flush=True); kept = []\n"
            "while True: kept.append(s.accept())"
        )
        listener = subprocess.Popen(
            self.command("node", node, sys.executable, "-c", program),
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert listener.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            for pid, (_, _, command) in self._on(node).items():
                if "create_server" in command:
                    os.kill(pid, signal.SIGKILL)
            listener.wait()

    def kill_worker(self, node: str) -> None:
        """Kills a data worker of the node, as the kernel does when memory runs out.

        Raises:
            RuntimeError: there is none.
        """
        processes = self._on(node)
        workers = [
            pid
            for pid, (_, parent, command) in processes.items()
            if "forkserver" in command and "forkserver" in processes.get(parent, ("", 0, ""))[2]
        ]
        if not workers:
            raise RuntimeError(f"{node} has no data worker: {processes}")
        os.kill(workers[0], signal.SIGKILL)

    def power_off(self, node: str) -> None:
        """Cuts the node's link and then ends all that runs on it, so that no peer is told by a closed connection."""
        self.do("linkdown", node)
        self.do("kill", node)

    def power_on(self, node: str) -> None:
        """Brings a node back that was powered off or cut off, and waits until SLURM uses it."""
        self.do("linkup", node)
        if not self._on(node):
            self.do("addnode", node.removeprefix(self.name))
            self._serve(node)
        wait_until(
            lambda: self.slurm("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").strip() == "2", 90, "idle nodes"
        )

    def _serve(self, node: str) -> None:
        """Starts the server of warm ranks on a node."""
        socket = self.folder / f"{node}.sock"
        socket.unlink(missing_ok=True)
        self._warm.stdin.write(f"{self._first(node)} {socket}\n")
        self._warm.stdin.flush()
        wait_until(lambda: socket.exists() or self._warm.poll() is not None, 180, f"the server of {node}")
        if self._warm.poll() is not None:
            raise RuntimeError(f"the server of warm ranks has ended:\n{(self.folder / 'warm.txt').read_text()}")

    def _first(self, node: str) -> str:
        """Process id of the first process of a node."""
        return (self.folder / "run" / f"{node}.initpid").read_text().strip()

    def _on(self, node: str) -> dict[int, tuple[str, int, str]]:
        """State, parent and command line of each process on a node, by its process id on this machine."""
        try:
            namespace = os.readlink(f"/proc/{self._first(node)}/ns/pid")
        except OSError:  # the node is off
            return {}
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") == namespace:
                    state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(path.name)] = (state, int(parent), command)
            except OSError:  # it has ended
                continue
        return found

    def ranks_on(self, node: str) -> dict[int, str]:
        """State (R, S, T, Z, ...) of each process on a node that a job of this class has started."""
        found = self._on(node)
        servers = [pid for pid, (_, parent, command) in found.items() if "warm.py" in command and parent not in found]
        own = ("slurmd ", "slurmstepd", "bash -c", "sleep")
        return {
            pid: state
            for pid, (state, _, command) in found.items()
            if pid not in servers and not command.strip().startswith(own)
        }

    # -- jobs -----------------------------------------------------------------------------------------------------

    def start(
        self,
        settings: Sequence[str],
        *,
        rank_settings: Mapping[int, Sequence[str] | None] | None = None,
        cold: bool = False,
        faults: Sequence[dict] = (),
        kill_on_bad_exit: bool = True,
        environment: Mapping[str, str] | None = None,
        srun: Sequence[str] = ("--nodes=2", "--ntasks=2"),
        batch: str | None = None,
        program: str = "launch/train.py",
    ) -> Start:
        """Starts ``launch/train.py`` by srun, one rank on each node.

        Args:
            settings: its arguments.
            rank_settings: further arguments of a rank; None: the rank never arrives.
            cold: as ``python launch/train.py``, not from the server. Faults need the server.
            faults: see ``faults.py``.
            kill_on_bad_exit: whether srun ends the other rank as soon as one fails.
            environment: further variables.
            srun: options of srun, which say on how many nodes.
            batch: a job script for sbatch, with the word SRUN for the command, instead of srun alone.
            program: another file of the repository than ``launch/train.py``.
        """
        self._starts += 1
        path = self.folder / "starts" / f"{self._starts}.json"
        path.parent.mkdir(exist_ok=True)
        arguments = {"all": [str(ROOT / program), *merge(settings)]}
        for rank, more in (rank_settings or {}).items():
            arguments[str(rank)] = None if more is None else [str(ROOT / program), *merge([*settings, *more])]
        values = {
            "arguments": arguments,
            "cold": cold,
            "faults": list(faults),
            "environment": {"FAULT_TIMES": str(path.with_suffix(".times")), **(environment or {})},
            "servers": str(self.folder),
        }
        path.write_text(json.dumps(values))
        task = [sys.executable, str(HERE / "task.py"), str(path)]
        command = ["srun", f"--job-name=start{self._starts}", "--kill-on-bad-exit=1", *srun, *task]
        if not kill_on_bad_exit:
            command.remove("--kill-on-bad-exit=1")
        if batch is not None:
            script = path.with_suffix(".sh")
            script.write_text(batch.replace("SRUN", " ".join(command)))
            command = [
                "sbatch",
                "--wait",
                f"--job-name=start{self._starts}",
                f"--output={path.with_suffix('.out')}",
                *srun,
                str(script),
            ]
        return Start(self, path, f"start{self._starts}", command)


class Start:
    """A start of a job. Lines of its output come with the Unix time at which they appeared."""

    def __init__(self, cluster: Cluster, path: Path, name: str, command: Sequence[str]):
        self.cluster, self.path, self.name = cluster, path, name
        self.lines: list[tuple[float, str]] = []
        self.begun = time.time()
        self.ended: float | None = None
        """Unix time at which srun ended."""
        self._process = subprocess.Popen(
            cluster.command("ctl", *command),
            env=cluster.environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append((time.time(), line.rstrip("\n")))
        self._process.wait()
        self.ended = time.time()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait(self, seconds: float = 120) -> int:
        """Waits until srun has ended; returns its exit code.

        Raises:
            TimeoutError: it has not after ``seconds``; the job is cancelled.
        """
        try:
            wait_until(lambda: self.ended is not None, seconds, f"the end of {self.name}")
        except TimeoutError as error:
            self.cancel()
            raise TimeoutError(f"{error}\n{self.text}") from None
        return self._process.returncode

    def cancel(self) -> None:
        """Ends the job by SIGKILL, if it is still there."""
        if self.ended is None:
            self.cluster.slurm("scancel", "--signal=KILL", f"--name={self.name}")
            self.cluster.slurm("scancel", f"--name={self.name}")
            self._process.send_signal(signal.SIGKILL)
            self._reader.join(30)

    def wait_for(self, condition: Callable[[], object], seconds: float = 60, what: str = "the condition") -> None:
        """Waits until ``condition()`` is true; a job that ends before is an error."""
        wait_until(lambda: condition() or self.ended is not None, seconds, what)
        if not condition():
            raise RuntimeError(f"{what}: the job ended before, exit code {self._process.returncode}\n{self.text}")

    def pid(self, rank: int) -> int:
        """Process id of a rank within its node."""
        path = self.path.with_name(f"{self.path.stem}.pid-{rank}")
        self.wait_for(lambda: path.exists() and path.read_text(), 30, f"rank {rank}'s pid")
        return int(path.read_text())

    def kill(self, rank: int, name: str = "KILL") -> None:
        """Sends a signal to a rank's process."""
        self.cluster.do("node", self.cluster.nodes[rank], "kill", f"-{name}", self.pid(rank))

    def wait_for_handler(self, rank: int, number: int) -> None:
        """Waits until a rank has a handler for a signal."""

        def handled() -> int:
            status = self.cluster.do("node", self.cluster.nodes[rank], "cat", f"/proc/{self.pid(rank)}/status")
            caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
            return int(caught, 16) >> number - 1 & 1

        self.wait_for(handled, 30, f"rank {rank}'s handler of signal {number}")

    def job_id(self) -> int:
        """SLURM's number of the job."""
        return int(self.cluster.slurm("squeue", "-h", "-o", "%i", f"--name={self.name}"))

    def signal(self, name: str) -> None:
        """Sends a signal to all tasks, as scancel and SLURM's --signal do."""
        self.cluster.slurm("scancel", f"--signal={name}", f"--name={self.name}")

    def fault_time(self) -> float:
        """Unix time of the first fault that ``faults.py`` made.

        Raises:
            RuntimeError: it made none.
        """
        path = self.path.with_suffix(".times")
        if not path.exists():
            raise RuntimeError(f"the fault did not happen:\n{self.text}")
        return float(path.read_text().split()[0])
