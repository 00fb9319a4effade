"""Which launcher started this process, as which rank of how many, and where the ranks meet: from variables alone."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

DEFAULT_PORT = 29500
"""Where ranks on one machine meet if nothing else is set, as with torchrun and deepspeed."""

DERIVED_PORTS = range(20_000, 30_000)
"""Where ranks of a SLURM step meet if nothing else is set: below what Linux gives to outgoing connections."""

_MOST_HOSTS = 100_000
"""In a range of host names."""


class LaunchError(ValueError):
    """The variables of the launcher are missing or inconsistent, or do not fit the machine."""


class Ranks(NamedTuple):
    """Place of a process among those of the run, as torchrun defines it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


@dataclass(frozen=True)
class Launch:
    """What started this process, and where the ranks meet."""

    launcher: str = "python"
    """For messages."""

    job: str = ""
    """In the batch system, for messages, such as ``job 17, step 0``; empty without one."""

    address: tuple[str, int] | None = None
    """Host and port of the store that all ranks connect to; None for a single process."""

    serves_store: bool = True
    """Whether rank 0 serves the store; False if the launcher does."""

    prefix: str = "dcscale"
    """Of this start's keys in the store."""

    expected_hosts: tuple[str, ...] = ()
    """Host of each rank as the batch system plans it; empty where it does not say."""


class _Tasks(NamedTuple):
    """Variables in which a launcher tells a process its place."""

    launcher: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    """The first that is set counts."""
    local_world_size: tuple[str, ...]
    """The same."""
    nodes: str = ""
    """The number of nodes, where the local world size is not given."""


_TORCH = _Tasks("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_SRUN = _Tasks("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), (), "SLURM_STEP_NUM_NODES")
_OPEN_MPI = _Tasks(
    "mpirun (Open MPI)",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
# Flux and PALS come before PMI because they set variables of PMI too.
_FLUX = _Tasks("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), (), "FLUX_JOB_NNODES")
_PALS = _Tasks("mpiexec (PALS)", "PALS_RANKID", "PMI_SIZE", ("PALS_LOCAL_RANKID",), ("PALS_LOCAL_SIZE",))
_PMI = _Tasks(
    "mpiexec (PMI)",
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
)
_TASKS = (_OPEN_MPI, _FLUX, _PALS, _PMI, _SRUN)

_RANKS_WITHOUT_COUNT = ("PMIX_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK", "ALPS_APP_PE")
"""Set in each of several processes that would take themselves for the only one."""

BY_HAND = "RANK and WORLD_SIZE"
"""Name of the launcher that is none: somebody's script has set the variables of torchrun."""

_SET_ALL = "set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each process"


def recognise(variables: Mapping[str, str]) -> tuple[Ranks, Launch]:
    """Finds the launcher of this process, and its place among the others.

    The innermost launcher counts: RANK, which torchrun and deepspeed set in each of their processes, also inside of
    srun or mpirun; then mpirun, flux run and mpiexec, whose daemons may be tasks of srun; then srun. A launcher that
    started a single process does not count.

    Raises:
        LaunchError: a variable is missing or no number, the ranks are inconsistent, nothing says where the ranks meet,
            or there are several processes that do not know of each other.
    """
    tasks = _innermost(variables)
    in_step = tasks is _SRUN
    job = _job(variables, in_step)
    if tasks is None:
        return Ranks(0, 0, 1, 1), Launch(job=job)
    ranks = _ranks(tasks, variables)
    if tasks is _TORCH:
        _check_outer(ranks, variables)
    return ranks, Launch(
        launcher=_torch_launcher(variables) if tasks is _TORCH else tasks.launcher,
        job=job,
        address=_address(tasks, ranks, variables) if ranks.world_size > 1 else None,
        serves_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        prefix=_prefix(variables, in_step),
        expected_hosts=_expected_hosts(ranks, variables) if in_step else (),
    )


def _innermost(variables: Mapping[str, str]) -> _Tasks | None:
    """The launcher that counts; None for a single process."""
    if variables.get("RANK"):
        return _TORCH
    known = [tasks for tasks in _TASKS if _is_set(tasks, variables)]
    several = [tasks for tasks in known if _integer(variables, tasks.world_size, tasks.launcher) > 1]
    if several:
        # srun sets variables of PMI too where --mpi asks for it, with the same values, but no local ranks.
        places = {(variables[tasks.rank], variables[tasks.world_size]) for tasks in several}
        by_srun = _SRUN in several and len(places) == 1 and not variables.get(several[0].local_rank[0])
        return _SRUN if by_srun else several[0]
    if variables.get("WORLD_SIZE", "1") != "1":
        return _TORCH  # to be refused for the lack of RANK
    strangers = [name for name in _RANKS_WITHOUT_COUNT if name in variables]
    if variables.get("SLURM_PROCID", "0") != "0":  # it is 0 in a batch script too
        strangers.append("SLURM_PROCID")
    if strangers and not known:
        raise LaunchError(
            f"{strangers[0]} is {variables[strangers[0]]!r}, so this seems to be one of several processes, but nothing "
            f"says of how many; {_SET_ALL}, or unset {strangers[0]} if it is the only one"
        )
    return None


def _is_set(tasks: _Tasks, variables: Mapping[str, str]) -> bool:
    return bool(variables.get(tasks.rank) and variables.get(tasks.world_size))


def _torch_launcher(variables: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in variables:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in variables else BY_HAND


def _integer(variables: Mapping[str, str], name: str, launcher: str) -> int:
    value = variables.get(name)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise LaunchError(
            f"environment variable {name} is {value!r}, but {launcher} must set it to an integer; start with "
            f"`deepspeed launch/train.py`, `torchrun`, `srun` or plain `python` in a clean shell, or {_SET_ALL}"
        ) from None


def _first_set(variables: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The first of ``names`` that is set, or else the first."""
    return next((name for name in names if variables.get(name)), names[0])


def _ranks(tasks: _Tasks, variables: Mapping[str, str]) -> Ranks:
    def integer(name: str) -> int:
        return _integer(variables, name, tasks.launcher)

    rank, world_size = integer(tasks.rank), integer(tasks.world_size)
    local_rank = integer(_first_set(variables, tasks.local_rank))
    if tasks is _SRUN and variables.get("SLURM_STEP_TASKS_PER_NODE") and variables.get("SLURM_NODEID"):
        local_world_size = dict(enumerate(_tasks_per_node(variables))).get(integer("SLURM_NODEID"), 0)
    elif tasks.nodes:
        local_world_size = -(-world_size // max(1, integer(tasks.nodes)))
    elif tasks is _TORCH and not any(variables.get(name) for name in tasks.local_world_size):
        local_world_size = world_size
    else:
        local_world_size = integer(_first_set(variables, tasks.local_world_size))
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise LaunchError(
            f"{tasks.launcher} gave rank {rank} of {world_size} and local rank {local_rank} of {local_world_size}; "
            "a rank must be below its count"
        )
    return Ranks(rank, local_rank, world_size, local_world_size)


def _check_outer(ranks: Ranks, variables: Mapping[str, str]) -> None:
    """Refuses tasks of srun or mpirun of which each starts a run of its own, and ranks copied into all of them."""
    launcher = _torch_launcher(variables)
    nodes = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}.get(launcher, "WORLD_SIZE")
    joined = _integer(variables, nodes, launcher) if nodes in variables else ranks.world_size
    for outer in _TASKS:
        if not _is_set(outer, variables):
            continue
        rank, count = (_integer(variables, name, outer.launcher) for name in (outer.rank, outer.world_size))
        if joined < count:
            raise LaunchError(
                f"{outer.launcher} started {count} tasks ({outer.world_size}), but {nodes} is {joined}: there would be "
                f"several runs side by side; start {launcher} in one task only, or, on several nodes, join them by "
                f"torchrun's --nnodes and --rdzv-endpoint; or unset {outer.world_size}"
            )
        if launcher == BY_HAND and joined == count and ranks.rank != rank:
            raise LaunchError(
                f"RANK is {ranks.rank}, but {outer.rank} is {rank}, of {count} both; unset RANK and WORLD_SIZE, or set "
                "RANK in each task, not once for all"
            )


def _job(variables: Mapping[str, str], in_step: bool) -> str:
    ids = ("SLURM_JOB_ID", "PBS_JOBID", "FLUX_JOB_ID", "LSB_JOBID")
    job = next((variables[name] for name in ids if variables.get(name)), None)
    if job is None:
        return ""
    return f"job {job}, step {variables.get('SLURM_STEP_ID', '?')}" if in_step else f"job {job}"


def _prefix(variables: Mapping[str, str], in_step: bool) -> str:
    names = ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    if in_step:  # elsewhere, the ranks may be in different steps
        names.append("SLURM_STEP_ID")
    return "/".join(["dcscale", *(variables.get(name, "") for name in names)])


def _address(tasks: _Tasks, ranks: Ranks, variables: Mapping[str, str]) -> tuple[str, int]:
    host, port = variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")
    if tasks is _SRUN and variables.get("SLURM_STEP_NODELIST"):
        host = host or _hosts_of_step(variables)[0]
        port = port or str(_derived_port(variables))
    elif ranks.local_world_size == ranks.world_size and (
        tasks is not _TORCH or any(variables.get(name) for name in tasks.local_world_size)
    ):
        host, port = host or "127.0.0.1", port or str(DEFAULT_PORT)
    missing = [name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value]
    if missing:
        in_slurm = "SLURM_JOB_ID" in variables
        first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)' if in_slurm else "HOST_OF_RANK_0"
        values = {"MASTER_ADDR": first, "MASTER_PORT": DEFAULT_PORT}
        raise LaunchError(
            f"{tasks.launcher} started {ranks.world_size} processes on several nodes, but {' and '.join(missing)} must "
            f"be set so that they find each other: export {' '.join(f'{name}={values[name]}' for name in missing)}"
        )
    number = _integer({"MASTER_PORT": port}, "MASTER_PORT", "the job script")
    if not 0 < number < 65536:
        raise LaunchError(f"MASTER_PORT is {number}; a port is from 1 to 65535")
    return host, number


def _derived_port(variables: Mapping[str, str]) -> int:
    """Another one of ``DERIVED_PORTS`` for each job, step and restart."""
    start = [variables.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return DERIVED_PORTS[zlib.crc32(".".join(start).encode()) % len(DERIVED_PORTS)]


def _expected_hosts(ranks: Ranks, variables: Mapping[str, str]) -> tuple[str, ...]:
    """Host of each rank; empty if srun deals the tasks out to the hosts neither in blocks nor in turn."""
    # srun sets it only where it is asked for a distribution; block is its default.
    distribution = variables.get("SLURM_DISTRIBUTION", "block").partition(":")[0]
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    if distribution not in ("block", "cyclic") or not all(map(variables.get, names)):
        return ()
    tasks = list(zip(_hosts_of_step(variables), _tasks_per_node(variables)))
    if distribution == "block":
        return tuple(host for host, count in tasks for _ in range(count))
    return tuple(host for turn in range(ranks.world_size) for host, count in tasks if turn < count)


def _tasks_per_node(variables: Mapping[str, str]) -> list[int]:
    """``2(x3),1`` as 2, 2, 2, 1."""
    text = variables["SLURM_STEP_TASKS_PER_NODE"]
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; it must be like 2(x3),1; unset it")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _hosts_of_step(variables: Mapping[str, str]) -> list[str]:
    text = variables["SLURM_STEP_NODELIST"]
    try:
        return expand_hosts(text)
    except ValueError as error:
        raise LaunchError(
            f"SLURM_STEP_NODELIST is {text!r}: {error}; unset it and set MASTER_ADDR and MASTER_PORT"
        ) from None


def expand_hosts(text: str) -> list[str]:
    """Host names of a SLURM list: ``n[1-3,07],gpu-a`` is n1, n2, n3, n07, gpu-a.

    Raises:
        ValueError: it is not such a list.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)  # commas in brackets do not separate
    if ",".join(parts) != text or not parts:
        raise ValueError("it must be host names with ranges in brackets, separated by commas")
    hosts = []
    for part in parts:
        texts = re.split(r"\[(.*?)\]", part)  # every second one was in brackets
        hosts += ["".join(host) for host in product(*(_numbers(t) if i % 2 else [t] for i, t in enumerate(texts)))]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """``1-3,07`` as 1, 2, 3, 07."""
    numbers = []
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (found[1], found[2] or found[1]) if found else ("1", "0")
        if not 0 <= int(last) - int(first) < _MOST_HOSTS:
            raise ValueError(f"{part!r} is no number or range of numbers, such as 1-3 or 07")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
