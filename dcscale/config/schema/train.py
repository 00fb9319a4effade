"""The training loop, optimizer, learning rate schedule and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, location, number


@dataclass
class OptimizerRule:
    """Settings for parameters whose name matches; the first matching rule of the list applies."""

    match: str = ""
    """Shell-style pattern for the full parameter name, such as ``*.compose.*``."""

    lr_scale: float = 1.0
    """Factor on the learning rate; 0 freezes the parameters."""

    weight_decay: float | None = None
    """Weight decay of these parameters; null leaves it as it would be without the rule."""


@dataclass
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices except the embedding, not to norms, biases or other vectors."""

    learning_rate: float = number(3e-4, POSITIVE)
    """Peak learning rate."""

    betas: list[float] = number([0.9, 0.95], Range(0, 1, open_high=True))
    """Decay rates of the first and second moment (beta1, beta2)."""

    eps: float = number(1e-8, POSITIVE)
    """Added to the square root of the second moment in the denominator of the update."""

    weight_decay: float = number(0.1, NOT_NEGATIVE)
    """Decoupled weight decay: each step multiplies the weights by 1 - learning rate * weight_decay."""

    rules: list[OptimizerRule] = field(default_factory=list)
    """Exceptions by parameter name."""


@dataclass
class ScheduleConfig:
    """Learning rate schedule, a function of the optimizer step only."""

    kind: str = choice("cosine", "wsd", "constant")
    """``cosine``: warm-up, then half a cosine down to ``final_ratio``. ``wsd`` (warm-up, stable, decay): warm-up,
    constant, then a linear decay to ``final_ratio``. ``constant``: warm-up, then constant."""

    warmup_steps: int = number(100, NOT_NEGATIVE)
    """Optimizer steps of linear warm-up from zero."""

    decay_steps: int | None = number(None, COUNT)
    """Optimizer steps of the decay at the end, only with ``wsd``; null means a fifth of ``train.steps``."""

    final_ratio: float = number(0.1, Range(0, 1))
    """Learning rate at the end, as a fraction of the peak."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = number(1000, COUNT)
    """Optimizer steps of the whole run; the schedule spans them."""

    stop_after: int | None = number(None, COUNT)
    """Stop after this optimizer step with a checkpoint, like after a signal; null trains until ``steps``."""

    stop_after_minutes: float | None = number(None, POSITIVE)
    """Stop this start after so many minutes since its process began, with a checkpoint and exit code 75, like after a
    signal: an own time limit, for machines without a batch system. null: none."""

    on_nonfinite: str = choice("stop", "skip")
    """What happens if the loss or gradient of a step has infinities or NaN: ``stop`` saves the state before it and ends
    the run with exit code 3; ``skip`` leaves out the update on all ranks and continues with the next step."""

    on_spike: str = choice("warn", "ignore", "skip", "rollback")
    """What happens if the loss or gradient norm of a step is a spike: far above the last 128 steps that were none (of
    which there must be 32). ``ignore``; ``warn``; ``skip`` the update; or ``rollback``: go back to the newest
    checkpoint and pass over the data since."""

    spike_score: float = number(10.0, POSITIVE)
    """How far above the median is a spike, in robust standard deviations (1.4826 times the median absolute deviation)
    of the logarithms. Metrics show the score of each logged step."""

    max_skipped_updates: int = number(10, COUNT)
    """Updates skipped in a row, or rollbacks to the same checkpoint, after which the run saves and ends with exit code
    3. With ``on_spike=warn``, after so many spikes in a row the comparison begins again: the level has changed."""

    global_batch_size: int = number(64, COUNT)
    """Sequences per optimizer step, over all ranks. Must be a multiple of the number of ranks."""

    micro_batch_size: int = number(8, COUNT)
    """Most sequences per rank in one forward and backward pass. A run takes the largest number up to this that divides
    a rank's share of the global batch, prints it, and accumulates gradients over as many passes as the share needs."""

    precision: str = choice("bf16", "fp32")
    """``bf16``: bfloat16 weights and activations, float32 master weights and moments. ``fp32``: all float32."""

    gradient_clipping: float = number(1.0, NOT_NEGATIVE)
    """Maximum global L2 norm of the gradient; 0 turns clipping off."""

    seed: int = number(0, Range(0, 2**63, open_high=True))
    """Seed of the initial weights and of the data order."""

    recompute: str = choice("none", "block")
    """Activation checkpointing: ``none`` keeps all activations, ``block`` keeps the input of each block and recomputes
    the rest in the backward pass."""

    compile: bool = False
    """Compile each block with torch.compile."""

    loss_chunk: int = number(4096, NOT_NEGATIVE)
    """Tokens whose logits are in memory at once: the loss is computed in chunks of this size, and recomputed in the
    backward pass. 0 computes all logits at once."""

    def sequences_per_pass(self, world_size: int) -> int:
        """Sequences that a rank takes in one forward and backward pass, of its share of the global batch.

        Args:
            world_size: number of ranks; must divide ``global_batch_size``.
        """
        share = self.global_batch_size // world_size
        return next(size for size in range(min(self.micro_batch_size, share), 0, -1) if share % size == 0)


@dataclass
class CheckpointConfig:
    """Saving checkpoints, resuming from them, and starting from other weights."""

    interval: int = number(1000, NOT_NEGATIVE)
    """Optimizer steps between checkpoints; one is also written at the end and on a signal to stop. 0: only these."""

    interval_minutes: float | None = number(None, POSITIVE)
    """Minutes between checkpoints, by the clock of rank 0, besides ``interval``; null: by steps only."""

    background: bool = True
    """Write checkpoints in a background thread while training continues; false makes the loop wait for the disk. Both
    first copy the state to host memory (12 bytes per parameter, over all ranks), so false saves no memory: the copy is
    only freed sooner. Rank 0 needs up to about 5 GiB more while it writes the model's weights."""

    on_error: str = choice("fail", "warn")
    """What happens if a checkpoint cannot be written: ``fail`` stops the run; ``warn`` prints a warning, counts it in
    the metrics and continues training. Earlier checkpoints stay. A failure of the checkpoint at the end is always an
    error."""

    keep_last: int | None = number(3, COUNT)
    """Number of newest checkpoints that are kept; null keeps all checkpoints."""

    keep_every: int | None = number(None, COUNT)
    """Also keep every checkpoint whose step is a multiple of this number; null for none."""

    keep_best: int | None = number(None, COUNT)
    """Also keep this number of checkpoints with the lowest validation loss; null for none."""

    resume: str = location("auto")
    """``auto``: resume from the newest checkpoint of the run folder if there is one, else start a new run; ``never``:
    refuse a run folder that has a checkpoint; or the path of a checkpoint or run folder to resume from."""

    on_corrupt: str = choice("fail", "previous")
    """What happens if the newest checkpoint is corrupt: ``fail`` stops with an error; ``previous`` quarantines it under
    another name and resumes from the newest intact one. The SHA-256 of every file that is read is checked first."""

    allow_data_change: bool = False
    """Allow resuming with other data, or another data order, than the checkpoint was written with. The new order is
    continued at the number of sequences used so far; text seen before may be seen again."""

    allow_other_logits: bool = False
    """Allow resuming although the loaded model's logits of the checkpoint's probe batch differ by more than rounding
    from the saved ones. With another dtype or kind of device, a difference is only a warning in any case."""

    init_from: str | None = location(None)
    """Model folder, checkpoint or run folder whose weights a new run starts with; optimizer, schedule and data start
    from the beginning. Ignored when the run is resumed. null: random weights, from ``train.seed``."""
