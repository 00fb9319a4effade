"""Validation loss on one rank; tests/distributed compares numbers of ranks."""

from contextlib import contextmanager

import pytest
import torch

from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.parallel import Environment
from dcscale.testing.models import random_model, tiny_config
from dcscale.testing.runs import write_token_shards
from dcscale.train.hooks.validation import evaluate


class OneRank:
    """The part of an engine that evaluate() uses."""

    environment = Environment(0, 0, 1, 1, torch.device("cpu"))

    @contextmanager
    def evaluating(self):
        with torch.no_grad():
            yield random_model(tiny_config(vocab_size=257))

    def sum_over_ranks(self, values):
        return values

    def sum_tensor_over_ranks(self, tensor):
        return tensor


def test_sequences_without_targets_are_an_error(tmp_path):
    write_token_shards(tmp_path, [[[5]] * 12 + [[1, 2, 3, 4, 5]]])
    settings = {"seed": 0, "shuffle_shards": 1, "slots": 1, "document_mask": True, "verify": True, "shuffle": False}
    stream = open_stream(tmp_path, StreamConfig(vocab_size=257, sequence_length=4, **settings))
    batch = {"global_batch_size": 2, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    assert evaluate(OneRank(), BatchLoader(stream, limit=4, **batch)).targets == 4
    with pytest.raises(DataError, match=r"no targets to predict; raise validation\.sequences, or set"):
        evaluate(OneRank(), BatchLoader(stream, limit=1, **batch))
