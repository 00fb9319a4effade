"""Validation loss on one rank; tests/distributed compares numbers of ranks."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from dcscale.data import BatchLoader, StreamConfig, open_stream
from dcscale.parallel import Environment
from dcscale.testing.models import random_model, tiny_config
from dcscale.testing.runs import write_token_shards
from dcscale.train.hooks.validation import Validation, evaluate


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


class OneStep(OneRank):
    """The part of a trainer that the hook uses, after step 7."""

    def __init__(self):
        self.engine, self.state = self, SimpleNamespace(step=7, validation_loss=None)
        self.records, self.warnings = [], []
        self.report, self.warn = self.records.append, self.warnings.append


def test_sequences_without_targets_have_no_loss(tmp_path):
    write_token_shards(tmp_path, [[[5]] * 12 + [[1, 2, 3, 4, 5]]])
    settings = {"seed": 0, "shuffle_shards": 1, "slots": 1, "document_mask": True, "verify": True, "shuffle": False}
    stream = open_stream(tmp_path, StreamConfig(vocab_size=257, sequence_length=4, **settings))
    batch = {"global_batch_size": 2, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    assert evaluate(OneRank(), BatchLoader(stream, limit=4, **batch)).targets == 4
    assert evaluate(OneRank(), BatchLoader(stream, limit=1, **batch)) is None

    trainer, found = OneStep(), {}
    for limit in (4, 1):
        hook = Validation(BatchLoader(stream, limit=limit, **batch), 7, text_bytes_per_target=None)
        hook.load_state_dict({"done_at": 6, "last": {"validation_loss": 9.0}})
        hook.after_step(trainer)
        found[limit] = hook.summary(trainer)
        assert hook.state_dict() == {"done_at": 7, "last": found[limit]}
    assert trainer.records == [{"step": 7, "validation_loss": trainer.state.validation_loss}]
    assert found == {4: {"validation_loss": trainer.state.validation_loss}, 1: {}}
    assert trainer.warnings == [
        "step 7 has no validation loss: the sequences of data.validation that are used have no target to predict; "
        "raise validation.sequences, or set validation.interval=0"
    ]
