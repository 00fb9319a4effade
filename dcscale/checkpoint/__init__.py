"""Checkpoints: their files, asynchronous crash-safe writing, finding and reading them."""

from dcscale.checkpoint.checkpointer import Checkpointer
from dcscale.checkpoint.layout import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.weights import Weights, save_weights

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Weights",
    "checkpoints_of",
    "find_checkpoint",
    "save_weights",
]
