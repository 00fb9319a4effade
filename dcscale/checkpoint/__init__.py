"""Checkpoints: what is in one, how it is written without ever leaving half of one, how it is found again."""

from dcscale.checkpoint.checkpointer import Checkpoints
from dcscale.checkpoint.layout import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.weights import Weights, save_weights

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Weights",
    "checkpoints_of",
    "find_checkpoint",
    "save_weights",
]
