"""Rank, world size and device of this process, from the variables of deepspeed, torchrun or srun, or without any."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch


class LaunchError(ValueError):
    """The environment variables of the launcher are inconsistent, or do not fit the machine."""


@dataclass(frozen=True)
class Environment:
    """One process of a run, with its ranks as torchrun defines them."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
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
    """Reads the launcher's variables and selects the device.

    Sets in ``variables`` what torch and DeepSpeed read: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE, and for a single
    process MASTER_ADDR and MASTER_PORT too.

    Raises:
        LaunchError: a variable is missing, the ranks are inconsistent, or there are more processes than GPUs.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        launcher = "deepspeed/torchrun"
        rank, world_size, local_rank = (_integer(variables, n, launcher) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
        local_world_size = _integer(variables, local_name, launcher) if local_name in variables else world_size
    # Not SLURM_PROCID: it is also set in the batch script, where python runs alone.
    elif "SLURM_STEP_NUM_TASKS" in variables and _integer(variables, "SLURM_STEP_NUM_TASKS", "srun") > 1:
        launcher = "srun"
        _check_srun_rendezvous(variables)
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
    device = _device(launcher, local_rank, local_world_size)
    # torch and DeepSpeed read these names, but srun does not set them. DeepSpeed uses LOCAL_RANK as GPU index, which
    # is not the local rank where each task sees only its own GPU.
    device_index = local_rank if device.index is None else device.index
    variables.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(device_index))
    variables.setdefault("LOCAL_SIZE", str(local_world_size))
    return Environment(rank, local_rank, world_size, local_world_size, device)


def _check_srun_rendezvous(variables: Mapping[str, str]) -> None:
    exports = {
        "MASTER_ADDR": 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)',
        "MASTER_PORT": "export MASTER_PORT=29500",
    }
    missing = [name for name in exports if not variables.get(name)]
    if missing:
        raise LaunchError(
            f"srun started {variables['SLURM_STEP_NUM_TASKS']} tasks, but {' and '.join(missing)} must be set so that "
            f"they find each other; put before srun in the job script: {'; '.join(exports[name] for name in missing)}"
        )


def _device(launcher: str, local_rank: int, local_world_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launcher == "srun" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task=1: each task sees only its own GPU, as index 0
    if local_world_size > count:
        raise LaunchError(
            f"{launcher} started {local_world_size} processes on this node, but each needs a GPU of its own and "
            f"{count} are visible; start at most {count} per node"
        )
    return torch.device("cuda", local_rank)


def share_cores(environment: Environment, variables: Mapping[str, str] = os.environ) -> int:
    """Limits torch on a CPU machine to this process's share of the cores, unless the user set OMP_NUM_THREADS.

    With more threads than cores, OpenMP threads busy-wait for each other, which is slower than one thread per core.

    Returns:
        The number of threads that torch uses.
    """
    chosen = variables.get("OMP_NUM_THREADS")
    if chosen == "1" and "TORCHELASTIC_RUN_ID" in variables:  # torchrun sets 1 if the user set nothing
        chosen = None
    if environment.device.type == "cpu" and chosen is None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))
    return torch.get_num_threads()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
