"""Loss over shards, and shards that are rejected. tests/end_to_end/test_evaluate.py compares with validation."""

import pytest
import torch

from dcscale.data import DataError
from dcscale.evaluation import evaluate_shards, open_shards
from dcscale.testing.models import random_ids, random_model, tiny_config
from dcscale.testing.runs import write_token_shards


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_all_sequences_of_a_document(tmp_path, batch_size):
    model = random_model(tiny_config(vocab_size=257))
    ids = random_ids(model.config, 1, 41)
    write_token_shards(tmp_path, [[ids[0].tolist()]])
    progress = []
    stream = open_shards(str(tmp_path), vocab_size=257, context=8, document_mask=True)
    found = evaluate_shards(model, stream, batch_size=batch_size, on_progress=lambda *done: progress.append(done))
    with torch.no_grad():
        expected = model(ids[:, :40].reshape(5, 8), ids[:, 1:].reshape(5, 8).contiguous()) / 40
    assert (found.name, found.tokens) == (str(tmp_path), 40)
    assert (found.sequences, found.of_sequences) == (5, 5)
    assert found.loss == pytest.approx(float(expected), rel=1e-12)
    assert found.bits_per_byte is not None
    assert (progress[0], progress[-1]) == ((0, 5), (5, 5))
    fewer = evaluate_shards(model, stream, batch_size=batch_size, sequences=2)
    assert (fewer.tokens, fewer.sequences, fewer.of_sequences) == (16, 2, 5)
    assert evaluate_shards(model, stream, batch_size=batch_size, sequences=99) == found


def test_shards_of_another_tokenizer(tmp_path):
    write_token_shards(tmp_path, [[[1, 2, 3, 4, 5, 6]]])
    settings = {"context": 2, "document_mask": True}
    with pytest.raises(DataError, match="the model was trained with 00ff: token ids would decode to different text"):
        open_shards(str(tmp_path), vocab_size=257, model_tokenizer={"fingerprint": "00ff"}, **settings)
    open_shards(str(tmp_path), vocab_size=257, model_tokenizer={"spec": "byte", "eos_id": 256}, **settings)
    with pytest.raises(DataError, match=r"vocab_size is 257, but model\.vocab_size is 60"):
        open_shards(str(tmp_path), vocab_size=60, **settings)


def test_sequences_without_targets_are_an_error(tmp_path):
    write_token_shards(tmp_path, [[[5]] * 12 + [[1, 2, 3, 4, 5]]])
    stream = open_shards(str(tmp_path), vocab_size=257, context=4, document_mask=True)
    model = random_model(tiny_config(vocab_size=257))
    assert evaluate_shards(model, stream, batch_size=2).tokens == 4
    with pytest.raises(DataError, match="1 of its sequences have no targets to predict; use more sequences"):
        evaluate_shards(model, stream, batch_size=2, sequences=1)
