"""Validation where nothing can be predicted."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dcscale.data import DataError, open_stream
from dcscale.data.loader import BatchLoader
from dcscale.testing.token_shards import write_token_shards
from dcscale.train.evaluate import evaluate


def test_held_out_data_without_a_target_are_named(tmp_path):
    write_token_shards(tmp_path, [[*[[256]] * 9, [1, 2, 3, 256]]])  # the empty documents come first
    settings = {"vocab_size": 257, "sequence_length": 4, "seed": 0, "shuffle_shards": 1, "slots": 1}
    loader = BatchLoader(
        open_stream(str(tmp_path), shuffle=False, document_mask=True, verify=True, **settings),
        global_batch_size=2,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        limit=1,
    )
    engine = SimpleNamespace(
        environment=SimpleNamespace(device=torch.device("cpu")),
        evaluating=lambda: contextlib.nullcontext(lambda *inputs: torch.zeros(())),
        sum_over_ranks=lambda values: values,
    )
    with pytest.raises(DataError, match="data.validation: there is nothing to predict in the sequences used"):
        evaluate(engine, loader)
