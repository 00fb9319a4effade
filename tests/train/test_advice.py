"""Warnings about settings that are probably not meant, each with value, rule and way out; none for what is usual."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcscale.config import load_config
from dcscale.models import count_parameters
from dcscale.testing.runs import numbered_shards, tiny_config, write_token_shards
from dcscale.train.advice import advice, state_bytes
from dcscale.train.data import open_training_stream

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


def settings(*overrides: str):
    return tiny_config(Path("run"), Path("shards"), *overrides)


def test_usual_settings_give_no_warning() -> None:
    assert advice(settings(), 1, None, GIB) == []


@pytest.mark.parametrize(
    ("size", "rate", "usual"),
    [
        ([], 0.0101, "0.001"),  # 41,216 parameters
        (["model.layers=12", "model.dim=768", "model.ffn_dim=3072", "model.vocab_size=50257"], 0.0061, "0.0006"),
        (["model.layers=32", "model.dim=4096", "model.ffn_dim=16384"], 0.0013, "0.00012"),
    ],
)
def test_a_learning_rate_beyond_reason(size: list[str], rate: float, usual: str) -> None:
    found = advice(settings(*size, f"optimizer.learning_rate={rate}"), 1, None, None)
    parameters = count_parameters(settings(*size).model).total
    assert found == [
        f"optimizer.learning_rate = {rate}: is more than 10 times what models of {parameters:,} parameters are trained "
        f"with; GPT-3 and Pythia used {usual} at this size"
    ]
    assert advice(settings(*size, f"optimizer.learning_rate={10 * float(usual)}"), 1, None, None) == []


def test_a_share_that_divides_badly() -> None:
    batch = ["train.global_batch_size=254", "train.micro_batch_size=8"]
    assert advice(settings(*batch), 2, None, None) == [
        "train.micro_batch_size = 8: becomes 1, the largest divisor of the 127 sequences of a rank, which is slow; "
        "use a train.global_batch_size of 256"
    ]
    for size, ranks in ((254, 1), (256, 64), (8, 8), (14, 1)):  # 254 = 2 x 127 gives 2 on one rank
        expected = ["train.micro_batch_size"] if (size, ranks) == (254, 1) else []
        found = advice(settings(f"train.global_batch_size={size}", "train.micro_batch_size=8"), ranks, None, None)
        assert [text.partition(" = ")[0] for text in found] == expected


def test_validation_that_never_happens() -> None:
    assert advice(settings("validation.interval=0"), 1, None, None) == [
        "validation.interval = 0: leaves data.validation unused; set it, or data.validation=null"
    ]
    assert advice(settings("validation.interval=0", "data.validation=null"), 1, None, None) == []
    assert advice(settings("validation.interval=9"), 1, None, None) == [
        "validation.interval = 9: is more than train.steps = 8: validated only at the end; lower it to see progress"
    ]
    assert advice(settings("validation.interval=8"), 1, None, None) == []


@pytest.fixture
def small(tmp_path: Path):
    """A function that gives warnings on data of 10 sequences of 32 tokens, and of a second source of 5."""
    write_token_shards(tmp_path / "train", numbered_shards([321]), vocab_size=500)
    write_token_shards(tmp_path / "other", numbered_shards([161]), vocab_size=500)

    def call(*overrides: str, passed_over: int = 0) -> list[str]:
        config = tiny_config(tmp_path / "run", tmp_path, "model.vocab_size=500", *overrides)
        return advice(config, 1, open_training_stream(config), None, passed_over)

    return call


def test_data_that_is_read_many_times(small, tmp_path: Path) -> None:
    assert small("train.steps=5") == []  # 40 sequences: 4 epochs
    assert small("train.steps=6") == [
        f'data.train = "{tmp_path}/train": is read 4.8 times; beyond about 4, repeated data is worth much less; give '
        "more data, or set train.steps to at most 5"
    ]
    (found,) = small("train.steps=5", passed_over=8)
    assert "is read 4.8 times" in found


def test_data_smaller_than_a_step(small, tmp_path: Path) -> None:
    assert small("train.steps=4", "train.global_batch_size=10") == []
    assert small("train.steps=4", "train.global_batch_size=11") == [
        f'data.train = "{tmp_path}/train": has 10 sequences, fewer than the 11 of one step: a step repeats its data; '
        "give more data, or lower train.global_batch_size"
    ]


def test_each_source_of_a_mixture_is_looked_at(small, tmp_path: Path) -> None:
    sources = (
        f"data.sources=[{{name: a, path: {tmp_path}/train, weight: 1}}, {{name: b, path: {tmp_path}/other, weight: 3}}]"
    )
    found = small("data.train=", sources, "train.global_batch_size=4", "train.steps=8")  # 8 and 24 sequences
    assert [text.partition(";")[0] for text in found] == [
        f'data.sources[1].path = "{tmp_path}/other": is read 4.8 times'
    ]


def test_a_rollback_needs_checkpoints() -> None:
    assert advice(settings("train.on_spike=rollback", "checkpoint.interval=0"), 1, None, None) == [
        'train.on_spike = "rollback": has no checkpoint to go back to: checkpoint.interval is 0, so only the end of a '
        "start writes one; set checkpoint.interval or checkpoint.interval_minutes"
    ]
    for setting in ("checkpoint.interval=10", "checkpoint.interval_minutes=5"):
        assert advice(settings("train.on_spike=rollback", "checkpoint.interval=0", setting), 1, None, None) == []


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "bytes_each"),
    [
        (0, "fp32", False, 16),
        (0, "bf16", False, 18),
        (1, "fp32", False, 4 + 4 + 12 / 4),
        (1, "bf16", False, 2 + 4 + 12 / 4),
        (2, "bf16", False, 2 + (4 + 12) / 4),
        (3, "bf16", False, (2 + 4 + 12) / 4),
        (2, "bf16", True, 2),
        (3, "bf16", True, 2 / 4),
    ],
)
def test_the_memory_of_the_training_state(stage: int, precision: str, offload: bool, bytes_each: float) -> None:
    config = settings(
        f"parallel.zero_stage={stage}", f"train.precision={precision}", f"parallel.offload_optimizer={offload}"
    )
    assert state_bytes(config, 4) == bytes_each * count_parameters(config.model).total


def test_a_state_larger_than_the_device() -> None:
    files = [CONFIGS / "model" / "dcpythia-6.9b.yaml", CONFIGS / "train" / "6.9b.yaml"]
    config = load_config(files, ["data.train=x", "validation.interval=0"]).config
    [warning] = advice(config, 8, None, 24 * GIB)
    assert warning.startswith("parallel.zero_stage = 1: weights, gradients and optimizer states alone take 4")
    assert warning.endswith(
        "on each of 8 ranks, but a device has 24.0 GiB; "
        "use a higher stage, parallel.offload_optimizer=true, more ranks or a smaller model"
    )
    assert advice(config, 8, None, 80 * GIB) == []
    config.parallel.zero_stage, config.parallel.offload_optimizer = 3, True
    [warning] = advice(config, 1, None, 4 * GIB)
    assert warning.endswith("; use more ranks or a smaller model")
