"""Imports what every start of a run imports, for servers that fork ranks: these then start in a second, not in ten.

It takes some seconds, and starts no thread of Python or torch, so that a process may fork after it.
"""

from __future__ import annotations

import gc
import importlib
import sys

MODULES = (
    "dcscale.testing.runs",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",  # has all of torch.compile behind it, which every engine imports
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
)

for name in MODULES:
    importlib.import_module(name)
sys.modules["deepspeed.ops"].__compatible_ops__  # noqa: B018  # calls compilers, and keeps their answer
gc.collect()
gc.freeze()  # a fork's garbage collector leaves these pages to all
