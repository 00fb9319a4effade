"""Accuracy on marked answers, compared with predicting text by text and token by token."""

import json

import pytest
import torch

from dcscale.data import DataError
from dcscale.evaluation import Accuracy, evaluate_tasks, read_tasks
from dcscale.testing.models import random_model, tiny_config


class Letters:
    """A tokenizer with one token per character."""

    def encode_with_offsets(self, text):
        return [ord(letter) - 0x4E00 for letter in text], [(i, i + 1) for i in range(len(text))]


def letters(*ids):
    return "".join(chr(0x4E00 + i) for i in ids)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(), dtype=torch.float32)


def most_likely(model, ids):
    with torch.no_grad():
        return int(model(torch.tensor([ids]))[0, -1].argmax())


def text_with_answers(model, begin, pattern):
    """A marked text with ids 0 to 60. ``pattern``: for each answer, which of its tokens the model predicts right."""
    ids, marked = list(begin), letters(*begin)
    for answer in pattern:
        own = []
        for right in answer:
            best = most_likely(model, ids + own)
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
    progress = []
    texts = read_tasks(tasks, Letters(), vocab_size=61, context=100)
    found = evaluate_tasks(model, texts, batch_size=batch_size, on_progress=lambda *done: progress.append(done))
    assert list(found.items()) == list(EXPECTED.items())
    assert (progress[0], progress[-1]) == ((0, 5), (5, 5))
    total = sum(found.values(), Accuracy())
    assert (total.answer_accuracy, total.token_accuracy) == (4 / 8, 9 / 13)


def test_a_token_before_each_text(model, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"task_id": "t", "texts": text_with_answers(model, [60, 5], [[1, 1], [1]])[1:]}) + "\n")
    texts = read_tasks(path, Letters(), vocab_size=61, context=100, begin_id=60)
    assert evaluate_tasks(model, texts, batch_size=1)["t"].tokens_right == 3


def test_texts_that_are_rejected(tasks):
    with pytest.raises(DataError, match=r"tasks.jsonl, line 3: needs 14 tokens up to its last answer, but the context"):
        read_tasks(tasks, Letters(), vocab_size=61, context=13)
    with pytest.raises(DataError, match=r"tasks.jsonl, line 1: the tokenizer gives token \d+, but the model has 5 tok"):
        read_tasks(tasks, Letters(), vocab_size=5, context=100)


def test_a_broken_model_is_an_error(tasks):
    model = random_model(tiny_config(), dtype=torch.float32)
    model.norm.weight.data.fill_(torch.inf)
    texts = read_tasks(tasks, Letters(), vocab_size=61, context=100)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        evaluate_tasks(model, texts, batch_size=4)
