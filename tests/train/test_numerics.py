"""Which steps are judged to be not finite or spikes, and what the run remembers of them."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest

from dcscale.config.schema import TrainConfig
from dcscale.train.numerics import FEWEST, WINDOW, Action, Numerics, judge, list_some, robust_score
from dcscale.train.state import TrainState

TARGETS = 4
LEVEL = [(2.0 + 0.01 * (n % 5), 1.0 + 0.02 * (n % 7)) for n in range(FEWEST)]
"""Losses and gradient norms of quiet steps."""


def judged(loss, grad_norm, recent=LEVEL, **policy):
    return judge(TrainConfig(**policy), recent, loss * TARGETS, TARGETS, grad_norm)


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (2.0, -1.0)])
@pytest.mark.parametrize(("policy", "action"), [("stop", Action.STOP), ("skip", Action.SKIP)])
@pytest.mark.parametrize("recent", [[], LEVEL])
def test_what_is_not_finite_has_no_update_whatever_came_before(values, policy, action, recent):
    found = judged(*values, recent, on_nonfinite=policy, on_spike="ignore")
    assert (found.action, found.finite, found.spike) == (action, False, False)
    assert found.reason == f"loss {values[0]:g}, gradient norm {values[1]:g}"


@pytest.mark.parametrize(
    ("policy", "action"),
    [("ignore", Action.UPDATE), ("warn", Action.UPDATE), ("skip", Action.SKIP), ("rollback", Action.ROLL_BACK)],
)
def test_a_spike_has_the_action_of_the_policy(policy, action):
    found = judged(2.02, 1000.0, on_spike=policy)
    assert (found.action, found.finite, found.spike) == (action, True, True)
    # log(1000 / 1.06) over 1.4826 times the median deviation of the logarithms, log(1.06 / 1.02).
    deviation = 1.4826 * math.log(1.10 / 1.06)
    assert found.score == pytest.approx(math.log(1000 / 1.06) / deviation)
    assert found.reason == f"gradient norm 1000, {found.score:.1f} robust standard deviations above the median of 1.06"


def test_loss_and_norm_are_both_named_if_both_are_spikes():
    reason = judged(20.0, 1000.0).reason
    assert reason.startswith("loss 20, ")
    assert " above the median of 2.02 and gradient norm 1000, " in reason


@pytest.mark.parametrize("values", [(2.02, 1.06), (0.1, 0.001), (2.1, 1.2)])
def test_quiet_steps_and_those_that_are_lower_are_no_spikes(values):
    found = judged(*values, on_spike="rollback")
    assert (found.action, found.spike, found.reason) == (Action.UPDATE, False, None)


def test_the_score_must_be_more_than_spike_score():
    score = judged(2.02, 3.0).score
    assert judged(2.02, 3.0, spike_score=score).reason is None
    assert judged(2.02, 3.0, spike_score=score * 0.999).reason is not None


def test_a_step_is_judged_only_if_there_are_enough_to_compare_with():
    assert judged(200.0, 1000.0, LEVEL[1:]).score is None
    assert judged(200.0, 1000.0, LEVEL[1:]).action is Action.UPDATE
    assert judged(200.0, 1000.0, LEVEL).spike


@pytest.mark.parametrize("level", [2.0, 0.0])
def test_values_that_never_change_still_have_a_score(level):
    assert robust_score(level, [level] * FEWEST) == 0
    assert robust_score(level * 1.005 + 1e-31, [level] * FEWEST) < 10
    assert 10 < robust_score(level + 1, [level] * FEWEST) < math.inf


def test_outliers_among_the_earlier_steps_do_not_hide_a_spike():
    assert judged(2.02, 50.0, [*LEVEL, *[(50.0, 1000.0)] * 8]).spike


def test_noise_and_learning_are_no_spikes():
    """A loss that falls as in training, with normal noise, and norms with a long tail: 5,000 steps, no false alarm."""
    generator, numerics, found = random.Random(0), Numerics(), []
    for step in range(5000):
        loss = 2 + 8 / (1 + step / 20) + generator.gauss(0, 0.05)
        found.append(judged(loss, generator.lognormvariate(0, 0.4), numerics.recent))
        numerics.count(found[-1], restart_after=10)
    assert [judgement.reason for judgement in found if judgement.spike] == []
    assert len(numerics.recent) == WINDOW


QUIET, SPIKE, NOT_FINITE = judged(2.03, 1.05), judged(2.0, 1000.0), judged(math.nan, 1.0, on_nonfinite="skip")
SKIPPED_SPIKE = replace(SPIKE, action=Action.SKIP)


def test_only_updates_that_are_no_spikes_are_compared_with_later():
    numerics = Numerics([(0.0, 0.0), *[(1.0, 1.0)] * (WINDOW - 1)])
    for judgement in (SPIKE, SKIPPED_SPIKE, NOT_FINITE):
        numerics.count(judgement, restart_after=10)
    assert numerics.recent[0] == (0.0, 0.0)
    numerics.count(QUIET, restart_after=10)
    assert numerics.recent == [*[(1.0, 1.0)] * (WINDOW - 1), (2.03, 1.05)]


def test_counts():
    numerics, seen = Numerics(), []
    for judgement in (SPIKE, SKIPPED_SPIKE, NOT_FINITE, NOT_FINITE, QUIET, SPIKE):
        numerics.count(judgement, restart_after=10)
        seen.append((numerics.spikes, numerics.spikes_in_a_row, numerics.skipped_updates, numerics.skipped_in_a_row))
    assert seen == [(1, 1, 0, 0), (2, 2, 1, 1), (2, 0, 2, 2), (2, 0, 3, 3), (2, 0, 3, 0), (3, 1, 3, 0)]


def test_after_spikes_in_a_row_with_updates_the_comparison_begins_again():
    numerics = Numerics(list(LEVEL))
    assert [numerics.count(SPIKE, restart_after=3) for _ in range(3)] == [False, False, True]
    assert (numerics.recent, numerics.spikes_in_a_row, numerics.spikes) == ([], 0, 3)


def test_after_skipped_spikes_it_does_not():
    numerics = Numerics(list(LEVEL))
    assert [numerics.count(SKIPPED_SPIKE, restart_after=3) for _ in range(4)] == [False] * 4
    assert numerics.recent == LEVEL


def test_the_state_survives_a_checkpoint_bit_for_bit():
    numerics = Numerics([(0.1 + 0.2, 1 / 3)], 1, 2, 3, 4, [{"step": 5, "reason": "loss nan", "sequences": [8, 16]}])
    state = TrainState(step=7, numerics=numerics, passed_over=[{"step": 6, "reason": "loss 9", "first": 8, "end": 16}])
    assert TrainState.from_json(json.loads(json.dumps(asdict(state)))) == state


def test_older_checkpoints_have_no_such_state_and_newer_ones_may_have_more():
    assert TrainState.from_json({"step": 7, "numerics": {"spikes": 2, "later": 1}}).numerics == Numerics(spikes=2)
    assert TrainState.from_json({"step": 7}).numerics == Numerics()


@pytest.mark.parametrize(("count", "text"), [(1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, 1 more")])
def test_only_some_of_a_long_list_are_named(count, text):
    assert list_some(range(count), most=3) == text
