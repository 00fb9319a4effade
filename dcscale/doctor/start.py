"""The part of the doctor that every start of training runs, before the model is built: what would end the run later."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dcscale.cluster.restarts import report_bad_node
from dcscale.config import Config
from dcscale.doctor.collectives import sum_of_values, values
from dcscale.doctor.findings import Finding, Verdict
from dcscale.doctor.local.disk import checkpoint_bytes
from dcscale.doctor.local.gpus import check_gpus
from dcscale.doctor.local.host import check_host
from dcscale.doctor.local.subject import Subject, size
from dcscale.lease import LEASE, Lease, holder_of, is_taken_over
from dcscale.parallel import Environment, broadcast_from_rank0, gather_objects

HOST = {"/dev/shm", "open files", "processes", "other limits"}
GPUS = {"GPUs", "GPU ECC", "GPU memory rows"}
"""Findings of the doctor that keep a run from starting."""

_ELSEWHERE = {*GPUS, "all-reduce", "disk space"}
"""Of these another start may be free, on other nodes or later; of the others if they are not on all nodes."""
_OF_A_NODE = {*HOST, *GPUS, "run folder"}
"""Of these the node is the cause, so that another start should leave it out."""
_VISIBLE_SECONDS = 5.0
_ELEMENTS = 1009


class NodeCheckError(RuntimeError):
    """A node would end the run later, or make it wrong.

    Args:
        message: names nodes, values, rules and ways out.
        rank: that speaks for the first such node.
        retry: whether another start may succeed, see :func:`dcscale.files.may_succeed_later`.
    """

    def __init__(self, message: str, *, rank: int, retry: bool) -> None:
        super().__init__(message)
        self.rank, self.retry = rank, retry


def check_nodes(
    config: Config,
    environment: Environment,
    lease: Lease | None,
    hosts: Sequence[str],
    parameters: int | None,
    look: Callable[[Subject], Sequence[Finding]] | None = None,
) -> None:
    """Checks limits, shared memory, GPUs, the run folder and a small all-reduce; all ranks call it together.

    Args:
        config: settings of the run.
        environment: this process, which is in the process group of the run.
        lease: of the run folder, on rank 0; None on the others.
        hosts: of each rank.
        parameters: of the model, which is still to be trained; None: no checkpoint will be written.
        look: the checks of a machine, for tests.

    Raises:
        NodeCheckError: on all ranks, if anything is bad on any.
    """
    subject = Subject(config, environment.world_size, environment.local_world_size, len(set(hosts)), quick=True)
    findings = list((look or _look)(subject)) if environment.local_rank == 0 else []
    if environment.is_main and parameters is not None:
        findings += _disk_space(subject, config, parameters)
    if subject.nodes > 1:
        token = broadcast_from_rank0(lambda: lease.token)  # type: ignore[union-attr]
        if environment.local_rank == 0 and not environment.is_main:
            findings += _run_folder(subject, hosts[0], token)
    if environment.world_size > 1:
        findings += _all_reduce(subject, environment)
    bad = [finding.as_json() for finding in findings if finding.verdict is Verdict.BAD]
    found = [
        (rank, Finding(**{**values, "verdict": Verdict(values["verdict"])}))
        for rank, own in enumerate(gather_objects(bad))
        for values in own
    ]
    if not found:
        return
    error = _error(found, subject.nodes)
    if environment.is_main and error.retry and "SLURM_JOB_ID" in subject.variables:
        _exclude(found, Path(config.run.folder), subject)
    raise error


def _look(subject: Subject) -> list[Finding]:
    """What of this machine keeps a run from starting."""
    found = [finding for finding in check_host(subject) if finding.check in HOST]
    if not torch.cuda.is_available():
        # Only NCCL and data workers need it.
        return [finding for finding in found if finding.check != "/dev/shm" or subject.config.data.workers]
    if torch.cuda.device_count() < subject.local_ranks:  # each task sees only its own
        subject.local_ranks = torch.cuda.device_count()
    return [*found, *(finding for finding in check_gpus(subject) if finding.check in GPUS)]


def _disk_space(subject: Subject, config: Config, parameters: int) -> list[Finding]:
    """Whether a checkpoint has room; rank 0 holds the run folder, so that it is there."""
    if config.checkpoint.on_error == "warn":
        return []
    folder, needed = Path(config.run.folder) / "checkpoints", checkpoint_bytes(config, parameters)
    folder = folder if folder.is_dir() else folder.parent
    free = shutil.disk_usage(folder).free
    way_out = "free some space, or start a copy of the run on a larger disk (run.folder)"
    rule = f"at least {size(needed)}, a checkpoint"
    return [subject.judged(free >= needed, "disk space", f"{folder} has {size(free)} free", rule, way_out)]


def _run_folder(subject: Subject, host: str, token: str) -> list[Finding]:
    """Whether this node sees what rank 0 has written into the run folder, and can write there too."""
    run, problem = Path(subject.config.run.folder).absolute(), ""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while problem := _unshared(run, host, token):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    way_out = "set run.folder to an absolute path on a disk that all nodes mount, writable, at the same place"
    return [subject.judged(not problem, "run folder", problem, "it is the same on all nodes", way_out)]


def _unshared(run: Path, host: str, token: str) -> str:
    """Why the run folder is not shared with rank 0; empty if it is."""
    try:
        if holder_of(run) is None or is_taken_over(run, token):
            return f"{run / LEASE}, which rank 0 on {host} has written, is not seen here"
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(b"written")
    except OSError as error:
        return f"{run} cannot be used: {error.strerror}"
    return ""


def _all_reduce(subject: Subject, environment: Environment) -> list[Finding]:
    """Whether a small sum over all ranks is right on this one."""
    device, ranks = environment.device, environment.world_size
    found = values(_ELEMENTS, environment.rank, _ELEMENTS, device)
    dist.all_reduce(found)
    wrong = int((found != sum_of_values(_ELEMENTS, ranks, _ELEMENTS, device)).sum())
    value = f"{wrong:,} of {_ELEMENTS:,} sums over {ranks:,} ranks are wrong on rank {environment.rank}"
    way_out = "srun python tools/doctor.py CONFIG --nodes tells which rank makes them wrong; exclude its node"
    return [subject.judged(not wrong, "all-reduce", value, "exact sums of integers", way_out)]


def _exclude(found: Sequence[tuple[int, Finding]], run: Path, subject: Subject) -> None:
    """Has the job script leave out the nodes that are the cause."""
    for _, finding in found:
        if finding.check in _OF_A_NODE:
            try:
                report_bad_node(run, finding.node, f"{finding.check}: {finding.value}", subject.variables)
            except OSError as error:  # then the same node may be tried again
                print(f"warning    {run} cannot be written to: {error}", file=sys.stderr)


def _error(found: Sequence[tuple[int, Finding]], nodes: int) -> NodeCheckError:
    lines, retry = [], True
    for check in dict.fromkeys(finding.check for _, finding in found):
        own = [finding for _, finding in found if finding.check == check]
        # Rank 0 always sees the run folder.
        everywhere = len({finding.node for finding in own}) >= max(1, nodes - (check == "run folder"))
        retry &= check in _ELSEWHERE or not everywhere
        lines += [f"  - {f.node}: {f.check}: {f.value}; must be: {f.rule}; {f.way_out}" for f in own[:8]]
        lines += [f"  - and {len(own) - 8} more"] if len(own) > 8 else []
    text = "\n".join(
        [
            "the check before training found what would end the run later:",
            *lines,
            "parallel.check_nodes=false starts without this check",
        ]
    )
    return NodeCheckError(text, rank=found[0][0], retry=retry)
