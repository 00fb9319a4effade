"""Who this process is: its rank, how many there are, and which device it owns, whatever started it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch


class LaunchError(ValueError):
    """The variables that a launcher sets do not make sense."""


@dataclass(frozen=True)
class Environment:
    """One process of a run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    """``deepspeed/torchrun``, ``srun`` or ``python`` (alone)."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The torch.distributed backend for the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def _integer(variables: Mapping[str, str], name: str, launcher: str) -> int:
    value = variables.get(name)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise LaunchError(
            f"environment variable {name} is {value!r}, but {launcher} must set it to an integer; start with "
            "`deepspeed launch/train.py`, `torchrun`, `srun` or plain `python` in a clean shell"
        ) from None


def discover(variables: MutableMapping[str, str] = os.environ) -> Environment:
    """Reads the launcher's variables, fills in the rendezvous for a process started alone, and picks the device.

    Raises:
        LaunchError: a variable is missing or the ranks do not fit.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        launcher = "deepspeed/torchrun"
        rank, world_size, local_rank = (_integer(variables, n, launcher) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
        local_world_size = _integer(variables, local_name, launcher) if local_name in variables else world_size
    elif "SLURM_STEP_NUM_TASKS" in variables and "SLURM_PROCID" in variables and "MASTER_ADDR" in variables:
        launcher = "srun"
        rank, world_size, local_rank = (
            _integer(variables, n, launcher) for n in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        )
        nodes = _integer(variables, "SLURM_STEP_NUM_NODES", launcher)
        local_world_size = world_size // nodes
    else:
        launcher, rank, local_rank, world_size, local_world_size = "python", 0, 0, 1, 1
        variables["MASTER_ADDR"] = "127.0.0.1"
        variables["MASTER_PORT"] = str(free_port())
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise LaunchError(
            f"{launcher} gave rank {rank} of {world_size} and local rank {local_rank} of {local_world_size}; "
            "a rank must be below its count"
        )
    # torch and DeepSpeed read these names, also when srun or nothing set them.
    variables.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    variables.setdefault("LOCAL_SIZE", str(local_world_size))
    return Environment(rank, local_rank, world_size, local_world_size, launcher, _device(local_rank))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With one visible GPU a process (SLURM's --gpus-per-task) its index is 0 whatever the local rank.
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise LaunchError(
            f"local rank {local_rank} has no GPU of its own: {count} are visible; start at most {count} processes "
            "on this node"
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def share_cores(environment: Environment, variables: Mapping[str, str] = os.environ) -> int:
    """Gives each process on a CPU machine its part of the cores, unless OMP_NUM_THREADS says otherwise.

    More threads than cores do not just share them: they wait for each other in loops. Returns the number of threads.
    """
    if environment.device.type == "cpu" and "OMP_NUM_THREADS" not in variables:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))
    return torch.get_num_threads()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
