"""Slow ranks are named, equal ranks are not; the times of each rank are in its event file."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dcscale.observe.events import EventFile, event_path, read_events
from dcscale.parallel import PHASES, Environment
from dcscale.train.hooks.stragglers import Straggler, StragglerFinder, Stragglers, median_of_others

MEANS_P = np.array([0.01, 0.2, 0.4, 0.05])
"""Seconds of the phases of a step."""
BLOCK = 10


def step_times(generator, ranks, steps, noise, kind="independent"):
    """Times of equal ranks [R, S, P]; every step takes all of them a different time, by ``noise`` and more."""
    of_rank_RS = generator.normal(0, noise, (ranks, steps))
    if kind == "lasting":  # a rank that is slow in a step is mostly slow in the next one: for about ten steps
        for step in range(1, steps):
            of_rank_RS[:, step] = 0.8 * of_rank_RS[:, step - 1] + 0.6 * of_rank_RS[:, step]
    if kind == "heavy tails":
        of_rank_RS = noise * generator.standard_t(2.5, (ranks, steps))
    times_RS = np.exp(of_rank_RS + generator.normal(0, 0.2, (1, steps)))
    if kind == "pauses":  # garbage collection, page cache: one step in twenty takes three times as long
        times_RS = times_RS * np.where(generator.random((ranks, steps)) < 0.05, 3, 1)
    return times_RS[:, :, None] * MEANS_P


def found(times_RSP, finder=None):
    """(steps done, stragglers) of each block."""
    finder = finder or StragglerFinder()
    ends = range(BLOCK, times_RSP.shape[1] + 1, BLOCK)
    return [(end, finder.add(times_RSP[:, end - BLOCK : end])) for end in ends]


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_the_median_of_the_other_ranks(ranks):
    values = np.random.default_rng(0).integers(0, 9, (ranks, 5, 2)).astype(float)  # with equal ones
    expected = [np.median(np.delete(values, rank, axis=0), axis=0) for rank in range(ranks)]
    np.testing.assert_array_equal(median_of_others(values), np.stack(expected))


@pytest.mark.parametrize("slow_from", [0, 137])
@pytest.mark.parametrize(("ranks", "noise"), [(2, 0.02), (4, 0.03), (64, 0.04)])
@pytest.mark.parametrize("phase", range(4), ids=PHASES)
def test_a_rank_that_is_10_percent_slower_is_named_within_50_steps(ranks, noise, slow_from, phase):
    times_RSP = step_times(np.random.default_rng(phase), ranks, slow_from + 50, noise)
    extra = 0.1 * MEANS_P.sum()
    times_RSP[1, slow_from:, phase] += extra * times_RSP[1, slow_from:, phase] / MEANS_P[phase]
    *before, (_, stragglers) = found(times_RSP)
    (slow,) = stragglers
    assert slow.rank == 1
    assert slow.phase == PHASES[phase]
    assert slow.excess == pytest.approx(0.1, abs=0.03)
    assert slow.seconds == pytest.approx(0.66 * 1.1, rel=0.2)
    assert slow.phase_seconds == pytest.approx(extra, rel=0.4)
    assert all(not stragglers for step, stragglers in before if step <= slow_from)


def test_all_ranks_of_a_slow_node_are_named_slowest_first():
    times_RSP = step_times(np.random.default_rng(0), 16, 40, 0.02)
    times_RSP[8:12] *= np.array([1.2, 1.3, 1.5, 1.4])[:, None, None]
    assert [slow.rank for slow in found(times_RSP)[-1][1]] == [10, 11, 9, 8]


@pytest.mark.parametrize("kind", ["independent", "pauses", "heavy tails", "lasting"])
@pytest.mark.parametrize("ranks", [2, 64])
def test_equal_ranks_are_never_named_however_noisy(ranks, kind):
    named = 0
    for seed, noise in enumerate([0.03, 0.05, 0.2]):
        times_RSP = step_times(np.random.default_rng(seed), ranks, 1000, noise, kind)
        named += sum(len(stragglers) for _, stragglers in found(times_RSP))
    assert named == 0


def test_less_than_a_millisecond_is_no_matter():
    times_RSP = step_times(np.random.default_rng(0), 4, 40, 0.01) / 660  # steps of a millisecond
    times_RSP[1] *= 1.5
    assert found(times_RSP)[-1][1] == []
    assert [slow.rank for slow in found(times_RSP * 3)[-1][1]] == [1]


class Fakes:
    """The trainers of all ranks; ``own`` are the seconds that each takes for a step in the phases."""

    def __init__(self, run, own):
        self.own, self.warnings, self.ranks = own, [], []
        self.busy = False
        for rank in range(len(own)):
            trainer = SimpleNamespace(
                environment=Environment(rank, 0, len(own), 1, torch.device("cpu")),
                state=SimpleNamespace(step=0),
                step_seconds=1.0,
                checkpointer=self,
                events=EventFile(event_path(run, rank), pytest.fail),
                warn=self.warnings.append,
            )
            trainer.engine = SimpleNamespace(
                clock=SimpleNamespace(pop=lambda rank=rank: (list(self.own[rank]), 0.25)),
                gather_objects=lambda value: [f"n{number}" for number in range(len(own))],
                gather_on_rank0=lambda tensor, rank=rank: self._gather(tensor, rank),
            )
            self.ranks.append((trainer, Stragglers(interval=4, block=2)))
        self._gathered = []

    def _gather(self, tensor, rank):
        self._gathered.append(tensor)  # ranks are called from the last to the first
        if rank != 0:
            return None
        tensors, self._gathered = self._gathered[::-1], []
        return tensors

    def steps(self, count):
        for _ in range(count):
            for trainer, hook in reversed(self.ranks):
                trainer.state.step += 1
                hook.after_step(trainer)

    def record(self):
        record = {}
        self.ranks[0][1].add_to_record(self.ranks[0][0], record)
        return record


def test_a_rank_is_named_once_and_again_when_that_changes(tmp_path):
    usual, slow, slower = [0.0, 0.2, 0.3, 0.0], [0.0, 0.2, 0.4, 0.0], [0.0, 0.2, 0.6, 0.0]
    fakes = Fakes(tmp_path, [usual, usual, usual])
    fakes.steps(6)
    assert fakes.record() == {}
    fakes.steps(10)
    assert fakes.record() == {"slowest_rank": 0, "slowest_over_median": 1.0}
    fakes.own[2] = slow
    fakes.steps(40)
    assert fakes.record() == {"slowest_rank": 2, "slowest_over_median": pytest.approx(1.2)}
    fakes.own[2] = slower
    fakes.steps(40)
    fakes.own[2] = usual
    fakes.steps(40)
    fakes.own[1] = slow
    fakes.steps(40)
    assert fakes.warnings == [
        "rank 2 (n2) is 20% slower than the other ranks, which wait for it: 0.6 s a step up to step 22, 0.1 s longer "
        "in backward",
        "rank 2 (n2) is 60% slower than the other ranks, which wait for it: 0.8 s a step up to step 62, 0.3 s longer "
        "in backward",
        "rank 2 (n2) is no longer slower than the others, at step 102",
        "rank 1 (n1) is 20% slower than the other ranks, which wait for it: 0.6 s a step up to step 142, 0.1 s longer "
        "in backward",
    ]
    events = [event for event in read_events(event_path(tmp_path, 0)) if event["event"] != "steps"]
    assert [(event["event"], event["step"], event["rank"], event["host"]) for event in events] == [
        ("straggler", 22, 2, "n2"),
        ("straggler", 62, 2, "n2"),
        ("recovered", 102, 2, "n2"),
        ("straggler", 142, 1, "n1"),
    ]
    assert {key: events[0][key] for key in Straggler._fields} == {
        "rank": 2,
        "excess": pytest.approx(0.2),
        "seconds": pytest.approx(0.6),
        "phase": "backward",
        "phase_seconds": pytest.approx(0.1),
    }
    for rank in (1, 2):
        assert {event["event"] for event in read_events(event_path(tmp_path, rank))} == {"steps"}


def test_many_stragglers_are_not_a_line_each(tmp_path):
    fakes = Fakes(tmp_path, [[0.0, 0.2, 0.3, 0.0]] * 13 + [[0.0, 0.2, 0.9, 0.0]] * 12)
    fakes.steps(8)
    assert len(fakes.warnings) == 9
    assert fakes.warnings[-1] == "4 more ranks are slower than the others at step 8, see the events"
    events = [event for event in read_events(event_path(tmp_path, 0)) if event["event"] == "straggler"]
    assert [event["rank"] for event in events] == list(range(13, 25))


def test_steps_while_a_checkpoint_is_written_do_not_count(tmp_path):
    fakes = Fakes(tmp_path, [[0.0, 0.2, 0.9, 0.0], [0.0, 0.2, 0.3, 0.0]])
    fakes.busy = True
    fakes.steps(100)
    assert fakes.record() == {}
    fakes.busy = False
    fakes.steps(8)
    assert fakes.record()["slowest_rank"] == 0


def test_the_event_file_of_each_rank_has_the_means_of_its_steps(tmp_path):
    fakes = Fakes(tmp_path, [[0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.5, 0.0]])
    fakes.steps(4)
    fakes.own[1] = [0.5, 0.2, 0.5, 0.0]
    fakes.steps(6)
    for trainer, hook in fakes.ranks:
        hook.finish(trainer, completed=True)
        hook.finish(trainer, completed=True)  # what is written is not written again
    first, second, rest = read_events(event_path(tmp_path, 1))
    first.pop("time")
    counts, times = {"step": 4, "steps": 4}, {"data": 0.1, "forward": 0.2, "backward": 0.5, "update": 0.0}
    assert first == {"event": "steps", "seconds": 1.0, "waiting": 0.25} | counts | times
    assert [(event["step"], event["steps"], event["data"]) for event in (second, rest)] == [(8, 4, 0.5), (10, 2, 0.5)]


def test_a_single_rank_is_compared_with_nobody(tmp_path):
    fakes = Fakes(tmp_path, [[0.1, 0.2, 0.3, 0.0]])
    fakes.steps(20)
    assert fakes.record() == {}
    assert fakes.warnings == []
    assert len(read_events(event_path(tmp_path, 0))) == 5
