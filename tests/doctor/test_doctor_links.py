"""Links and clocks: which node is named, from made-up measurements and from sockets of this machine."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, permutations

import pytest

from dcscale.doctor.findings import Verdict
from dcscale.doctor.links import (
    Link,
    Meter,
    blame,
    disjoint_rounds,
    judge_clocks,
    judge_links,
    merge,
    pair_rounds,
    suspects,
)

NAMES = [f"n{number}" for number in range(1, 9)]
GIGABIT = 1.25e8


def links(count, *, slow=(), late=(), dead=(), skews=None):
    """All links between nodes, of 10 Gbit/s and 0.1 ms, but those (sender, receiver) that are named."""
    skews = skews or [0.0] * count
    return [
        Link(
            *pair,
            rate=0.0 if pair in dead else 0.02 * GIGABIT if pair in slow else 10 * GIGABIT,
            round_trip=None if pair in dead else 0.02 if pair in late else 1e-4,
            offset=None if pair in dead else skews[pair[1]] - skews[pair[0]],
            error="no connection: timed out" if pair in dead else None,
        )
        for pair in permutations(range(count), 2)
    ]


def bad(findings):
    return [(finding.check, finding.node) for finding in findings if finding.verdict is Verdict.BAD]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 31])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    rounds = pair_rounds(count)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    assert all(len({*sum(pairs, ())}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == count - 1 + count % 2


def test_of_many_nodes_each_meets_as_many_as_there_are_rounds():
    rounds = pair_rounds(128, 15)
    assert len(rounds) == 15
    assert all(len(pairs) == 64 for pairs in rounds)
    assert len({pair for pairs in rounds for pair in pairs}) == 15 * 64


def test_pairs_are_put_into_few_rounds():
    assert disjoint_rounds([(0, 1), (2, 3), (1, 2), (0, 1)]) == [[(0, 1), (2, 3)], [(1, 2)]]


@pytest.mark.parametrize("way", ["sends", "receives"])
def test_a_node_with_a_slow_link_is_named_alone(way):
    slow = [(2, other) for other in range(5) if other != 2]
    slow = slow if way == "sends" else [(other, node) for node, other in slow]
    findings = judge_links(links(5, slow=slow), NAMES)
    assert bad(findings) == [("link bandwidth", "n3")]
    assert f"{'to' if way == 'sends' else 'from'} n1: 0.02 Gbit/s" in findings[0].value
    assert "at least 5 Gbit/s" in findings[0].rule
    assert suspects(links(5, slow=slow)) == [(0, 2), (1, 2), (2, 3), (2, 4)]


def test_of_three_nodes_a_slow_one_is_named_though_most_links_are_slow():
    slow = [pair for other in (0, 1) for pair in ((2, other), (other, 2))]
    assert bad(judge_links(links(3, slow=slow), NAMES)) == [("link bandwidth", "n3")]


def test_two_slow_nodes_are_both_named():
    slow = [(node, other) for node in (3, 5) for other in range(8) if other != node]
    assert bad(judge_links(links(8, slow=slow), NAMES)) == [("link bandwidth", "n4"), ("link bandwidth", "n6")]


def test_of_one_bad_link_either_end_may_be_the_cause():
    findings = judge_links(links(3, dead=[(0, 1), (1, 0)]), NAMES)
    assert bad(findings) == [("link", "n1"), ("link", "n2")]
    assert findings[0].value == "to n2: no connection: timed out, from n2: no connection: timed out"
    assert "either end" in findings[0].way_out
    assert bad(judge_links(links(2, slow=[(1, 0)]), NAMES)) == [("link bandwidth", "n1"), ("link bandwidth", "n2")]


def test_a_slow_node_does_not_hide_a_dead_link_elsewhere():
    slow = [(3, other) for other in range(8) if other != 3]
    found = bad(judge_links(links(8, slow=slow, dead=[(0, 1), (1, 0)]), NAMES))
    assert found == [("link", "n1"), ("link", "n2"), ("link bandwidth", "n4")]


def test_a_late_link_is_found_and_slow_ones_are_not_late():
    late = [pair for other in (0, 1) for pair in ((2, other), (other, 2))]
    findings = judge_links(links(3, late=late), NAMES)
    assert bad(findings) == [("link latency", "n3")]
    assert findings[0].rule.startswith("round trips of at most 1 ms")


def test_all_links_slow_by_the_same_amount_are_slow():
    everywhere = list(permutations(range(3), 2))
    assert {node for _, node in bad(judge_links(links(3, slow=everywhere), NAMES))} == {"n1", "n2", "n3"}


def test_good_links_are_one_finding():
    (finding,) = judge_links(links(4), NAMES)
    assert (finding.verdict, finding.node) == (Verdict.GOOD, "all")
    assert "12 directions: 10 Gbit/s" in finding.value
    assert judge_links([], NAMES) == []


def test_a_cause_needs_more_than_half_of_its_pairs():
    measured = list(combinations(range(5), 2))
    assert blame([(0, 1), (0, 2)], measured) == ([], [0, 1, 2])
    assert blame([(0, 1), (0, 2), (3, 0)], measured) == ([0], [])
    assert blame([], measured) == ([], [])


def test_a_clock_that_is_wrong_is_named_also_if_it_is_that_of_rank_0():
    assert judge_clocks(links(3), NAMES)[0].verdict is Verdict.GOOD
    (finding,) = judge_clocks(links(4, skews=[5.0, 0.0, 0.1, 0.2]), NAMES)
    assert (finding.verdict, finding.check, finding.node) == (Verdict.BAD, "clock skew", "n1")
    assert finding.value == "4.900 s ahead of n3"
    (finding,) = judge_clocks(links(3, skews=[0.0, 0.0, -7.5]), NAMES)
    assert (finding.node, finding.value) == ("n3", "7.500 s behind n1")


def test_a_clock_is_compared_over_other_nodes_where_there_is_no_link():
    (finding,) = judge_clocks(links(3, dead=[(0, 2), (2, 0)], skews=[0.0, 0.0, 9.0]), NAMES)
    assert finding.node == "n3"
    assert judge_clocks(links(2, dead=[(0, 1), (1, 0)]), NAMES) == []


def test_the_best_of_several_measurements_counts():
    quick, slow = Link(0, 1, 5.0, 1e-3, 0.2), Link(0, 1, 9.0, 2e-3, 0.3)
    assert quick.better(slow) == slow.better(quick) == Link(0, 1, 9.0, 1e-3, 0.2)
    dead = Link(0, 1, error="no connection")
    assert dead.better(quick) == quick.better(dead) == quick


def measured(count, prepare=lambda meters, addresses: None, **settings):
    """All links between meters in this process, as their nodes would measure them."""
    meters = [Meter(number, b"t" * 16, seconds=0.05, patience=0.4, **settings) for number in range(count)]
    addresses = [("127.0.0.1", meter.port) for meter in meters]
    prepare(meters, addresses)
    found = []
    with ThreadPoolExecutor(count) as pool:
        for number, pairs in enumerate(pair_rounds(count)):
            calls = [
                pool.submit(meters[a].measure, b, addresses[b], number) for pair in pairs for a, b in (pair, pair[::-1])
            ]
            found += [link for call in calls for link in call.result()]
    for meter in meters:
        meter.__exit__()
    return merge(found)


def test_meters_measure_each_other():
    found = measured(3)
    assert [(link.sender, link.receiver) for link in found] == list(permutations(range(3), 2))
    assert all(link.error is None and link.rate > 1e6 and 0 < link.round_trip < 0.5 for link in found)
    assert all(abs(link.offset) < 0.5 for link in found)


def test_a_meter_measures_how_far_a_clock_is_ahead():
    def advance(meters, addresses):
        meters[1]._clock = lambda: 1000.0
        meters[0]._clock = lambda: 900.0

    forth, back = measured(2, advance)
    assert forth.offset == pytest.approx(100, abs=0.5)
    assert back.offset == pytest.approx(-100, abs=0.5)


def test_nobody_listens():
    def close(meters, addresses):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            addresses[1] = closed.getsockname()

    forth, back = measured(2, close)
    assert forth.error == "no connection: Connection refused"
    assert back.error is None


def test_a_node_that_accepts_but_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        forth, back = measured(2, lambda meters, addresses: addresses.__setitem__(1, silent.getsockname()))
    assert forth.error == "no answer: timed out"
    assert back.error is None


def test_strangers_are_sent_away():
    def connect(meters, addresses):
        for content in (b"GET / HTTP/1.1\r\n\r\n" + b"x" * 64, b""):
            stranger = socket.create_connection(addresses[1])
            stranger.sendall(content)
            threading.Timer(0.1, stranger.close).start()

    assert all(link.error is None for link in measured(2, connect))


def test_a_link_that_brings_nothing_is_dead():
    (link,) = merge([Link(0, 1, round_trip=1e-3, offset=0.0), Link(0, 1, rate=0.0)])
    assert link.error == "nothing arrives"
