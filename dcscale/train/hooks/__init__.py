"""The features of a training run, each beside the loop and with its own state."""

from dcscale.train.hooks.base import Hook, Record, due
from dcscale.train.hooks.compose_distance import ComposeDistance
from dcscale.train.hooks.data_epochs import DataEpochs
from dcscale.train.hooks.samples import Samples
from dcscale.train.hooks.saving import Saving
from dcscale.train.hooks.skipped_data import SkippedData
from dcscale.train.hooks.throughput import Throughput, peak_memory_gib, peak_tflops
from dcscale.train.hooks.validation import Validation

__all__ = [
    "ComposeDistance",
    "DataEpochs",
    "Hook",
    "Record",
    "Samples",
    "Saving",
    "SkippedData",
    "Throughput",
    "Validation",
    "due",
    "peak_memory_gib",
    "peak_tflops",
]
