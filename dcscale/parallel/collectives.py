"""Words between ranks: decide once for all, fail together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """Other ranks failed while this one did not."""


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Tells every rank what each has, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_errors(error: str | None, group: dist.ProcessGroup | None = None) -> str:
    """Tells every rank which ranks failed and why, as ``rank 1: REASON; rank 3: REASON``; empty when none did."""
    said = gather_objects(error, group)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None)


def run_on_all_ranks(call: Callable[[], T]) -> T:
    """Returns ``call()``, which every rank makes for itself; if it fails on any rank, all raise.

    Raises:
        RankError: on the ranks where it did not fail; the others raise their own error.
    """
    result: T | None = None
    own: Exception | None = None
    try:
        result = call()
    except Exception as error:  # told to every rank and raised below
        own = error
    errors = gather_errors(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    if errors:
        raise RankError(errors)
    return result  # type: ignore[return-value]


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Calls ``decide`` on rank 0 and returns its result, or raises its error, on every rank.

    For what depends on a disk or a clock, of which ranks may see different states.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as error:  # raised below on every rank
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
