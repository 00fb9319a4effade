"""The statistics of orders for which they are known."""

import numpy as np
import pytest

from dcscale.bench.data.order import LONG, compare_orders, shuffle_statistics


def test_a_random_order_is_as_good_as_random():
    topics = np.random.default_rng(0).standard_normal(64 * LONG * 20)
    found = shuffle_statistics(topics, 64)
    assert found["batch_variance"] == pytest.approx(1, abs=0.1)
    assert found["lag_1"] == pytest.approx(0, abs=0.1)
    assert found["stretch_variance"] == pytest.approx(1, abs=0.8)


def test_batches_of_one_topic_vary_like_single_documents():
    topics = np.repeat(np.random.default_rng(0).standard_normal(2000), 8)
    found = shuffle_statistics(topics, 8)
    assert found["batch_variance"] == pytest.approx(8, abs=0.1)
    assert found["lag_1"] == pytest.approx(0, abs=0.1)


def test_topics_that_span_two_batches_correlate():
    topics = np.repeat(np.random.default_rng(0).standard_normal(2000), 16)
    assert shuffle_statistics(topics, 8)["lag_1"] == pytest.approx(0.5, abs=0.05)


def test_equal_batches_do_not_vary():
    found = shuffle_statistics(np.tile([-1.0, 1.0], 600), 4)
    assert found["batch_variance"] == 0
    assert found["stretch_variance"] == 0


def test_too_few_batches_are_rejected():
    with pytest.raises(ValueError, match="10 documents are 2 batches of 4"):
        shuffle_statistics(np.arange(10.0), 4)
    assert shuffle_statistics(np.arange(12.0) % 5, 4)["stretch_variance"] is None


def test_orders_compare_as_expected():
    found = {row["order"]: row["batch_variance"] for row in compare_orders(256, documents=64)}
    assert found["random"] == pytest.approx(1, abs=0.1)
    assert found["dcscale, 64 slots, 2 shards, shuffled shards"] == pytest.approx(1, abs=0.1)
    assert found["webdataset, shards and a buffer of 1000"] > 2
