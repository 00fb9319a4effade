"""The network: sizes, attention and its composition."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, number


@dataclass
class ComposeConfig:
    """How attention heads are composed (DCMHA); only read when ``model.attention`` is ``dcmha``."""

    rank: int = number(2, Range(1, 4))
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

    gelu: str = choice("tanh", "erf")
    """GELU of the compose projection: ``tanh`` (JAX, all released weights) or ``erf`` (upstream PyTorch)."""

    gate_init: float = number(0.005, NOT_NEGATIVE)
    """Factor of the gates' initial standard deviation, times sqrt(2/(dim+heads)). JAX 0.005, upstream PyTorch 0.05."""


@dataclass
class RopeScalingConfig:
    """How the rotary frequencies were stretched to reach further than they were trained for."""

    kind: str = choice("none", "linear", "llama3")
    """``none``; ``linear`` divides all frequencies by ``factor``; ``llama3`` divides those of wavelengths above
    original_length / low_freq_factor, leaves those below original_length / high_freq_factor, and goes over between."""

    factor: float = number(1.0, Range(1))
    """Divisor of the stretched frequencies."""

    low_freq_factor: float = number(1.0, POSITIVE)
    """``llama3``: periods that a wavelength fits into ``original_length``, up to which it is stretched wholly."""

    high_freq_factor: float = number(4.0, POSITIVE)
    """``llama3``: periods from which it is left as it is; above ``low_freq_factor``."""

    original_length: int = number(8192, COUNT)
    """``llama3``: tokens a sequence had before the stretch."""


@dataclass
class ModelConfig:
    """The network. Presets with the published sizes are in ``configs/model/``."""

    attention: str = choice("dcmha", "mha")
    """``dcmha`` for a DCFormer, ``mha`` for its Transformer twin: the same model without compose."""

    backend: str = choice("auto", "reference", "chunked", "compiled", "triton")
    """Attention implementation: ``reference`` (dense, slow, the definition), ``chunked`` (exact, no T x S tensor kept),
    ``compiled`` (the same through torch.compile: faster on long sequences, after a minute of compiling), ``triton``
    (the same by fused kernels on NVIDIA GPUs), or ``auto``: ``triton`` on GPUs where a trial of the kernels gives the
    right results, else ``chunked``. The run says which, and why."""

    scratch_mib: int = number(256, COUNT)
    """Scratch memory of one attention call in MiB, for the scores of a chunk of queries. More makes larger and fewer
    chunks; with less, a chunk has fewer queries, down to one tile of them. Backend ``reference`` has no chunks."""

    vocab_size: int = number(256, Range(2, 2**31 - 1))  # tokens are int32
    """Rows of the embedding; at least the tokenizer's vocabulary, which the data's manifest states."""

    layers: int = number(12, COUNT)
    """Number of blocks."""

    dim: int = number(768, COUNT)
    """Width E of the residual stream."""

    heads: int = number(12, COUNT)
    """Query heads H a layer."""

    kv_heads: int | None = number(None, COUNT)
    """Key/value heads a layer; null means as many as ``heads``, fewer is grouped-query attention.
    Must divide ``heads``."""

    head_dim: int | None = number(None, COUNT)
    """Width D of a head; null means dim / heads."""

    ffn: str = choice("swiglu", "gelu")
    """Feed-forward network: ``swiglu`` (three matrices) or ``gelu`` (two, exact GELU)."""

    ffn_dim: int = number(2048, COUNT)
    """Hidden width of the feed-forward network."""

    multi_gate: int | None = number(None, COUNT)
    """Number of gates over equal parts of the swiglu's hidden width (upstream ``mgate_dim``); null for none.
    Must divide ``ffn_dim``."""

    norm: str = choice("rmsnorm", "layernorm")
    """Normalisation of blocks and output: ``rmsnorm`` or ``layernorm`` (with bias)."""

    norm_eps: float = number(1e-6, POSITIVE)
    """Epsilon of those normalisations."""

    qk_norm: bool = True
    """RMSNorm over head_dim, with scale, on queries and keys before RoPE."""

    qk_norm_eps: float = number(1e-6, POSITIVE)
    """Epsilon of ``qk_norm`` (upstream: 1e-6 in PyTorch, 1e-5 in the JAX configs)."""

    bias: bool = False
    """Biases in the attention and feed-forward matrices (DCPythia: true)."""

    qkv_bias: bool = False
    """Biases in the query, key and value matrices also where ``bias`` is false (as in Qwen2)."""

    parallel_residual: bool = False
    """Attention and feed-forward both read the block's input (DCPythia: true)."""

    rope_base: float = number(10000.0, Range(1, open_low=True))
    """Base of the rotary position embedding's wavelengths."""

    rope_fraction: float = number(1.0, Range(0, 1, open_low=True))
    """Leading part of each head that is rotated, in (0, 1]; fraction * head_dim is rounded down and must be even."""

    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Settings of the stretched rotary frequencies."""

    windows: list[int | None] = number([256, None], COUNT)
    """Keys a query sees, itself included, per layer; null sees all.
    The pattern repeats over the layers: [256, null] alternates."""

    tied_embeddings: bool = False
    """Use the embedding as the output matrix too."""

    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """Settings of the dynamic composition."""
