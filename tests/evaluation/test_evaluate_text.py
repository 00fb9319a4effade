"""Loss of a text with a sliding window, compared with predicting one token at a time."""

import math

import pytest
import torch

from dcscale.data import ByteTokenizer, DataError
from dcscale.evaluation import evaluate_text, read_text
from dcscale.testing.models import random_model, tiny_config

TEXT = "Köpfe werden gemischt, und "
IDS = list(TEXT.encode())


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocab_size=257))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def one_by_one(model, context, stride):
    """The mean loss, each token from the first window that predicts it."""
    total = 0.0
    for token in range(1, len(IDS)):
        window = 0
        while window * stride + context < token:
            window += 1
        context_ids = IDS[window * stride : token]
        assert len(context_ids) >= (context - stride + 1 if window else 1)
        with torch.no_grad():
            logits = model(torch.tensor([context_ids]))[0, -1]
        total -= float(logits.log_softmax(-1)[IDS[token]])
    return total / (len(IDS) - 1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(("context", "stride"), [(9, 4), (9, 9), (9, 1), (8, 3), (27, 5), (26, 5), (100, 50), (1, 1)])
def test_each_token_is_predicted_once(model, path, context, stride, batch_size):
    text = read_text(path, ByteTokenizer(), vocab_size=257, context=context, stride=stride)
    progress = []
    found = evaluate_text(model, text, batch_size=batch_size, on_progress=lambda *done: progress.append(done))
    assert found.tokens == len(IDS) - 1
    assert found.loss == pytest.approx(one_by_one(model, context, stride), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))  # a byte is a token
    assert (progress[0], progress[-1]) == ((0, len(IDS) - 1), (len(IDS) - 1, len(IDS) - 1))


def test_texts_that_are_rejected(path, tmp_path):
    def read(path, vocab_size=257, context=8, stride=4):
        return read_text(path, ByteTokenizer(), vocab_size=vocab_size, context=context, stride=stride)

    for stride in (0, 9):
        with pytest.raises(DataError, match=f"stride is {stride}, but must be from 1 to the context, 8"):
            read(path, stride=stride)
    with pytest.raises(DataError, match=r"text\.txt: the tokenizer gives token 195, but the model has 128 tokens"):
        read(path, vocab_size=128)
    with pytest.raises(DataError, match=r"absent: cannot be read as UTF-8 text: .*No such file"):
        read(tmp_path / "absent")
    path.write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"text\.txt: cannot be read as UTF-8 text: .*0xff"):
        read(path)
    path.write_text("a")
    with pytest.raises(DataError, match=r"text\.txt: has 1 tokens, but needs one more than the first"):
        read(path)


def test_a_byte_order_mark_is_not_text(path):
    settings = {"vocab_size": 257, "context": 100, "stride": 100}
    plain = read_text(path, ByteTokenizer(), **settings)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_text(path, ByteTokenizer(), **settings) == plain


def test_a_token_before_the_text(model, path):
    settings = {"vocab_size": 257, "context": 100, "stride": 100}
    found = evaluate_text(model, read_text(path, ByteTokenizer(), begin_id=256, **settings), batch_size=1)
    ids = torch.tensor([[256, *IDS]])
    with torch.no_grad():
        logits = model(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
    assert found.tokens == len(IDS)
    assert found.loss == pytest.approx(float(expected), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


@pytest.mark.parametrize(("scale", "loss"), [(math.nan, "nan"), (1e9, r"\d+.*")])
def test_a_broken_model_is_an_error(path, scale, loss):
    model = random_model(tiny_config(vocab_size=257))
    model.norm.weight.data.mul_(scale)
    text = read_text(path, ByteTokenizer(), vocab_size=257, context=8, stride=4)
    with pytest.raises(FloatingPointError, match=rf"text\.txt: the loss is {loss} nats/token: the model's weights"):
        evaluate_text(model, text, batch_size=2)
