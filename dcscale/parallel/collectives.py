"""Collectives on Python objects, for decisions that all ranks share and for errors that must reach all ranks.

Without a process group, this process is the only rank.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcscale.files import may_succeed_later

T = TypeVar("T")


class RankError(RuntimeError):
    """Other ranks failed, but this one did not."""


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_errors(error: str | None) -> str:
    """Returns the errors of all ranks as ``rank 1: ERROR; rank 3: ERROR`` on every rank; empty if there are none."""
    errors = gather_objects(error)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None)


def run_on_all_ranks(call: Callable[[], T]) -> T:
    """Runs ``call`` on every rank and returns its own result; if it fails on any rank, raises on all.

    Raises:
        RankError: on ranks where it succeeded; the others raise their own error.
    """
    result: T | None = None
    own: Exception | None = None
    try:
        result = call()
    except Exception as error:  # sent to every rank and raised below
        own = error
    errors = gather_errors(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    if errors:
        raise RankError(errors)
    return result  # type: ignore[return-value]


def broadcast_from_rank0(call: Callable[[], T]) -> T:
    """Runs ``call`` on rank 0 only; returns its result, or raises its error, on every rank.

    For results that depend on a disk or a clock, which the ranks may see differently.
    """
    if not dist.is_initialized():
        return call()
    answer: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            answer[0] = call()
        except Exception as error:  # raised below on every rank
            error.retry = may_succeed_later(error)  # the other ranks do not get what it was raised from
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def set_timeouts(seconds: float) -> None:
    """Sets the timeout of later collectives in every process group of this rank, those that DeepSpeed made included.

    DeepSpeed reduces gradients in a group of its own, which has torch's timeout of 10 (NCCL) or 30 minutes (gloo)
    whatever was asked of ``init_process_group``.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
