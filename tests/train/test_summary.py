"""The banner and the summary of a run as printed to the terminal."""

from types import SimpleNamespace

import pytest
import torch

from dcscale.observe import Console
from dcscale.parallel import Environment
from dcscale.testing.runs import tiny_config
from dcscale.train.state import TrainState
from dcscale.train.summary import print_banner, summary_lines

SUMMARY = {
    "completed": True,
    "steps": 400,
    "tokens": 102400,
    "padding_tokens": 0,
    "steps_without_targets": 0,
    "first_loss": 5.5,
    "last_loss": 2.25,
    "validation_loss": 2.5,
    "bits_per_byte": 3.6067,
    "tokens_per_second": 2048.0,
    "train_seconds": 50.0,
    "skipped_shards": 0,
    "skipped_tokens": 0,
    "spikes": 0,
    "skipped_updates": 0,
    "rollbacks": 0,
    "passed_over_sequences": 0,
    "parameters": 1000,
    "world_size": 2,
    "device": "cpu",
    "last_checkpoint": "runs/a/checkpoints/step-00000400",
    "sample": "def f():\n    return",
}
BASE = [
    "trained    400 steps on 102,400 tokens in 50 s",
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
        (
            {"padding_tokens": 4096000, "steps_without_targets": 3, "validation_loss": None, "sample": None},
            [
                BASE[0],
                "padding    4,096,000 tokens, 97.6% of the inputs",
                "no targets in 3 steps, which changed no weight",
                BASE[1],
                *CHECKPOINT,
            ],
        ),
        (
            {"spikes": 1, "validation_loss": None, "sample": None},
            [*BASE, "spikes     1; updates skipped 0", *CHECKPOINT],
        ),
        (
            {"skipped_updates": 12, "validation_loss": None, "sample": None},
            [*BASE, "spikes     0; updates skipped 12", *CHECKPOINT],
        ),
        (
            {"rollbacks": 2, "passed_over_sequences": 4096, "validation_loss": None, "sample": None},
            [*BASE, "rollbacks  2, which passed over 4,096 sequences", *CHECKPOINT],
        ),
    ],
)
def test_lines(changes, lines):
    assert summary_lines({**SUMMARY, **changes}) == lines


def test_a_run_stopped_before_its_first_record():
    nothing = {"steps": 0, "tokens": 0, "train_seconds": 0.0, "first_loss": None, "last_loss": None}
    unknown = {"validation_loss": None, "tokens_per_second": None, "last_checkpoint": None, "sample": None}
    lines = summary_lines({**SUMMARY, **nothing, **unknown})
    assert lines == ["trained    0 steps on 0 tokens in 0 s", "checkpoint None"]


def test_the_summary_of_an_older_run_has_fewer_counts():
    newer = ("padding_tokens", "steps_without_targets", "spikes", "skipped_updates", "rollbacks")
    older = {key: value for key, value in SUMMARY.items() if key not in newer}
    assert summary_lines(older) == summary_lines(SUMMARY)


@pytest.mark.parametrize(
    ("packed", "at_most", "passed_over", "epochs"), [(False, "", [], "0.00312"), (True, "at most ", [64], "0.00624")]
)
def test_the_banner_says_how_many_tokens_and_epochs_a_run_has(tmp_path, capsys, packed, at_most, passed_over, epochs):
    config = tiny_config(tmp_path / "run", tmp_path)
    trainer = SimpleNamespace(
        config=config,
        environment=Environment(0, 0, 1, 1, torch.device("cpu")),
        engine=SimpleNamespace(module=SimpleNamespace(implementations=lambda device: [])),
        inputs_per_step=256,
        state=TrainState(passed_over=[{"first": 8, "end": 8 + count} for count in passed_over]),
        run=tmp_path / "run",
        latest_checkpoint=None,
    )
    stream = SimpleNamespace(has_packed_rows=packed, epochs=lambda sequences: {"": 0.00312 * sequences / 64})
    print_banner(Console(), trainer, stream)
    lines = capsys.readouterr().out.splitlines()
    assert f"run        8 steps, {at_most}2,048 tokens, {epochs} epochs of {tmp_path}/train" in lines
    assert any(f"8 sequences of {at_most}32 tokens = {at_most}256 tokens per step" in line for line in lines)


def test_sampled_text_cannot_control_the_terminal():
    lines = summary_lines({**SUMMARY, "sample": "a\x1b[2Jb\x07\rc\x0bd\te\nf"})
    assert lines[-3:] == ["sample", "  | a\\x1b[2Jb\\x07\\rc\\x0bd\te", "  | f"]
