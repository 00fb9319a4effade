"""The summary of a run as printed to the terminal."""

import pytest

from dcscale.train.summary import summary_lines

SUMMARY = {
    "completed": True,
    "steps": 400,
    "tokens": 102400,
    "first_loss": 5.5,
    "last_loss": 2.25,
    "validation_loss": 2.5,
    "bits_per_byte": 3.6067,
    "tokens_per_second": 2048.0,
    "train_seconds": 50.0,
    "skipped_shards": 0,
    "skipped_tokens": 0,
    "parameters": 1000,
    "world_size": 2,
    "device": "cpu",
    "last_checkpoint": "runs/a/checkpoints/step-00000400",
    "sample": "def f():\n    return",
}
BASE = [
    "steps      400, 102,400 tokens in 50 s",
    "loss       5.5000 first, 2.2500 last (nats/token), 2,048 tokens/s",
]
CHECKPOINT = ["checkpoint runs/a/checkpoints/step-00000400"]
SAMPLE = ["sample", "  | def f():", "  |     return"]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, [*BASE, "validation 2.5000 nats/token, 3.6067 bits/byte", *CHECKPOINT, *SAMPLE]),
        ({"bits_per_byte": None}, [*BASE, "validation 2.5000 nats/token", *CHECKPOINT, *SAMPLE]),
        ({"validation_loss": None, "bits_per_byte": None}, [*BASE, *CHECKPOINT, *SAMPLE]),
        ({"validation_loss": None, "sample": None}, [*BASE, *CHECKPOINT]),
        (
            {"skipped_shards": 2, "skipped_tokens": 12345, "validation_loss": None, "sample": None},
            [*BASE, "skipped    2 shards with 12,345 tokens", *CHECKPOINT],
        ),
    ],
)
def test_lines(changes, lines):
    assert summary_lines({**SUMMARY, **changes}) == lines


def test_a_run_stopped_before_its_first_record():
    nothing = {"steps": 0, "tokens": 0, "train_seconds": 0.0, "first_loss": None, "last_loss": None}
    unknown = {"validation_loss": None, "tokens_per_second": None, "last_checkpoint": None, "sample": None}
    lines = summary_lines({**SUMMARY, **nothing, **unknown})
    assert lines == ["steps      0, 0 tokens in 0 s", "checkpoint None"]


def test_sampled_text_cannot_control_the_terminal():
    lines = summary_lines({**SUMMARY, "sample": "a\x1b[2Jb\x07\rc\x0bd\te\nf"})
    assert lines[-3:] == ["sample", "  | a\\x1b[2Jb\\x07\\rc\\x0bd\te", "  | f"]
