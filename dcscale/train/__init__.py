"""Training: the loop, its hooks, and how it is built from a config."""

from dcscale.train.build import build_trainer
from dcscale.train.preflight import REFUSALS
from dcscale.train.summary import summary_lines, write_summary
from dcscale.train.trainer import StopReason, Trainer

__all__ = ["REFUSALS", "StopReason", "Trainer", "build_trainer", "summary_lines", "write_summary"]
