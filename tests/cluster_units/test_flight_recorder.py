"""What torch's flight recorder says of the collectives of a process, and how the steps of a rank are compared."""

import json

import pytest
import torch

from dcscale.cluster import flight_recorder
from dcscale.cluster.flight_recorder import (
    Collective,
    deviation,
    recorded_collectives,
    started_collectives,
    unlikeness,
)


def collectives(*names):
    """One collective a second from second 1 on; ``-`` stands for nothing in that second."""
    return [
        Collective("0", number, name, [[4]], float(number), True)
        for number, name in enumerate(names, start=1)
        if name != "-"
    ]


FIRST, SECOND, THIRD = (1.0, 3.0), (4.0, 6.0), (7.0, 9.0)


@pytest.mark.parametrize(
    ("names", "last", "expected"),
    [
        ("abcabc", SECOND, None),
        ("abcab", (4.0, None), None),  # still running: the rest may come
        ("abcab", SECOND, "left out c 3 of group 0 (4) of a step before"),
        ("abca-c", SECOND, "started c 6 of group 0 (4) where steps before had b 2 of group 0 (4)"),
        ("ab-abc", SECOND, "started c 6 of group 0 (4), which no step before had"),
        ("ab-abc", (4.0, None), "started c 6 of group 0 (4), which no step before had"),
        ("abc", SECOND, "left out a 1 of group 0 (4) of a step before"),
    ],
)
def test_a_step_is_compared_with_the_step_before(names, last, expected):
    assert deviation(collectives(*names), [FIRST, last]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("abcbc-abc", None),
        ("abcbc-bc-", None),
        ("abcbc-ab-", "left out c 3 of group 0 (4) of a step before"),
    ],
)
def test_one_alike_among_the_steps_before_is_enough(names, expected):
    assert deviation(collectives(*names), [FIRST, SECOND, THIRD]) == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("abcd", 0),
        ("abc", 0),  # d may still come
        ("", 0),
        ("xbc", 1),  # a step of a new kind
        ("bcd", 1),
        ("xbd", 2),  # of a new kind, and c was left out
        ("abxcd", 1),
        ("abcdx", 1),
        ("xxx", 3),
    ],
)
def test_in_how_many_collectives_a_running_step_differs(last, expected):
    recorded = collectives(*"abcd", *"zzzz", *last)
    assert unlikeness(recorded, [(1.0, 4.0), (5.0, 8.0), (9.0, None)]) == expected


def test_what_a_complete_step_left_out_at_its_end_counts():
    recorded = collectives(*"abcd", *"xbc")
    assert unlikeness(recorded, [(1.0, 4.0), (5.0, 7.0)]) == 2
    assert unlikeness(recorded, [(1.0, 4.0)]) == unlikeness(recorded, []) == unlikeness([], []) == 0


def test_what_is_outside_of_the_steps_does_not_count():
    recorded = collectives("x", "a", "b", "y", "z", "a", "b", "v")
    assert deviation(recorded, [(2.0, 3.0), (6.0, 7.0)]) is None


@pytest.mark.parametrize(
    ("recorded", "steps"),
    [
        (collectives("-", "b", "c", "a"), [FIRST, SECOND]),  # the first one was overwritten already
        ([], [FIRST, SECOND]),
        (collectives("a", "b", "c", "a"), [FIRST]),
        (collectives("a", "b", "c", "a"), []),
    ],
)
def test_without_a_complete_record_nothing_deviates(recorded, steps):
    assert deviation(recorded, steps) is None


GLOO = {
    "pg_status": {"0": {"last_enqueued_collective": "7", "last_completed_collective": "6"}},
    "entries": [
        {
            "process_group": ["0", "default_pg"],
            "collective_seq_id": 7,
            "profiling_name": "gloo:all_reduce",
            "input_sizes": [[3, 2]],
            "time_created_ns": 2_500_000_000,
            "retired": False,
            "state": "scheduled",
            "is_p2p": False,
        }
    ],
}
NCCL = {
    "pg_status": {"1": {"last_enqueued_collective": "9", "last_completed_collective": "9"}},
    "entries": [
        {**GLOO["entries"][0], "process_group": ["1", "dp"], "state": "completed", "time_created_ns": 1_000_000_000},
        {**GLOO["entries"][0], "process_group": ["1", "dp"], "is_p2p": True},
    ],
}


def test_the_recorders_of_gloo_and_nccl_are_read_together(monkeypatch):
    c10d = torch._C._distributed_c10d
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda *arguments: json.dumps(GLOO).encode())
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda *arguments: json.dumps(NCCL).encode(), raising=False)
    assert started_collectives() == {"0": 7, "1": 9}
    first, second = recorded_collectives()
    assert (first.group, first.done, str(first)) == ("1", True, "all_reduce 7 of group 1 (3x2)")
    assert (second.group, second.done, second.created) == ("0", False, 2.5)


def test_a_torch_without_a_recorder_knows_nothing(monkeypatch):
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_fr_trace_json")
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", raising=False)
    assert started_collectives() == {}
    assert recorded_collectives() == []


def test_without_a_process_group_there_are_no_members():
    assert flight_recorder.members("0") is None
