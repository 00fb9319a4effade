"""Where a run is, from its files alone: the run may be on another machine, running, ended or broken. No torch here."""

from dcscale.cluster.status.page import page, table
from dcscale.cluster.status.read import find_runs, read_status
from dcscale.cluster.status.run_status import RunStatus, State

__all__ = ["RunStatus", "State", "find_runs", "page", "read_status", "table"]
