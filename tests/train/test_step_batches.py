"""What ranks agree on between two steps, by one sum of integers."""

from __future__ import annotations

import errno

import pytest

from dcscale.data import DataError
from dcscale.train.data import Requests, next_step_batches

NOTHING = [0] * (5 + len(Requests._fields))
"""Targets, padding, failures, failures that may be gone later, skipped shards, and the requests of a rank."""


class Engine:
    """This rank of two, with the integers of the other one."""

    def __init__(self, other=NOTHING):
        self.other = other

    def sum_over_ranks(self, values):
        return [own + other for own, other in zip(values, self.other, strict=True)]

    def gather_objects(self, error):
        return [error, "gone" if self.other[2] else None]


def failing(error):
    raise error
    yield


@pytest.mark.parametrize("number", range(len(Requests._fields)))
def test_what_any_rank_asks_for_all_do(number):
    asked = [int(position == number) for position in range(len(Requests._fields))]
    expected = Requests(*map(bool, asked))
    for engine, own in ((Engine([0] * 5 + asked), Requests()), (Engine(), expected)):
        assert next_step_batches(engine, iter([[]]), lambda own=own: own).requests == expected


def test_a_stop_request_interrupts_the_data_which_is_no_failure():
    interrupted = failing(DataError("cancelled"))
    assert next_step_batches(Engine(), interrupted, lambda: Requests(stop=True)).requests.stop


@pytest.mark.parametrize(
    ("error", "other", "retry"),
    [
        (DataError("data worker 7 died", retry=True), NOTHING, True),
        (OSError(errno.ESTALE, "Stale file handle"), NOTHING, True),
        (DataError("a shard is corrupt"), NOTHING, False),
        (DataError("data worker 7 died", retry=True), [0, 0, 1, 1, *NOTHING[4:]], True),
        (DataError("data worker 7 died", retry=True), [0, 0, 1, *NOTHING[3:]], False),
    ],
)
def test_another_start_may_succeed_only_if_it_may_on_every_rank(error, other, retry):
    with pytest.raises(DataError, match=r"rank 0: ") as raised:
        next_step_batches(Engine(other), failing(error))
    assert raised.value.retry is retry


def test_a_failure_of_another_rank_is_raised_here_too_and_names_it():
    with pytest.raises(DataError, match=r"^rank 1: gone$") as raised:
        next_step_batches(Engine([0, 0, 1, *NOTHING[3:]]), iter([[]]))
    assert raised.value.rank == 1
