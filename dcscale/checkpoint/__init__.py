"""Checkpoints: what is in one, how it is written without ever leaving half of one, how it is found again."""

from dcscale.checkpoint.layout import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.lifecycle import Checkpoints
from dcscale.checkpoint.weights import load_weights, save_weights

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "checkpoints_of",
    "find_checkpoint",
    "load_weights",
    "save_weights",
]
