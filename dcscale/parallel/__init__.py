"""Distributed training: the environment of a process, collectives, and the engine around DeepSpeed."""

from dcscale.parallel.collectives import RankError, broadcast_from_rank0, gather_objects, run_on_all_ranks
from dcscale.parallel.engine import Engine, NonFiniteError, start_distributed, stop_distributed
from dcscale.parallel.environment import Environment, LaunchError, discover, free_port, share_cores
from dcscale.parallel.zero_state import KINDS, MASTER, Snapshot

__all__ = [
    "KINDS",
    "MASTER",
    "Engine",
    "Environment",
    "LaunchError",
    "NonFiniteError",
    "RankError",
    "Snapshot",
    "broadcast_from_rank0",
    "discover",
    "free_port",
    "gather_objects",
    "run_on_all_ranks",
    "share_cores",
    "start_distributed",
    "stop_distributed",
]
