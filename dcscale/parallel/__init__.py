"""Many processes as one: who this process is, and the engine that spreads a model over all of them."""

from dcscale.parallel.collectives import RankError, decided_by_main, of_all_ranks, on_every_rank
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
    "decided_by_main",
    "discover",
    "free_port",
    "of_all_ranks",
    "on_every_rank",
    "share_cores",
    "start_distributed",
    "stop_distributed",
]
