"""Accuracy on marked answers, against the model asked text by text and token by token."""

import json

import pytest
import torch

from dcscale.data import DataError
from dcscale.evaluation import Accuracy, evaluate_tasks, read_tasks
from dcscale.testing.models import lively_model, tiny_config


class Letters:
    """Tokens that are letters: enough of a tokenizer for this."""

    def encode_with_places(self, text):
        return [ord(letter) - 0x4E00 for letter in text], [(i, i + 1) for i in range(len(text))]


def letters(*ids):
    return "".join(chr(0x4E00 + i) for i in ids)


@pytest.fixture(scope="module")
def model():
    return lively_model(tiny_config(), dtype=torch.float32)


def likeliest(model, ids):
    with torch.no_grad():
        return int(model(torch.tensor([ids]))[0, -1].argmax())


def text_with_answers(model, begin, pattern):
    """A marked text, ids 0 to 60; ``pattern``: for each answer which of its tokens the model gets right."""
    ids, marked = list(begin), letters(*begin)
    for answer in pattern:
        own = []
        for right in answer:
            best = likeliest(model, ids + own)
            own.append(best if right else (best + 1) % 61)
        ids += [*own, 7]
        marked += f"[ {letters(*own)} ]{letters(7)}"
    return marked


PATTERNS = [("a", [[1], [1, 0, 1]]), ("b", [[1, 1]]), ("a", [[0], [1, 1], [1]]), ("b", [[0, 1]]), ("c", [[0]])]
EXPECTED = {
    "a": Accuracy(texts=2, answers=5, answers_right=3, tokens=8, tokens_right=6),
    "b": Accuracy(texts=2, answers=2, answers_right=1, tokens=4, tokens_right=3),
    "c": Accuracy(texts=1, answers=1, tokens=1),
}


@pytest.fixture
def tasks(model, tmp_path):
    path = tmp_path / "tasks.jsonl"
    with open(path, "w") as lines:
        for number, (task, pattern) in enumerate(PATTERNS):
            texts = text_with_answers(model, range(1, 4 + 3 * number), pattern)
            lines.write(json.dumps({"task_id": task, "texts": texts}) + "\n")
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_counts_of_texts_of_different_lengths(model, tasks, batch_size):
    told = []
    texts = read_tasks(tasks, Letters(), vocab_size=61, context=100)
    found = evaluate_tasks(model, texts, batch_size=batch_size, told=lambda *done: told.append(done))
    assert list(found.items()) == list(EXPECTED.items())
    assert (told[0], told[-1]) == ((0, 5), (5, 5))
    whole = sum(found.values(), Accuracy())
    assert (whole.answer_accuracy, whole.token_accuracy) == (4 / 8, 9 / 13)


def test_a_token_before_each_text(model, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"task_id": "t", "texts": text_with_answers(model, [60, 5], [[1, 1], [1]])[1:]}) + "\n")
    texts = read_tasks(path, Letters(), vocab_size=61, context=100, begin_id=60)
    assert evaluate_tasks(model, texts, batch_size=1)["t"].tokens_right == 3


def test_texts_that_are_refused(tasks):
    with pytest.raises(DataError, match=r"tasks.jsonl, line 3: takes 14 tokens up to its last answer, but the context"):
        read_tasks(tasks, Letters(), vocab_size=61, context=13)
    with pytest.raises(DataError, match=r"tasks.jsonl, line 1: the tokenizer gives token \d+, but the model has 5 tok"):
        read_tasks(tasks, Letters(), vocab_size=5, context=100)


def test_a_broken_model_is_told(tasks):
    model = lively_model(tiny_config(), dtype=torch.float32)
    model.norm.weight.data.fill_(torch.inf)
    texts = read_tasks(tasks, Letters(), vocab_size=61, context=100)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        evaluate_tasks(model, texts, batch_size=4)
