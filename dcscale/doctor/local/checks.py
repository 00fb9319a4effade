"""All checks of one machine, run side by side, each with a time limit: a disk or driver that hangs is a finding."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local.disk import check_disk
from dcscale.doctor.local.gpus import check_gpus
from dcscale.doctor.local.host import check_clock, check_host, check_names, check_ports
from dcscale.doctor.local.run import check_leftovers, check_shards, check_start, training_processes
from dcscale.doctor.local.subject import Subject
from dcscale.doctor.local.versions import check_torch, check_versions

_QUICK_SECONDS = 10.0
"""Limit of each check of the quick part, which usually takes less than 2 s in all."""


@dataclass(frozen=True)
class Check:
    """A group of findings."""

    name: str

    findings: tuple[str, ...]
    """Names of the findings that it may have."""

    looks_at: str
    """What it looks at, for the documentation."""

    tried: str
    """On what it was tried, for the documentation."""

    look: Callable[[Subject], Iterable[Finding]]

    seconds: float
    """After which it counts as hanging; imports come before."""

    waits: bool = True
    """Whether it begins only when torch is imported, and it is known how many ranks there are."""

    quick: bool = True
    """Whether it belongs to the quick part."""

    hanging: Verdict = Verdict.UNKNOWN
    """What it means if it takes longer."""


CHECKS = (
    Check(
        "versions",
        ("python", "packages", "tested versions", "CUDA"),
        "Python and packages against pyproject.toml and launch/constraints.txt; torch's CUDA against the driver",
        "here, with planted versions; the driver by recorded outputs",
        check_versions,
        20,
        waits=False,
    ),
    Check(
        "torch",
        ("torch",),
        "whether torch can be imported and sees all GPUs",
        "here, without GPUs",
        check_torch,
        60,
        quick=False,
    ),
    Check(
        "GPUs",
        (
            *("GPUs", "GPU memory", "GPU ECC", "GPU memory rows", "GPU clocks", "GPU power", "GPU temperature"),
            *("GPU PCIe link", "GPU peer links", "NVLink"),
        ),
        "count, kinds, memory in use, ECC errors, slowdowns, power limit, temperature, links: "
        "`nvidia-smi --query-gpu`, `topo -m`, `nvlink -s`",
        "recorded outputs",
        check_gpus,
        60,
        hanging=Verdict.BAD,
    ),
    Check(
        "host",
        ("host memory", "swap", "/dev/shm", "open files", "processes", "other limits"),
        "memory, swap and shared memory against what ranks and data workers need; limits of processes",
        "here; small limits and a small /dev/shm planted",
        check_host,
        60,
    ),
    Check(
        "disk",
        (
            *("file system", "disk space", "inodes", "renames", "disk sync", "clock of the disk", "write speed"),
            "disk write",
        ),
        "the disk of the run folder: kind, room for the checkpoints to come, atomic renames, speed of 64 MiB in at "
        "most 2 s, its clock against this machine's",
        "here, on ext4 and a full tmpfs; network and object disks by recorded mounts",
        check_disk,
        60,
        hanging=Verdict.BAD,
    ),
    Check(
        "ports",
        ("port", "SLURM ports"),
        "MASTER_PORT, 29500 or the port of the SLURM step, and who holds it",
        "here, with a port taken",
        check_ports,
        60,
    ),
    Check(
        "names",
        ("own name", "names of hosts"),
        "addresses of this host and of all hosts of the job",
        "here; unknown names and a resolver that hangs planted",
        check_names,
        60,
    ),
    Check(
        "clock",
        ("clock",),
        "time servers: chronyc, timedatectl, adjtimex",
        "the kernel's answer here; the others by recorded outputs",
        check_clock,
        60,
    ),
    Check(
        "data",
        ("shards", "verified shards"),
        "first and last shard of every root; shards read and compared with the manifest for 2 s, at least one",
        "here; a corrupt, a missing and an unreachable shard planted",
        check_shards,
        90,
        quick=False,
        hanging=Verdict.BAD,
    ),
    Check(
        "start",
        ("start",),
        "what a start would refuse, as tools/check_config.py finds it",
        "here",
        check_start,
        90,
        quick=False,
    ),
    Check(
        "leftovers",
        ("other training", "lease", "unfinished checkpoints", "last start"),
        "processes of training with their ports and GPUs, the lease of the run folder, unfinished checkpoints, "
        "ending.json",
        "here, of killed and of living runs",
        lambda subject: check_leftovers(subject, training_processes),
        30,
        waits=False,
        hanging=Verdict.BAD,
    ),
)


def run_checks(
    subject: Subject, checks: Sequence[Check] = CHECKS, import_seconds: float = 90.0
) -> tuple[list[Finding], bool]:
    """Runs checks side by side.

    Args:
        subject: this machine and the run.
        checks: what is checked.
        import_seconds: longest time to import torch.

    Returns:
        The findings, in the order of the checks; and whether any check hangs: its thread is left behind, and only
        ``os._exit`` may then be able to end the process.
    """
    chosen = [check for check in checks if check.quick or not subject.quick]
    prepared = threading.Event()
    # In one thread: several that import modules which import each other may find them half initialised.
    threading.Thread(target=_prepare, args=(subject, prepared), daemon=True).start()
    early = [_Run(check, subject) for check in chosen if not check.waits]
    late, found = [], []
    if len(early) < len(chosen):
        if not prepared.wait(import_seconds):
            way_out = "look at the disk that holds the Python environment, and at the driver: see dmesg"
            value = f"cannot be imported in {import_seconds:g} s"
            found.append(subject.bad("torch", value, "torch and dcscale can be imported", way_out))
        late = [_Run(check, subject) for check in chosen if check.waits]
    runs = {run.check.name: run for run in [*early, *late]}
    for check in chosen:
        found += runs[check.name].result(_QUICK_SECONDS if subject.quick else check.seconds)
    hangs = not prepared.is_set() or any(not run.done.is_set() for run in runs.values())
    return _without_repeats(found), hangs


def _prepare(subject: Subject, prepared: threading.Event) -> None:
    """Imports what checks need, and finds how many ranks there are."""
    # What fails here, fails again in the checks that need it, and is reported there.
    with contextlib.suppress(Exception):
        import dcscale.data
        import dcscale.parallel  # noqa: F401

        subject.parameters()
        if subject.place is not None:
            subject.ranks, subject.local_ranks, subject.nodes = subject.place()
    prepared.set()


class _Run:
    """A check in a thread of its own."""

    def __init__(self, check: Check, subject: Subject):
        self.check, self._subject = check, subject
        self.done, self._start = threading.Event(), time.monotonic()
        self._findings: list[Finding] = []
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        try:
            for finding in self.check.look(self._subject):
                self._findings.append(finding)
        except Exception as error:
            why = f"the check failed: {type(error).__name__}: {error}"
            self._findings.append(self._subject.unknown(self.check.findings[0], why, f"{self.check.name}: checked"))
        finally:
            self.done.set()

    def result(self, seconds: float) -> list[Finding]:
        """The findings, so many seconds after the start at the latest; then the last one says that it hangs."""
        if self.done.wait(max(0.0, self._start + seconds - time.monotonic())):
            return self._findings
        return [*self._findings, _hanging(self.check, self._subject, seconds)]


def _hanging(check: Check, subject: Subject, seconds: float) -> Finding:
    value, rule = f"{check.name}: no answer in {seconds:g} s", f"an answer within {seconds:g} s"
    if check.hanging is Verdict.UNKNOWN:
        return subject.unknown(check.findings[0], value, rule)
    way_out = "a disk, file server or driver hangs: see dmesg and ps -eo pid,stat,wchan,cmd; reboot or exclude the node"
    return subject.bad(check.findings[0], value, rule, way_out)


def _without_repeats(findings: list[Finding]) -> list[Finding]:
    """A start would refuse shards that cannot be read: that is said once."""
    known = {(finding.value, finding.way_out) for finding in findings if finding.check != "start"}
    return [f for f in findings if f.check != "start" or (f.value, f.way_out) not in known]


def checks_table() -> str:
    """The checks as a Markdown table, for the README; * marks those that ``--quick`` leaves out."""
    names = {check.name: check.name + " *" * (not check.quick) for check in CHECKS}
    rows = [f"| {names[c.name]} | {', '.join(c.findings)} | {c.looks_at} | {c.tried} |" for c in CHECKS]
    return "\n".join(["| check | findings | looks at | tried on |", "|---|---|---|---|", *rows])
