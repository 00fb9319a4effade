"""The training loop, its optimizer and schedule, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, number


@dataclass
class OptimizerRule:
    """Settings for the parameters whose name matches; the first matching rule of the list counts."""

    match: str = ""
    """Shell-style pattern over the full parameter name, such as ``*.compose.*``."""

    lr_scale: float = 1.0
    """Factor on the learning rate."""

    weight_decay: float | None = None
    """Decay of these parameters; null keeps what they would have without the rule."""


@dataclass
class OptimizerConfig:
    """AdamW. Matrices decay; norms, biases and every other vector do not, nor does the embedding."""

    learning_rate: float = number(3e-4, POSITIVE)
    """Peak learning rate."""

    betas: list[float] = number([0.9, 0.95], Range(0, 1, open_high=True))
    """Decay rates of the first and second moment."""

    eps: float = number(1e-8, POSITIVE)
    """Added to the root of the second moment."""

    weight_decay: float = number(0.1, NOT_NEGATIVE)
    """Decoupled weight decay, times the learning rate, a step."""

    rules: list[OptimizerRule] = field(default_factory=list)
    """Exceptions by parameter name."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a function of the step only."""

    kind: str = choice("cosine", "wsd", "constant")
    """``cosine``: warm-up, then half a cosine down to ``final_ratio``. ``wsd``: warm-up, stable, then a linear decay.
    ``constant``: warm-up, stable."""

    warmup_steps: int = number(100, NOT_NEGATIVE)
    """Steps of linear warm-up from zero."""

    decay_steps: int | None = number(None, COUNT)
    """Steps of the decay at the end of ``wsd``; null means a fifth of ``train.steps``."""

    final_ratio: float = number(0.1, Range(0, 1))
    """Learning rate at the end, as a part of the peak."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = number(1000, COUNT)
    """Optimizer steps of the whole run; the schedule spans them."""

    stop_after: int | None = number(None, COUNT)
    """Stop, with a checkpoint, once this step is done, as a signal would; null goes on to ``steps``."""

    global_batch_size: int = number(64, COUNT)
    """Sequences an optimizer step, over all ranks. A multiple of micro_batch_size * ranks."""

    micro_batch_size: int = number(8, COUNT)
    """Sequences a rank takes through the model at once; the rest is accumulated."""

    precision: str = choice("bf16", "fp32")
    """``bf16``: bfloat16 weights and activations with float32 master weights and moments; or ``fp32``."""

    gradient_clipping: float = number(1.0, NOT_NEGATIVE)
    """Largest global L2 norm of the gradient; 0 turns clipping off."""

    seed: int = number(0, Range(0, 2**63, open_high=True))
    """Seed of the initial weights and of the data's order."""

    recompute: str = choice("none", "block")
    """Activation checkpointing: ``none`` keeps all, ``block`` keeps each block's input and recomputes the rest."""

    compile: bool = False
    """Run each block through torch.compile."""

    loss_chunk: int = number(4096, NOT_NEGATIVE)
    """Tokens whose logits exist at once in the loss; the others are recomputed. 0 means all."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = number(1000, NOT_NEGATIVE)
    """Steps between checkpoints; one is also written at the end and when a signal asks to stop. 0: only these."""

    background: bool = True
    """Write while training goes on. The state is copied into the hosts' memory first either way (12 bytes a parameter
    over all ranks), so that false saves no memory: the copy is only gone sooner, and the loop waits for the disk.
    Rank 0 takes up to about 5 GiB more while it writes the model's weights."""

    on_error: str = choice("fail", "warn")
    """What a checkpoint that cannot be written does: ``fail`` stops the run; ``warn`` reports it, counts it in the
    metrics, and goes on to the next one. The earlier checkpoints stay. The last one of a start always stops with an
    error."""

    keep_last: int | None = number(3, COUNT)
    """Newest checkpoints that are kept; null keeps all."""

    keep_every: int | None = number(None, COUNT)
    """Checkpoints whose step is a multiple of this are kept for good, beside the newest; null for none."""

    keep_best: int | None = number(None, COUNT)
    """So many checkpoints of the lowest validation loss are kept, beside the newest; null for none."""

    resume: str = "auto"
    """``auto``: go on from the run folder's newest checkpoint if there is one; ``never``: refuse a folder that has one;
    or the path of a checkpoint."""

    on_corrupt: str = choice("fail", "previous")
    """What a damaged newest checkpoint does: ``fail`` stops the start and says what is wrong; ``previous`` sets it
    aside under another name and goes on from the newest good one. What is read is checked against its SHA-256 first."""

    allow_data_change: bool = False
    """Go on with other data, or another order, than the checkpoint was made with. The first sequence of the new order
    that is used has the number of sequences used so far; what was read before may come again."""

    allow_other_logits: bool = False
    """Go on though the loaded model's logits of the checkpoint's probe batch differ by more than rounding from the
    saved ones. They are only reported where the type or the kind of device is another one."""

    init_from: str | None = None
    """Model folder, checkpoint or run whose weights a new run begins with; its optimizer, schedule and data begin anew.
    Only read when the run begins: one that goes on has weights of its own. null: random weights, by ``train.seed``."""
