"""Distributed training: the environment of a process, collectives, and the engine around DeepSpeed."""

from dcscale.parallel.agreement import DisagreementError
from dcscale.parallel.collectives import (
    RankError,
    broadcast_from_rank0,
    gather_objects,
    run_on_all_ranks,
    set_timeouts,
)
from dcscale.parallel.engine import Engine, start_distributed, stop_distributed
from dcscale.parallel.environment import Environment, discover, free_port, share_cores
from dcscale.parallel.launchers import LaunchError
from dcscale.parallel.rendezvous import ArrivalError, current_rendezvous, launch_line, new_store_client
from dcscale.parallel.step_clock import PHASES
from dcscale.parallel.zero_state import KINDS, MASTER, Snapshot

__all__ = [
    "KINDS",
    "MASTER",
    "PHASES",
    "ArrivalError",
    "DisagreementError",
    "Engine",
    "Environment",
    "LaunchError",
    "RankError",
    "Snapshot",
    "broadcast_from_rank0",
    "current_rendezvous",
    "discover",
    "free_port",
    "gather_objects",
    "launch_line",
    "new_store_client",
    "run_on_all_ranks",
    "set_timeouts",
    "share_cores",
    "start_distributed",
    "stop_distributed",
]
