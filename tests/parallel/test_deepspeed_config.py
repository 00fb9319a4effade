"""The DeepSpeed config generated from dcscale's config."""

import pytest

from dcscale.config import load_config
from dcscale.parallel.deepspeed_config import NO_CLIP, deepspeed_config, micro_batches


def settings(*overrides):
    sizes = ["train.global_batch_size=24", "train.micro_batch_size=3", "data.train=somewhere"]
    return load_config([], [*sizes, *overrides]).config


def generated(*overrides, world_size=2):
    return deepspeed_config(settings(*overrides), world_size)


@pytest.mark.parametrize(
    ("micro", "ranks", "size", "steps"), [(3, 4, 3, 2), (4, 4, 3, 2), (8, 4, 6, 1), (8, 12, 2, 1), (5, 1, 4, 6)]
)
def test_the_batch_triple(micro, ranks, size, steps):
    result = generated(f"train.micro_batch_size={micro}", world_size=ranks)
    assert result["train_micro_batch_size_per_gpu"] == size
    assert result["gradient_accumulation_steps"] == steps
    assert size * steps * ranks == 24
    plural = "es" if steps > 1 else ""
    shown = micro_batches(settings(f"train.micro_batch_size={micro}"), ranks)
    assert shown == f"on each rank {steps} micro-batch{plural} of {size}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(stage):
    result = generated(
        f"parallel.zero_stage={stage}", "parallel.bucket_size=77", "parallel.param_persistence_threshold=5"
    )
    zero = result["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["overlap_comm"] == (stage > 0)
    assert zero["reduce_bucket_size"] == 77
    assert zero.get("stage3_param_persistence_threshold") == (5 if stage == 3 else None)
    assert result.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)


def test_precision():
    assert generated("train.precision=bf16")["bf16"]["enabled"]
    assert not generated("train.precision=fp32")["bf16"]["enabled"]
    assert "data_types" not in generated("train.precision=fp32")


def test_without_clipping_the_norm_is_still_computed():
    assert generated("train.gradient_clipping=0.5")["gradient_clipping"] == 0.5
    assert generated("train.gradient_clipping=0")["gradient_clipping"] == NO_CLIP
    # Without ZeRO and in float32 the engine clips, and keeps the norm.
    assert generated("train.precision=fp32", "parallel.zero_stage=0")["gradient_clipping"] == 0.0


def test_offloading():
    assert "offload_optimizer" not in generated()["zero_optimization"]
    result = generated("parallel.offload_optimizer=true")
    assert result["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert result["zero_force_ds_cpu_optimizer"] is False
