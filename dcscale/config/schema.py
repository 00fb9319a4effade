"""Every setting of dcscale: the one place where a field, its unit, its default and its meaning are written.

YAML files, ``key=value`` on the command line, ``tools/check_config.py --reference`` and the
errors of :mod:`dcscale.config.check` all read the fields and the docstrings below them.
Nothing here imports torch or reads a file, so a config can be checked anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ComposeConfig:
    """How attention heads are composed (DCMHA); only read when ``model.attention`` is ``dcmha``."""

    rank: int = 2
    """Rank R of every low-rank branch, 1 to 4. The paper and all released models use 2."""

    pre: bool = True
    """Compose the scaled scores, before mask and softmax."""

    post: bool = True
    """Compose the probabilities, after the softmax."""

    query_wise: bool = True
    """Mix heads by matrices computed from the query's token."""

    key_wise: bool = True
    """Mix heads by matrices computed from the key's token."""

    low_rank: bool = True
    """The rank-R part of each branch; false leaves the gates only (one factor per head)."""

    gates: bool = True
    """The diagonal part of each branch: a factor 1 + tanh(.) per head."""

    gelu: str = "tanh"
    """GELU of the compose projection: ``tanh`` (JAX, all released weights) or ``erf`` (upstream PyTorch)."""

    gate_init: float = 0.005
    """Factor of the gates' initial standard deviation, times sqrt(2/(dim+heads)). JAX 0.005, upstream PyTorch 0.05."""


@dataclass
class RopeScalingConfig:
    """How the rotary frequencies were stretched to reach further than they were trained for."""

    kind: str = "none"
    """``none``; ``linear`` divides all frequencies by ``factor``; ``llama3`` divides those of wavelengths above
    original_length / low_freq_factor, leaves those below original_length / high_freq_factor, and goes over between."""

    factor: float = 1.0
    """Divisor of the stretched frequencies."""

    low_freq_factor: float = 1.0
    """``llama3``: periods that a wavelength fits into ``original_length``, up to which it is stretched wholly."""

    high_freq_factor: float = 4.0
    """``llama3``: periods from which it is left as it is; above ``low_freq_factor``."""

    original_length: int = 8192
    """``llama3``: tokens a sequence had before the stretch."""


@dataclass
class ModelConfig:
    """The network. Presets with the published sizes are in ``configs/model/``."""

    attention: str = "dcmha"
    """``dcmha`` for a DCFormer, ``mha`` for its Transformer twin: the same model without compose."""

    backend: str = "auto"
    """Attention implementation: ``reference`` (dense, slow, the definition), ``chunked`` (exact, no T x S tensor kept),
    ``compiled`` (the same through torch.compile: faster on long sequences, after a minute of compiling), ``triton``
    (the same by fused kernels on NVIDIA GPUs), or ``auto``: ``triton`` on GPUs where a trial of the kernels gives the
    right results, else ``chunked``. The run says which, and why."""

    scratch_mib: int = 256
    """Scratch memory of one attention call in MiB, for the scores of a chunk of queries. More makes larger and fewer
    chunks; with less, a chunk has fewer queries, down to one tile of them. Backend ``reference`` has no chunks."""

    vocab_size: int = 256
    """Rows of the embedding; at least the tokenizer's vocabulary, which the data's manifest states."""

    layers: int = 12
    """Number of blocks."""

    dim: int = 768
    """Width E of the residual stream."""

    heads: int = 12
    """Query heads H a layer."""

    kv_heads: int | None = None
    """Key/value heads a layer; null means as many as ``heads``, fewer is grouped-query attention.
    Must divide ``heads``."""

    head_dim: int | None = None
    """Width D of a head; null means dim / heads."""

    ffn: str = "swiglu"
    """Feed-forward network: ``swiglu`` (three matrices) or ``gelu`` (two, exact GELU)."""

    ffn_dim: int = 2048
    """Hidden width of the feed-forward network."""

    multi_gate: int | None = None
    """Number of gates over equal parts of the swiglu's hidden width (upstream ``mgate_dim``); null for none.
    Must divide ``ffn_dim``."""

    norm: str = "rmsnorm"
    """Normalisation of blocks and output: ``rmsnorm`` or ``layernorm`` (with bias)."""

    norm_eps: float = 1e-6
    """Epsilon of those normalisations."""

    qk_norm: bool = True
    """RMSNorm over head_dim, with scale, on queries and keys before RoPE."""

    qk_norm_eps: float = 1e-6
    """Epsilon of ``qk_norm`` (upstream: 1e-6 in PyTorch, 1e-5 in the JAX configs)."""

    bias: bool = False
    """Biases in the attention and feed-forward matrices (DCPythia: true)."""

    qkv_bias: bool = False
    """Biases in the query, key and value matrices also where ``bias`` is false (as in Qwen2)."""

    parallel_residual: bool = False
    """Attention and feed-forward both read the block's input (DCPythia: true)."""

    rope_base: float = 10000.0
    """Base of the rotary position embedding's wavelengths."""

    rope_fraction: float = 1.0
    """Leading part of each head that is rotated, in (0, 1]; fraction * head_dim is rounded down and must be even."""

    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Settings of the stretched rotary frequencies."""

    windows: list[int | None] = field(default_factory=lambda: [256, None])
    """Keys a query sees, itself included, per layer; null sees all.
    The pattern repeats over the layers: [256, null] alternates."""

    tied_embeddings: bool = False
    """Use the embedding as the output matrix too."""

    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """Settings of the dynamic composition."""


@dataclass
class DataSource:
    """One source of a mixture."""

    name: str = ""
    """Name in metrics and messages: letters, digits and ``._-``."""

    path: str = ""
    """Its shards, as ``data.train`` names them."""

    weight: float = 1.0
    """Its share of the sequences, relative to the other weights."""


@dataclass
class DataConfig:
    """Where tokens come from and in which order."""

    train: str = ""
    """Folder of training shards, with their ``manifest.json`` (made by ``tools/make_shards.py``), or its address:
    ``http://``, ``https://``, ``s3://``, ``gs://``. ``part-{00..15}/train``, ``{a,b}/train`` and, but on web servers,
    ``*/train`` read several folders as one. Empty where ``data.sources`` says what to mix."""

    sources: list[DataSource] = field(default_factory=list)
    """Sources to mix instead of one folder. A source that comes to its end begins again, whatever the others do. One
    item is changed by, for example, ``data.sources[0].weight=0.5``."""

    validation: str | None = None
    """Folder of held-out shards, named as in ``train``; null for no validation. Any defect in them stops the run."""

    sequence_length: int = 1024
    """Tokens a sequence, as the model sees them."""

    shuffle_shards: int = 8
    """Shards whose documents are shuffled together (the window of the shuffle).
    More mixes better and holds more in memory."""

    slots: int = 48
    """Independent read positions over an epoch. Fixed for a run: changing it changes the order.
    Best a multiple of ranks."""

    document_mask: bool = True
    """Attention and targets stop at document bounds; false lets a sequence's documents see each other."""

    prefetch_steps: int = 4
    """Optimizer steps whose batches are prepared ahead in a background thread; 0 prepares them in the training loop.
    With ``workers`` at least so many; they hand over groups of steps."""

    workers: int = 0
    """Processes a rank that prepare its batches, where one thread beside the training loop cannot keep up; 0 for that
    thread. Any number gives the same batches. Best such that ranks * workers divides ``slots``, or more is read."""

    verify: bool = True
    """Check every shard's SHA-256 against the manifest when it is read."""

    on_error: str = "fail"
    """What a training shard that cannot be used does: ``fail`` stops the run. ``skip`` reports it, puts masked padding
    in its place, which moves no sequence outside its window, and does not try it again, also after a resume."""

    max_skipped: float = 0.001
    """Largest part of a source's tokens that may be lost by ``skip``; beyond it the run stops."""

    read_ahead: int | None = None
    """Windows, of ``shuffle_shards`` shards each, that a reader reads before a sequence needs them, beside those in
    use; null is as many as these, so that no reading shows where all positions change their window at once."""

    read_threads: int = 8
    """Shards a reader (a rank, or each of its ``workers``) reads at once."""

    timeout_seconds: float = 30.0
    """Seconds in which a server must take a connection, and send some byte of an answer; else it is tried again."""

    retry_seconds: float = 1.0
    """Seconds before the second try of a read that failed in a way that may pass, at most; doubled with each further
    try up to 60, and drawn at random below that."""

    give_up_seconds: float = 600.0
    """Seconds that reading a shard may take with all its tries, before it counts as one that cannot be used."""

    cache: str | None = None
    """Folder on a local disk that keeps shards read from servers, for all processes of the machine; null for none."""

    cache_bytes: int = 1 << 36
    """Bytes of that folder, at most; the shards unused for the longest are removed."""

    @property
    def roots(self) -> list[str]:
        """Where the training shards lie."""
        return [source.path for source in self.sources] or [self.train]


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

    learning_rate: float = 3e-4
    """Peak learning rate."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate, a step."""

    rules: list[OptimizerRule] = field(default_factory=list)
    """Exceptions by parameter name."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a function of the step only."""

    kind: str = "cosine"
    """``cosine``: warm-up, then half a cosine down to ``final_ratio``. ``wsd``: warm-up, stable, then a linear decay.
    ``constant``: warm-up, stable."""

    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""

    decay_steps: int | None = None
    """Steps of the decay at the end of ``wsd``; null means a fifth of ``train.steps``."""

    final_ratio: float = 0.1
    """Learning rate at the end, as a part of the peak."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Optimizer steps of the whole run; the schedule spans them."""

    stop_after: int | None = None
    """Stop, with a checkpoint, once this step is done, as a signal would; null goes on to ``steps``."""

    global_batch_size: int = 64
    """Sequences an optimizer step, over all ranks. A multiple of micro_batch_size * ranks."""

    micro_batch_size: int = 8
    """Sequences a rank takes through the model at once; the rest is accumulated."""

    precision: str = "bf16"
    """``bf16``: bfloat16 weights and activations with float32 master weights and moments; or ``fp32``."""

    gradient_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""

    seed: int = 0
    """Seed of the initial weights and of the data's order."""

    recompute: str = "none"
    """Activation checkpointing: ``none`` keeps all, ``block`` keeps each block's input and recomputes the rest."""

    compile: bool = False
    """Run each block through torch.compile."""

    loss_chunk: int = 4096
    """Tokens whose logits exist at once in the loss; the others are recomputed. 0 means all."""


@dataclass
class ParallelConfig:
    """How the state is spread over ranks (DeepSpeed ZeRO)."""

    zero_stage: int = 1
    """ZeRO stage: 0 none, 1 optimizer states, 2 also gradients, 3 also parameters."""

    offload_optimizer: bool = False
    """Keep AdamW's moments and the float32 weights (12 bytes a parameter, over all ranks) in the host's memory, and
    update them there: saves the GPU's memory, costs time. Needs a ZeRO stage of 1 or more."""

    overlap_comm: bool = True
    """Overlap the reduction of gradients with the backward pass, where the accelerator can."""

    bucket_elements: int = 50_000_000
    """Elements reduced or gathered at once; bounds the communication buffers' memory (times bytes an element)."""

    whole_elements: int = 100_000
    """ZeRO-3 keeps parameters of fewer elements than this whole on every rank; gathering them would cost more."""

    timeout_minutes: float = 30.0
    """A collective that waits longer fails, naming itself."""


@dataclass
class ValidationConfig:
    """Loss and bits per byte on ``data.validation``."""

    interval: int = 500
    """Steps between validations; one is also made at the end. 0 turns validation off."""

    sequences: int = 512
    """Sequences of the held-out shards that are used: always the same, spread evenly; all where there are no more."""


@dataclass
class SamplesConfig:
    """Text that the model writes while it trains, into TensorBoard."""

    interval: int = 0
    """Steps between samples; one is also made at the end. 0 turns samples off."""

    prompts: list[str] = field(default_factory=lambda: ["def "])
    """Beginnings to be continued."""

    new_tokens: int = 128
    """Tokens written for each prompt."""

    temperature: float = 0.8
    """Softmax temperature; 0 takes the most likely token."""

    top_p: float = 0.95
    """Sample among the most likely tokens that together have this probability."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = 1000
    """Steps between checkpoints; one is also written at the end and when a signal asks to stop. 0: only these."""

    background: bool = True
    """Write while training goes on. The state is copied into the hosts' memory first either way (12 bytes a parameter
    over all ranks), so that false saves no memory: the copy is only gone sooner, and the loop waits for the disk.
    Rank 0 takes up to about 5 GiB more while it writes the model's weights."""

    on_error: str = "fail"
    """What a checkpoint that cannot be written does: ``fail`` stops the run; ``warn`` reports it, counts it in the
    metrics, and goes on to the next one. The earlier checkpoints stay. The last one of a start always stops with an
    error."""

    keep_last: int | None = 3
    """Newest checkpoints that are kept; null keeps all."""

    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for good, beside the newest; null for none."""

    keep_best: int | None = None
    """So many checkpoints of the lowest validation loss are kept, beside the newest; null for none."""

    resume: str = "auto"
    """``auto``: go on from the run folder's newest checkpoint if there is one; ``never``: refuse a folder that has one;
    or the path of a checkpoint."""

    on_damaged: str = "fail"
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


@dataclass
class LogConfig:
    """What is reported, and how often."""

    interval: int = 10
    """Steps between lines of metrics.jsonl and points in TensorBoard. Losses are means over these steps' tokens."""

    compose_interval: int = 100
    """Steps between measurements of how far compose has moved from the identity, also made at the first step and the
    last; each costs one more forward of one sequence. 0 turns them off."""

    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device in the run's precision, for MFU;
    null looks the device up and gives no MFU where it is unknown."""

    progress: bool = True
    """Show a progress bar on rank 0."""


@dataclass
class RunConfig:
    """The run's name and place."""

    name: str = "run"
    """Name of the run, shown in TensorBoard."""

    folder: str = "runs/${run.name}"
    """Folder of everything the run writes."""


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES: dict[str, tuple[Any, ...]] = {
    "model.attention": ("dcmha", "mha"),
    "model.backend": ("auto", "reference", "chunked", "compiled", "triton"),
    "model.compose.gelu": ("tanh", "erf"),
    "model.ffn": ("swiglu", "gelu"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.rope_scaling.kind": ("none", "linear", "llama3"),
    "train.precision": ("bf16", "fp32"),
    "train.recompute": ("none", "block"),
    "schedule.kind": ("cosine", "wsd", "constant"),
    "checkpoint.on_error": ("fail", "warn"),
    "checkpoint.on_damaged": ("fail", "previous"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "data.on_error": ("fail", "skip"),
}
"""The allowed values of the fields that take one of a few."""
