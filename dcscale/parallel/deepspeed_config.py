"""Generates the DeepSpeed configuration from dcscale's, so that there is no second file to maintain."""

from __future__ import annotations

from typing import Any

from dcscale.config import Config

NO_CLIP = 1e30
"""Clipping threshold without effect: DeepSpeed computes the gradient norm, which we report, only if it clips."""


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches that a rank accumulates in one optimizer step."""
    return config.train.global_batch_size // (config.train.sequences_per_pass(world_size) * world_size)


def micro_batches(config: Config, world_size: int) -> str:
    """How each rank takes its share of the global batch, for the terminal."""
    size, count = config.train.sequences_per_pass(world_size), accumulation_steps(config, world_size)
    return f"on each rank {count} micro-batch{'es' if count > 1 else ''} of {size}"


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Returns the ``config`` argument of ``deepspeed.initialize`` for ``world_size`` ranks.

    It has no optimizer and no schedule: the engine passes in a torch optimizer and sets the learning rate itself.
    """
    train, parallel = config.train, config.parallel
    stage = parallel.zero_stage
    bf16 = train.precision == "bf16"
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.sequences_per_pass(world_size),
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        # Without ZeRO and in float32, DeepSpeed clips but does not keep the norm: there the engine clips.
        "gradient_clipping": 0.0 if stage == 0 and not bf16 else (train.gradient_clipping or NO_CLIP),
        # A non-finite gradient must stop the run instead of being skipped silently: the engine checks the norm.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": parallel.overlap_comm and stage > 0,
            "contiguous_gradients": True,
            "reduce_bucket_size": parallel.bucket_size,
            "allgather_bucket_size": parallel.bucket_size,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if parallel.offload_optimizer:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # DeepSpeedCPUAdam needs a C++ compiler at the first start; torch's fused AdamW, which we use, does not.
        result["zero_force_ds_cpu_optimizer"] = False
    if stage == 3:
        result["zero_optimization"]["stage3_prefetch_bucket_size"] = parallel.bucket_size
        result["zero_optimization"]["stage3_param_persistence_threshold"] = parallel.param_persistence_threshold
    if stage > 0 and bf16:
        # Accumulate the gradients of micro-batches in float32. DeepSpeed has this option only with ZeRO.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
