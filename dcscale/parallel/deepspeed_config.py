"""The DeepSpeed configuration, generated from ours: there is no second file to keep."""

from __future__ import annotations

from typing import Any

from dcscale.config import Config

NO_CLIP = 1e30  # DeepSpeed computes the gradient norm, which we report, only where it clips


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches a rank accumulates in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * world_size)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Returns what ``deepspeed.initialize`` takes as its ``config`` for ``world_size`` ranks.

    Optimizer and schedule are torch objects of ours and so are not in it.
    """
    train, parallel = config.train, config.parallel
    stage = parallel.zero_stage
    bf16 = train.precision == "bf16"
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        # In plain data parallelism with float32 DeepSpeed clips without keeping the norm; the engine does it there.
        "gradient_clipping": 0.0 if stage == 0 and not bf16 else (train.gradient_clipping or NO_CLIP),
        # A non-finite gradient must stop the run, not be skipped silently: the engine checks it on every path.
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
        # Its own Adam for CPUs needs a C++ compiler at the first start; torch's fused AdamW does not.
        result["zero_force_ds_cpu_optimizer"] = False
    if stage == 3:
        result["zero_optimization"]["stage3_prefetch_bucket_size"] = parallel.bucket_size
        result["zero_optimization"]["stage3_param_persistence_threshold"] = parallel.param_persistence_threshold
    if stage > 0 and bf16:
        # Micro-batches are summed in float32; without ZeRO DeepSpeed has no such mode.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
