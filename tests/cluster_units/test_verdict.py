"""Who is at fault is judged from what the ranks say; the cases that real processes do not show in seconds."""

import json

import pytest

from dcscale.cluster.flight_recorder import Collective
from dcscale.cluster.hang_report import process_text
from dcscale.cluster.verdict import Answer, Status, judge, rank_lines, ranks_text


def status(rank, step=6, phase="step", seconds=31.0, groups=(("0", 88), ("1", 12)), ending=False):
    return Status(rank, f"n{rank}", 100 + rank, "pid:[1]", step, phase, seconds, dict(groups), ending)


def collective(sequence, group="0", op="all_reduce", sizes=((4096,),), created=50.0, done=False):
    return Collective(group, sequence, op, [list(size) for size in sizes], created, done)


def answer(own, waiting=None, members=None, deviation=None, processes=None, latest=None, unlikeness=0):
    return Answer(own, "dcformer.py:41 in forward", waiting, members, latest, deviation, processes or {}, unlikeness)


def judged(*answers, lost=(), silent=None, over=()):
    statuses = {one.status.rank: one.status for one in answers} | {one.rank: one for one in lost}
    return judge(statuses, {one.status.rank: one for one in answers}, silent or {}, over)


IN_88 = (("0", 88), ("1", 12))
BEHIND = (("0", 87), ("1", 12))


def test_a_rank_that_does_not_answer_comes_before_all_others():
    waits = answer(status(0, groups=IN_88), collective(88), processes={1: process_text("T")})
    verdict = judged(waits, lost=[status(1, groups=BEHIND)], silent={1: 32.4}, over=[0])
    assert (verdict.ranks, verdict.host) == ([1], "n1")
    assert verdict.reason == (
        "rank 1 (n1, pid 101) does not answer: no heartbeat for 32 s, the last one in step 7, phase step; its process "
        "is stopped, as by SIGSTOP or Ctrl-Z"
    )


def test_a_rank_that_never_sent_a_heartbeat_has_no_process_id():
    verdict = judged(answer(status(0)), lost=[Status(1, "n1", 0, "", 0, "start", 0.0, {})], silent={1: 121.0})
    assert verdict.reason == "rank 1 (n1) does not answer: no heartbeat for 121 s, the last one in step 1, phase start"


def test_many_lost_ranks_are_counted():
    verdict = judged(answer(status(0)), lost=[status(rank) for rank in range(1, 9)], silent={1: 30.0})
    assert verdict.ranks == list(range(1, 9))
    assert "rank 4 (n4, pid 104) and 4 more do not answer: no heartbeat for 30 s" in verdict.reason


def test_a_rank_outside_of_collectives_for_which_others_wait():
    waits = [answer(status(rank, groups=IN_88), collective(88, created=rank)) for rank in (0, 1, 3)]
    verdict = judged(*waits, answer(status(2, groups=BEHIND)), over=[0, 1, 2, 3])
    assert verdict.ranks == [2]
    assert verdict.reason == (
        "rank 2 (n2, pid 102) hangs outside of collectives: step 7, phase step, for 31 s, at dcformer.py:41 in "
        "forward; ranks 0-1, 3 wait for it in all_reduce 88 of group 0 (4096)"
    )


def test_waiting_for_a_rank_that_waits_itself_leads_to_the_last_of_them():
    """Rank 0 waits for rank 1 in one group, rank 1 for rank 2 in another."""
    verdict = judged(
        answer(status(0, groups=(("0", 88), ("2", 4))), collective(88), members=[0, 1]),
        answer(status(1, groups=(("0", 87), ("2", 5))), collective(5, "2"), members=[1, 2]),
        answer(status(2, groups=(("2", 4),))),
        over=[0, 1, 2],
    )
    assert verdict.ranks == [2]
    assert "rank 1 waits for it in all_reduce 5 of group 2" in verdict.reason


def test_a_rank_outside_of_a_group_is_not_missed_in_it():
    verdict = judged(
        answer(status(0, groups=(("2", 5),)), collective(5, "2", created=1.0), members=[0, 1]),
        answer(status(1, groups=(("2", 5),)), collective(5, "2", created=2.0), members=[0, 1]),
        answer(status(2, groups=(("0", 88),)), collective(88, created=0.0)),
        over=[0],
    )
    assert verdict.ranks == [2]  # it is elsewhere than most
    assert "is in all_reduce 88 of group 0 (4096), most ranks in all_reduce 5 of group 2 (4096)" in verdict.reason


def test_all_ranks_outside_of_collectives():
    verdict = judged(answer(status(0)), answer(status(1)), over=[1])
    assert verdict.ranks == [1]
    assert verdict.reason.endswith(
        "hangs outside of collectives: step 7, phase step, for 31 s, at dcformer.py:41 in forward"
    )


def skipped(deviations):
    """Rank 1 has left out a collective and waits in the next step; rank 0 still waits for the last of this one."""
    return (
        answer(status(0, groups=(("0", 88), ("1", 12))), collective(88), deviation=deviations[0]),
        answer(status(1, 7, "data", groups=(("0", 87), ("1", 13))), collective(13, "1"), deviation=deviations[1]),
    )


def test_a_rank_that_left_out_a_collective():
    verdict = judged(*skipped([None, "left out all_reduce 80 of group 0 (4096) of a step before"]), over=[0])
    assert verdict.ranks == [1]
    assert verdict.reason == (
        "rank 1 (n1, pid 101) left out all_reduce 80 of group 0 (4096) of a step before; "
        "so the ranks wait for each other"
    )


@pytest.mark.parametrize("wrong", [0, 1])
def test_in_a_step_that_is_new_to_all_the_rank_that_deviates_most(wrong):
    answers = []
    for rank in (0, 1):
        waiting = collective(88, sizes=[[2]] if rank == wrong else [[1]])
        answers.append(answer(status(rank), waiting, deviation="started", unlikeness=3 + (rank == wrong)))
    assert judged(*answers, over=[0, 1]).ranks == [wrong]


@pytest.mark.parametrize("deviations", [(None, None), ("left out a", "left out a")])
def test_two_ranks_of_which_none_is_known_to_be_wrong(deviations):
    verdict = judged(*skipped(deviations), over=[0])
    assert verdict.ranks == [0]  # it has done less
    assert "wait for each other in different collectives; rank 0 (n0, pid 100) has done the least" in verdict.reason


def test_the_rank_whose_collective_is_unlike_that_of_most():
    same = [answer(status(rank), collective(88)) for rank in (0, 1, 3)]
    verdict = judged(*same, answer(status(2), collective(88, sizes=[[7]])), over=[0])
    assert verdict.ranks == [2]
    assert "is in all_reduce 88 of group 0 (7), most ranks in all_reduce 88 of group 0 (4096)" in verdict.reason


def test_all_ranks_in_one_collective_that_does_not_complete():
    verdict = judged(*[answer(status(rank), collective(88, created=created)) for rank, created in enumerate((5, 9, 7))])
    assert verdict.ranks == [1]
    assert "as when the network between them fails; rank 1 (n1, pid 101) entered it last" in verdict.reason


def test_a_heartbeat_that_came_back_in_the_last_moment():
    verdict = judged(answer(status(0)), answer(status(1)), silent={1: 31.0})
    assert (verdict.ranks, verdict.reason) == ([1], "rank 1 (n1, pid 101) had no heartbeat for 31 s")


def test_ranks_that_do_the_same_share_a_line():
    answers = {rank: answer(status(rank), collective(88)) for rank in (0, 1, 3)}
    answers[2] = answer(status(2), latest=collective(87, done=True))
    statuses = {rank: one.status for rank, one in answers.items()} | {4: status(4)}
    assert rank_lines(statuses, answers) == [
        "ranks 0-1, 3: step 7, phase step, waits in all_reduce 88 of group 0 (4096)",
        "rank 2: step 7, phase step, in no collective, at dcformer.py:41 in forward; its last collective, "
        "all_reduce 87 of group 0 (4096), is done",
        "rank 4: no answer; last collectives that it had started by its last heartbeat: 88 in group 0, 12 in group 1",
    ]
    each = {rank: answer(status(rank), collective(rank)) for rank in range(20)}
    lines = rank_lines({rank: one.status for rank, one in each.items()}, each, most=3)
    assert len(lines) == 4
    assert lines[-1] == "17 more, each in something else"


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([2, 0, 1], "ranks 0-2"), ([0, 2, 3], "ranks 0, 2-3"), ([1, 9], "ranks 1, 9")]
)
def test_ranges_of_ranks(ranks, text):
    assert ranks_text(ranks) == text


@pytest.mark.parametrize(
    ("state", "text"), [("", "its process is gone"), ("T", "SIGSTOP"), ("t", "debugger"), ("D", "disk"), ("S", "in C")]
)
def test_what_the_state_of_a_process_means(state, text):
    assert text in process_text(state)


def test_answers_survive_json():
    one = answer(status(1), collective(88), [0, 1], "left out b", {2: "its process is gone"}, collective(88))
    assert Answer.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Answer.from_json(json.loads(json.dumps(answer(status(1)).to_json()))) == answer(status(1))
