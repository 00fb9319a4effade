"""Scratch memory of compose attention: the same on all ranks, and on a resume that of the run so far."""

import json

import pytest

from dcscale.checkpoint.layout import find_checkpoint, read_config
from dcscale.config import load_config
from dcscale.observe import Console
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import build, build_trainer
from dcscale.train.build import choose_scratch

GIB = 2**30
LARGE = [
    *("model.heads=32", "model.dim=4096", "model.windows=[256,null]"),
    *("data.sequence_length=4096", "train.precision=bf16"),
]


def large(*overrides):
    return load_config([], [*LARGE, *overrides]).config


def test_a_new_run_derives_scratch_from_the_smallest_device():
    for memories in ([80 * GIB, 141 * GIB], [141 * GIB, 80 * GIB], [80 * GIB]):
        mib, line = choose_scratch(large(), None, memories)
        assert (mib, line) == (
            3413,
            "scratch    3,413 MiB for an attention call (from the shapes and 80.0 GiB a device; "
            "model.scratch_mib changes it)",
        )
    assert choose_scratch(large(), None, [80 * GIB, 12 * GIB])[0] == 512


@pytest.mark.parametrize(
    ("overrides", "mib"),
    [
        (["model.windows=[256]", "train.micro_batch_size=1"], 552),
        (["model.windows=[256]", "train.micro_batch_size=4"], 2208),
        (["model.windows=[256]", "train.micro_batch_size=1", "train.precision=fp32"], 936),
        (["model.kv_heads=8"], 3413),
        (["data.sequence_length=1024", "train.micro_batch_size=2"], 736),
    ],
)
def test_scratch_is_derived_from_the_settings(overrides, mib):
    assert choose_scratch(large(*overrides), None, [80 * GIB])[0] == mib


def test_a_cpu_has_256_mib():
    mib, line = choose_scratch(large(), None, [None, None])
    assert mib == 256
    assert line == "scratch    256 MiB for an attention call (the default on a CPU; model.scratch_mib changes it)"


@pytest.mark.parametrize("memory", [None, 16 * GIB, 141 * GIB])
def test_a_resume_keeps_the_scratch_of_the_run_on_every_device(memory):
    mib, line = choose_scratch(large(), 1008, [memory])
    assert mib == 1008
    assert line == "scratch    1,008 MiB for an attention call (as in the checkpoint; model.scratch_mib changes it)"


@pytest.mark.parametrize("stored", [None, 1008])
def test_an_explicit_value_wins(stored):
    mib, line = choose_scratch(large("model.scratch_mib=64"), stored, [80 * GIB])
    assert (mib, line) == (64, "scratch    64 MiB for an attention call (model.scratch_mib)")


def _train(config, stop_afters, memories):
    """Trains until each of ``stop_afters``, on ranks with these memories; the model's scratch and the lines on it."""
    answers = []
    for stop_after, memory_by_rank in zip(stop_afters, memories):
        environment = discover()
        start_distributed(environment, 1)
        config.train.stop_after = stop_after
        console, lines = Console(enabled=False), []
        console.line = lines.append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "total_memory", lambda *_, memory=memory_by_rank[environment.rank]: memory)
            trainer = build_trainer(config, environment, console)
        trainer.fit()
        trainer.close()
        answers.append(trainer.engine.module.blocks[0].attention.scratch_bytes)
        answers += [line for line in lines if line.startswith("scratch")]
    return answers


@pytest.mark.distributed
def test_ranks_with_different_devices_agree_and_resume_on_others(tmp_path, shards):
    # A short window makes long sequences cheap, and many heads make them need more than the least scratch.
    shapes = ["data.sequence_length=4096", "model.windows=[8]", "model.heads=32", "model.dim=64", "model.layers=1"]
    others = ["train.global_batch_size=2", "train.micro_batch_size=1", "validation.interval=0"]
    config = tiny_config(tmp_path / "run", shards, *shapes, *others)
    memories = [(80 * GIB, 7 * GIB), (16 * GIB, 80 * GIB)]
    mib = 7 * GIB // 24 // 2**20
    for first, first_line, second, second_line in run_distributed(_train, 2, config, (1, 1), memories):
        assert first == second == mib * 2**20
        assert first_line.startswith(f"scratch    {mib} MiB for an attention call (from the shapes and 7.0 GiB")
        assert second_line.startswith(f"scratch    {mib} MiB for an attention call (as in the checkpoint;")
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert (state["step"], state["scratch_mib"]) == (1, mib)
    # The config keeps what the user wrote.
    assert read_config(find_checkpoint(tmp_path / "run")).model.scratch_mib is None
