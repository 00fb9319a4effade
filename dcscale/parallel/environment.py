"""Rank and device of this process, from the variables of its launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from dcscale.parallel.launchers import BY_HAND, Launch, LaunchError, recognise

_ALONE = Launch()


@dataclass(frozen=True)
class Environment:
    """One process of a run, with its ranks as torchrun defines them."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    launch: Launch = _ALONE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The torch.distributed backend for the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def discover(variables: MutableMapping[str, str] = os.environ) -> Environment:
    """Reads the launcher's variables and selects the device.

    Sets in ``variables`` what DeepSpeed reads: LOCAL_RANK and LOCAL_SIZE.

    Raises:
        LaunchError: see :func:`dcscale.parallel.launchers.recognise`; or there are more processes than GPUs.
    """
    ranks, launch = recognise(variables)
    device = _device(launch.launcher, ranks.local_rank, ranks.local_world_size)
    # DeepSpeed uses LOCAL_RANK as GPU index, which is not the local rank where each task sees only its own GPU.
    device_index = ranks.local_rank if device.index is None else device.index
    variables["LOCAL_RANK"] = str(device_index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in variables:  # DeepSpeed asserts that it is the same
        variables["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device_index)
    variables.setdefault("LOCAL_SIZE", str(ranks.local_world_size))
    return Environment(*ranks, device, launch)


def _device(launcher: str, local_rank: int, local_world_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and launcher not in ("torchrun", "deepspeed", BY_HAND):
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 and the like: each task sees only its own GPU
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
