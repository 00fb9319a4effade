"""Faults that cannot be made from outside: a rank that hangs, is slow, skips a collective, or computes NaN or a spike.

The server of a node (``warm.py``) calls :func:`install` in a rank before ``launch/train.py`` runs. A fault is a dict:

- ``kind``: a key of :data:`KINDS`
- ``rank``: whose fault it is; absent: every rank's
- ``step``: optimizer updates of this process that come before it; absent: in every step
- ``restart``: only if SLURM has requeued the job so often; absent: in every start
- ``seconds``, ``factor``, ``skip``: see the kind

When a fault happens, its rank appends the time (Unix seconds) to the file that FAULT_TIMES names.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

updates = 0
"""Optimizer updates that this process has tried to make."""


def install(faults: list[dict]) -> None:
    """Changes this process so that each of ``faults`` that is this rank's happens."""
    from dcscale.parallel.engine import Engine

    update = Engine.update

    def count(self: Any, *arguments: Any, **named: Any) -> Any:
        global updates
        updates += 1
        return update(self, *arguments, **named)

    Engine.update = count
    rank, restart = (int(os.environ.get(name, "0")) for name in ("SLURM_PROCID", "SLURM_RESTART_COUNT"))
    for fault in faults:
        if fault.get("rank", rank) == rank and fault.get("restart", restart) == restart:
            KINDS[fault["kind"]](fault)


def in_forward(fault: dict, change: Callable[[Callable], Any]) -> None:
    """Calls ``change(forward)`` instead of ``forward()``, the model's, in the first pass of a training step."""
    from dcscale.models import DCFormer

    forward = DCFormer.forward
    seen = -1

    def changed(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal seen
        if not self.training or seen == updates or fault.get("step", updates) != updates:
            return forward(self, *arguments, **named)
        seen = updates
        if "step" in fault:
            note()
        return change(lambda: forward(self, *arguments, **named))

    DCFormer.forward = changed


def note() -> None:
    """Writes down that the fault happens now."""
    with open(os.environ["FAULT_TIMES"], "a") as file:
        file.write(f"{time.time()}\n")


def pace(fault: dict) -> None:
    """Every step takes ``seconds`` longer."""

    def change(forward: Callable) -> Any:
        time.sleep(fault["seconds"])
        return forward()

    in_forward(fault, change)


def hang(fault: dict) -> None:
    """The main thread sleeps for ever, in Python."""

    def change(forward: Callable) -> Any:
        while True:
            time.sleep(1)

    in_forward(fault, change)


def hang_in_c(fault: dict) -> None:
    """The main thread waits for ever in C and keeps the interpreter's lock, so that no other thread can run."""

    def change(forward: Callable) -> Any:
        library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)  # unlike sleep, it is not ended by a signal

    in_forward(fault, change)


def scale_loss(fault: dict) -> None:
    """Loss and gradient of the pass are ``factor`` times what they should be; "nan" for NaN."""
    in_forward(fault, lambda forward: forward() * float(fault["factor"]))


def skip_collective(fault: dict) -> None:
    """The rank leaves out the step's collective number ``skip`` (from 0) of those named in ``torch.distributed``."""
    import torch.distributed as dist

    class Done:
        def wait(self, *arguments: Any) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    calls = 0

    def wrap(function: Callable) -> Callable:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if updates == fault["step"]:
                calls += 1
                if calls == fault["skip"] + 1:
                    note()
                    return Done() if named.get("async_op") else None
            return function(*arguments, **named)

        return changed

    for name in ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, wrap(getattr(dist, name)))


KINDS = {function.__name__: function for function in (pace, hang, hang_in_c, scale_loss, skip_collective)}
