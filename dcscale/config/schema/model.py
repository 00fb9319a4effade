"""The model: sizes, attention, and dynamic composition of its heads."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, number


@dataclass
class ComposeConfig:
    """Dynamic composition of attention heads (DCMHA); only used if ``model.attention`` is ``dcmha``."""

    rank: int = number(2, Range(1, 4))
    """Rank R of the low-rank part of each branch. The paper and all released models use 2."""

    pre: bool = True
    """Compose the scaled attention scores, before mask and softmax."""

    post: bool = True
    """Compose the attention probabilities, after the softmax."""

    query_wise: bool = True
    """Query-wise branch: compose heads with matrices computed from the query's token."""

    key_wise: bool = True
    """Key-wise branch: compose heads with matrices computed from the key's token."""

    low_rank: bool = True
    """Use the rank-R part of each branch; false leaves only the gates."""

    gates: bool = True
    """Use the gates, the diagonal part of each branch: a factor 1 + tanh(.) per head."""

    gelu: str = choice("tanh", "erf")
    """GELU of the compose projection: ``tanh`` (upstream's JAX code, all released weights) or ``erf`` (upstream's
    PyTorch code)."""

    gate_init: float = number(0.005, NOT_NEGATIVE)
    """Initial standard deviation of the gate weights, in units of sqrt(2 / (dim + heads)). Upstream: 0.005 in JAX, 0.05
    in PyTorch."""


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary frequencies for contexts longer than the model was first trained with."""

    kind: str = choice("none", "linear", "llama3")
    """``none``: no scaling. ``linear``: divides all frequencies by ``factor``. ``llama3``: divides the frequencies with
    wavelengths above original_length / low_freq_factor, keeps those with wavelengths below original_length /
    high_freq_factor, and interpolates between them."""

    factor: float = number(1.0, Range(1))
    """Divisor of the scaled frequencies."""

    low_freq_factor: float = number(1.0, POSITIVE)
    """Only ``llama3``: wavelengths that fit at most this many times into ``original_length`` are scaled fully."""

    high_freq_factor: float = number(4.0, POSITIVE)
    """Only ``llama3``: wavelengths that fit at least this many times into ``original_length`` are not scaled. Must be
    above ``low_freq_factor``."""

    original_length: int = number(8192, COUNT)
    """Only ``llama3``: sequence length, in tokens, that the model was trained with before scaling."""


@dataclass
class ModelConfig:
    """The model. Presets with the published sizes are in ``configs/model/``."""

    attention: str = choice("dcmha", "mha")
    """``dcmha``: DCFormer. ``mha``: the same Transformer without compose."""

    backend: str = choice("auto", "reference", "chunked", "compiled", "triton")
    """Attention implementation. ``reference``: dense and slow, the definition. ``chunked``: exact, never holds all T x
    S scores. ``compiled``: ``chunked`` through torch.compile, faster on long sequences after a minute of compilation.
    ``triton``: fused kernels for NVIDIA GPUs. ``auto``: ``triton`` on GPUs where the self-test of the kernels passes,
    else ``chunked``; the run prints the choice and its reason."""

    scratch_mib: int | None = number(None, COUNT)
    """Scratch memory of one attention call, in MiB: it holds the scores of one chunk of queries. More memory means
    fewer and larger chunks; a chunk is at least one tile of queries. Not used by the ``reference`` backend. null: 256
    on a CPU; on GPUs, what a micro-batch in one chunk needs, between 256 and 1/24 of the total memory of the smallest
    GPU. A run prints it, stores it and uses it again on a resume, also on other GPUs."""

    vocab_size: int = number(256, Range(2, 2**31 - 1))  # tokens are int32
    """Rows of the embedding; at least the size of the tokenizer's vocabulary, which is in the manifest of the data."""

    layers: int = number(12, COUNT)
    """Number of Transformer blocks."""

    dim: int = number(768, COUNT)
    """Width E of the residual stream."""

    heads: int = number(12, COUNT)
    """Query heads H per layer."""

    kv_heads: int | None = number(None, COUNT)
    """Key/value heads per layer; null means as many as ``heads``, fewer is grouped-query attention.
    Must divide ``heads``."""

    head_dim: int | None = number(None, COUNT)
    """Width D of a head; null means ``dim`` / ``heads``."""

    ffn: str = choice("swiglu", "gelu")
    """Feed-forward network: ``swiglu`` (three matrices) or ``gelu`` (two matrices, exact GELU)."""

    ffn_dim: int = number(2048, COUNT)
    """Hidden width of the feed-forward network."""

    multi_gate: int | None = number(None, COUNT)
    """Number of gates, one for each equal part of the hidden width, only with ``swiglu`` (upstream ``mgate_dim``); null
    for none. Must divide ``ffn_dim``."""

    norm: str = choice("rmsnorm", "layernorm")
    """Normalisation in the blocks and before the output: ``rmsnorm`` or ``layernorm`` (with bias)."""

    norm_eps: float = number(1e-6, POSITIVE)
    """Epsilon of ``norm``."""

    qk_norm: bool = True
    """Normalise queries and keys before RoPE: RMSNorm over head_dim, with a learned scale."""

    qk_norm_eps: float = number(1e-6, POSITIVE)
    """Epsilon of ``qk_norm`` (upstream: 1e-6 in PyTorch, 1e-5 in the JAX configs)."""

    bias: bool = False
    """Use biases in the attention and feed-forward projections (DCPythia: true)."""

    qkv_bias: bool = False
    """Use biases in the query, key and value projections even if ``bias`` is false (as in Qwen2)."""

    parallel_residual: bool = False
    """Attention and feed-forward network run in parallel on the block's input (DCPythia: true)."""

    rope_base: float = number(10000.0, Range(1, open_low=True))
    """Base of the wavelengths of the rotary position embedding."""

    rope_fraction: float = number(1.0, Range(0, 1, open_low=True))
    """Leading fraction of each head that is rotated; fraction * head_dim is rounded down and must be even."""

    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Scaling of the rotary frequencies."""

    windows: list[int | None] = number([256, None], COUNT)
    """Sliding window of each layer: number of keys that a query attends to, including its own; null for full attention.
    The pattern repeats over the layers: [256, null] alternates."""

    tied_embeddings: bool = False
    """Use the embedding as output projection too."""

    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """Settings of the dynamic composition."""
