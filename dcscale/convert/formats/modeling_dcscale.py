"""DCFormer language models for Hugging Face transformers (4.57 or newer), in one file.

``tools/convert_checkpoint.py SRC DST --to huggingface`` of dcscale copies this file into every folder that it writes.
It needs only torch and transformers. Dynamically composable multi-head attention (DCMHA) is from Xiao et al., ICML
2024, arXiv 2405.08553. It is computed here as it is defined, in plain PyTorch, for one chunk of queries at a time.

Axes in names: B batch, T new tokens, S keys, C queries of a chunk, E model width, H query heads, G key/value heads,
D head width, R rank, F frequencies of the rotary table, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

W1_EPS = 1e-6
"""Epsilon of the normalisation of w1; not a setting."""
SCRATCH_ELEMENTS = 2**25
"""Scores of a chunk of queries, over all rows and heads: 128 MiB in float32. A few such tensors exist at once."""
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in inputs and outputs in the installed version of transformers."""


def _one_of(*choices: str) -> tuple:
    """A rule of a setting: (text for error messages, test)."""
    return f"one of {', '.join(choices)}", lambda value: value in choices


_INTEGER = "an integer of at least 1", lambda value: type(value) is int and value >= 1
_INTEGER_OR_NONE = "null or an integer of at least 1", lambda value: value is None or _INTEGER[1](value)
_POSITIVE = "a number above 0", lambda value: type(value) in (int, float) and 0 < value < float("inf")
_NOT_NEGATIVE = "a number of at least 0", lambda value: value == 0 or _POSITIVE[1](value)
_BOOL = "true or false", lambda value: type(value) is bool
_WINDOWS = "a list of nulls and integers >= 1", lambda v: type(v) is list and v and all(map(_INTEGER_OR_NONE[1], v))
_FORMAT = "of format 1, like this file", lambda value: isinstance(value, dict) and value.get("format") == 1

SETTINGS = {  # name: (default, rule); the names are those of dcscale's configs
    "attention": ("dcmha", _one_of("dcmha", "mha")),  # mha: the same model without compose
    "vocab_size": (256, _INTEGER),
    "layers": (12, _INTEGER),
    "dim": (768, _INTEGER),  # E
    "heads": (12, _INTEGER),  # H
    "kv_heads": (None, _INTEGER_OR_NONE),  # G; null becomes heads
    "head_dim": (None, _INTEGER_OR_NONE),  # D; null becomes dim / heads
    "ffn": ("swiglu", _one_of("swiglu", "gelu")),  # gelu: two matrices, exact GELU
    "ffn_dim": (2048, _INTEGER),
    "multi_gate": (None, _INTEGER_OR_NONE),  # gates for equal parts of swiglu's hidden width
    "norm": ("rmsnorm", _one_of("rmsnorm", "layernorm")),
    "norm_eps": (1e-6, _POSITIVE),
    "qk_norm": (True, _BOOL),  # RMSNorm on queries and keys, before RoPE
    "qk_norm_eps": (1e-6, _POSITIVE),
    "bias": (False, _BOOL),  # biases in attention and feed-forward
    "qkv_bias": (False, _BOOL),  # biases of q, k and v, also if bias is false
    "parallel_residual": (False, _BOOL),  # attention and feed-forward both read the block's input
    "rope_base": (10000.0, _POSITIVE),
    "rope_fraction": (1.0, _POSITIVE),  # leading part of each head's dimensions that RoPE rotates
    "windows": ([None], _WINDOWS),  # keys a query sees, incl. its own, by layer, repeated; null: all
    "max_position_embeddings": (1024, _INTEGER),  # tokens of a training sequence; longer ones are allowed
    "tie_word_embeddings": (False, _BOOL),
    "use_cache": (True, _BOOL),
    "dcscale": ({"format": 1}, _FORMAT),
}
COMPOSE = {
    "rank": (2, _INTEGER),  # R
    "pre": (True, _BOOL),  # compose the scores
    "post": (True, _BOOL),  # compose the probabilities
    "query_wise": (True, _BOOL),
    "key_wise": (True, _BOOL),
    "low_rank": (True, _BOOL),
    "gates": (True, _BOOL),
    "gelu": ("tanh", _one_of("tanh", "erf")),  # of the projection
    "gate_init": (0.005, _NOT_NEGATIVE),  # for initial weights only
}
ROPE_FREQUENCY_SCALING = {  # rope_scaling in dcscale, a name to which transformers gives another meaning
    "kind": ("none", _one_of("none", "linear", "llama3")),  # linear: frequencies / factor; llama3: only the low ones
    "factor": (1.0, _POSITIVE),
    "low_freq_factor": (1.0, _POSITIVE),  # scales frequencies with up to this many periods in original_length
    "high_freq_factor": (4.0, _POSITIVE),  # keeps those with this many or more
    "original_length": (8192, _INTEGER),
}


def _require(fits: bool, name: str, value: object, rule: str) -> None:
    if not fits:
        raise ValueError(f"the model's config has {name} = {value!r}, but it must be {rule}")


def _take(given: dict, known: dict, prefix: str = "") -> dict:
    """Removes the known settings from ``given`` and returns their values, checked."""
    taken = {name: given.pop(name, copy.copy(default)) for name, (default, _) in known.items()}
    for name, value in taken.items():
        rule, fits = known[name][1]
        _require(fits(value), prefix + name, value, rule)
    return taken


class DCScaleConfig(PretrainedConfig):
    """``SETTINGS``, ``COMPOSE`` and ``ROPE_FREQUENCY_SCALING``. Raises ValueError for an invalid value."""

    model_type = "dcscale"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"hidden_size": "dim", "intermediate_size": "ffn_dim", "num_hidden_layers": "layers"}
    attribute_map |= {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads"}

    def __init__(self, **kwargs):
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        s = _take(kwargs, SETTINGS)
        for name, known in (("compose", COMPOSE), ("rope_frequency_scaling", ROPE_FREQUENCY_SCALING)):
            given = kwargs.pop(name, {})
            fits = isinstance(given, dict) and not given.keys() - known.keys()
            _require(fits, name, given, f"a table with some of {', '.join(known)}")
            s[name] = _take(dict(given), known, f"{name}.")
        even = s["head_dim"] or s["dim"] % s["heads"] == 0
        _require(even, "heads", s["heads"], f"a divisor of dim {s['dim']}, as head_dim is null")
        s["head_dim"], s["kv_heads"] = s["head_dim"] or s["dim"] // s["heads"], s["kv_heads"] or s["heads"]
        _require(s["heads"] % s["kv_heads"] == 0, "kv_heads", s["kv_heads"], f"a divisor of heads {s['heads']}")
        width = s["head_dim"]
        fits = 2 <= int(s["rope_fraction"] * width) <= width and int(s["rope_fraction"] * width) % 2 == 0
        _require(
            fits,
            "rope_fraction",
            s["rope_fraction"],
            f"such that RoPE rotates an even number of a head's {width} dimensions",
        )
        low, high = (s["rope_frequency_scaling"][f"{side}_freq_factor"] for side in ("low", "high"))
        _require(low < high, "rope_frequency_scaling.high_freq_factor", high, f"above low_freq_factor {low}")
        if s["multi_gate"] is not None:
            fits = s["ffn"] == "swiglu" and s["ffn_dim"] % s["multi_gate"] == 0
            _require(fits, "multi_gate", s["multi_gate"], f"a divisor of ffn_dim {s['ffn_dim']}, with ffn swiglu")
        for name, value in s.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=s["tie_word_embeddings"], **kwargs)

    def compose_branches(self) -> list:
        """The (stage, side) pairs of compose that are switched on, in the order of axis C of its parameters."""
        c = self.compose
        if self.attention == "mha" or not (c["low_rank"] or c["gates"]):
            return []
        sides = [side for side, on in (("q", c["query_wise"]), ("k", c["key_wise"])) if on]
        return [(stage, side) for stage in ("pre", "post") if c[stage] for side in sides]


class LayerCache:
    """What one layer needs of earlier tokens, all [B, S, ...]: keys, values, and the compose weights k1, k2, kg of a
    key's token for the stages pre and post. A layer with a window keeps window - 1 tokens.
    """

    def __init__(self, window: int | None):
        self.window = window
        self.tensors: dict = {}

    def extend(self, new: dict) -> dict:
        """Adds the new tokens; returns the tensors of all tokens that the new ones can see."""
        seen = {name: torch.cat([self.tensors[name], x], dim=1) if self.tensors else x for name, x in new.items()}
        self.tensors = seen
        if self.window is not None and seen["k"].shape[1] >= self.window:
            first = seen["k"].shape[1] - self.window + 1
            self.tensors = {name: x[:, first:].clone() for name, x in seen.items()}  # a copy frees the rest
        return seen


class DCScaleCache:
    """The earlier tokens of a batch. Calls of the model and of ``generate()`` return it, and continue from it."""

    is_compileable = is_croppable = False  # read by generate(); a layer with a window cannot restore old tokens
    is_linear = (False,)

    def __init__(self, windows: list):
        self.layers = [LayerCache(window) for window in windows]
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row b by row beam_idx[b], for beam search."""
        for layer in self.layers:
            layer.tensors = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in layer.tensors.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, for several continuations of a shared beginning."""
        for layer in self.layers:
            layer.tensors = {name: x.repeat_interleave(repeats, dim=0) for name, x in layer.tensors.items()}


def make_norm(config: DCScaleConfig) -> nn.Module:
    # torch computes both in float32 internally, and rounds once.
    return {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm](config.dim, eps=config.norm_eps)


def rope_table(positions: Tensor, config: DCScaleConfig) -> tuple:
    """(cos, sin), float32 [..., F], for positions [...]. Angles are float64: float32 is too coarse for large positions.

    angle[t, i] = t * base^(-2i / dim), with frequencies scaled by ``rope_frequency_scaling``.
    """
    dim, s = int(config.rope_fraction * config.head_dim), config.rope_frequency_scaling
    inverse_F = config.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / -dim)
    kept_F = {"none": 1.0, "linear": 0.0}.get(s["kind"])
    if s["kind"] == "llama3":  # the rule of Llama 3.1: long periods are scaled, short ones kept, linear in between
        periods_F = s["original_length"] * inverse_F / (2 * torch.pi)
        kept_F = ((periods_F - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    inverse_F = inverse_F * (kept_F + (1 - kept_F) / s["factor"])
    angles = positions.double().unsqueeze(-1) * inverse_F
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates dimensions (i, i + F) by the table's angles; those from 2F on stay. Computed in float32 or float64."""
    frequencies = cos_TF.shape[-1]
    first, second, rest = x_BTHD.split([frequencies, frequencies, x_BTHD.shape[3] - 2 * frequencies], dim=3)
    work_type = torch.promote_types(x_BTHD.dtype, torch.float32)
    first, second, cos, sin = first.to(work_type), second.to(work_type), cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([part.to(x_BTHD.dtype) for part in rotated] + [rest], dim=3)


def compose(scores_BHCS: Tensor, w: dict) -> Tensor:
    """Composes the heads' scores or probabilities A with weights of the query's token (q1, q2, qg) and of the key's
    token (k1, k2, kg). At each query and key:

    A'[h] = A[h] * (1 + qg[h] + kg[h]) + sum_r q2[r, h] * (sum_g q1[r, g] * A[g])
                                       + sum_r k2[r, h] * (sum_g k1[r, g] * A[g])

    Terms whose weights are missing are left out.
    """
    out_BHCS = scores_BHCS
    w = {name: x.to(scores_BHCS.dtype) for name, x in w.items()}
    if "qg" in w:
        out_BHCS = out_BHCS + scores_BHCS * w["qg"].transpose(1, 2).unsqueeze(3)
    if "kg" in w:
        out_BHCS = out_BHCS + scores_BHCS * w["kg"].transpose(1, 2).unsqueeze(2)
    if "q1" in w:
        latent_BRCS = torch.einsum("bgcs,bcrg->brcs", scores_BHCS, w["q1"])
        out_BHCS = out_BHCS + torch.einsum("brcs,bcrh->bhcs", latent_BRCS, w["q2"])
    if "k1" in w:
        latent_BRCS = torch.einsum("bgcs,bsrg->brcs", scores_BHCS, w["k1"])
        out_BHCS = out_BHCS + torch.einsum("brcs,bsrh->bhcs", latent_BRCS, w["k2"])
    return out_BHCS


def attend_chunk(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, pre: dict, post: dict, seen: Tensor) -> Tensor:
    """compose(softmax(mask(compose(q k^T / sqrt(D), pre))), post) v -> [B, C, H, D]. Computed in float32 or float64.

    ``pre``, ``post``: weights of compose for these queries and keys. ``seen``: bool [C, S] or [B, 1, C, S].
    """
    work_type = torch.promote_types(q_BCHD.dtype, torch.float32)
    group = q_BCHD.shape[2] // k_BSGD.shape[2]
    q, k, v = (x.to(work_type) for x in (q_BCHD, k_BSGD, v_BSGD))
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores_BHCS = compose(torch.einsum("bchd,bshd->bhcs", q, k) * q.shape[-1] ** -0.5, pre)
    probabilities_BHCS = compose(scores_BHCS.masked_fill(~seen, -torch.inf).softmax(-1), post)
    return torch.einsum("bhcs,bshd->bchd", probabilities_BHCS, v).to(q_BCHD.dtype)


def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, weights: dict, window: int | None, mask_BS) -> Tensor:
    """Causal attention of the last T of S tokens, in chunks of queries, so that no tensor [B, H, T, S] exists.

    ``weights``: of compose, for ``pre`` and ``post``. ``mask_BS``: False for padding, which no other token sees; None
    without padding.
    """
    (batch, queries, heads, _), keys = q_BTHD.shape, k_BSGD.shape[1]
    max_queries = queries if window is None else max(window, 64)
    max_keys = keys if window is None else min(keys, window + max_queries)
    step = max(1, min(max_queries, SCRATCH_ELEMENTS // (batch * heads * max_keys)))
    parts = []
    for start in range(0, queries, step):
        end = min(start + step, queries)
        # Keys that some query of this chunk sees: [low, high).
        high = keys - queries + end
        low = 0 if window is None else max(0, high - (end - start) - window + 1)
        key = torch.arange(low, high, device=q_BTHD.device)
        age_CS = key[-(end - start) :, None] - key
        seen = age_CS >= 0 if window is None else (age_CS >= 0) & (age_CS < window)
        if mask_BS is not None:
            seen = (seen & (mask_BS[:, None, low:high] | (age_CS == 0))).unsqueeze(1)
        part = {"q": slice(start, end), "k": slice(low, high)}
        pre, post = ({name: x[:, part[name[0]]] for name, x in weights[stage].items()} for stage in ("pre", "post"))
        inputs = (q_BTHD[:, start:end], k_BSGD[:, low:high], v_BSGD[:, low:high], pre, post, seen)
        if torch.is_grad_enabled() and step < queries:  # otherwise backward keeps the scores of all chunks
            parts.append(checkpoint(attend_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(attend_chunk(*inputs))
    return torch.cat(parts, dim=1)


class ComposeProjection(nn.Module):
    """Computes the weights of compose from the layer's normalised input x. For each branch c, a (stage, side) pair:

    w1, w2 = split(gelu(x @ dw1[:, c]) @ qkw[c])      R rows each;  w1 <- w1 / rms(w1 over heads)
    gate   = tanh(x @ dd[:, c])
    """

    def __init__(self, config: DCScaleConfig):
        super().__init__()
        self.branches, self.heads, self.rank = config.compose_branches(), config.heads, config.compose["rank"]
        self.approximate = {"tanh": "tanh", "erf": "none"}[config.compose["gelu"]]
        self.gate_init = config.compose["gate_init"]
        branches, hidden = len(self.branches), 2 * self.rank * self.heads
        self.dw1 = self.qkw = self.dd = None
        if config.compose["low_rank"]:
            self.dw1 = nn.Parameter(torch.empty(config.dim, branches, hidden))
            self.qkw = nn.Parameter(torch.empty(branches, hidden, 2 * self.rank, self.heads))
        if config.compose["gates"]:
            self.dd = nn.Parameter(torch.empty(config.dim, branches * self.heads))

    def forward(self, x_BTE: Tensor) -> dict:
        """q1, q2, k1, k2 [B, T, R, H] and qg, kg [B, T, H] for ``pre`` and ``post``, those that are switched on."""
        weights: dict = {"pre": {}, "post": {}}
        if self.dw1 is not None:
            hidden = (x_BTE @ self.dw1.flatten(1)).unflatten(-1, self.dw1.shape[1:])
            hidden = F.gelu(hidden, approximate=self.approximate)
            w1, w2 = torch.einsum("btck,ckrh->btcrh", hidden, self.qkw).split(self.rank, dim=3)
            w1 = F.rms_norm(w1, (self.heads,), eps=W1_EPS)  # over the heads
            for c, (stage, side) in enumerate(self.branches):
                weights[stage] |= {f"{side}1": w1[:, :, c], f"{side}2": w2[:, :, c]}
        if self.dd is not None:
            gates = torch.tanh(x_BTE @ self.dd).unflatten(-1, (-1, self.heads))
            for c, (stage, side) in enumerate(self.branches):
                weights[stage][f"{side}g"] = gates[:, :, c]
        return weights


class DCScaleAttention(nn.Module):
    def __init__(self, config: DCScaleConfig, window: int | None):
        super().__init__()
        width, qkv_bias = config.head_dim, config.bias or config.qkv_bias
        self.width, self.window = width, window
        self.q = nn.Linear(config.dim, config.heads * width, bias=qkv_bias)
        self.k = nn.Linear(config.dim, config.kv_heads * width, bias=qkv_bias)
        self.v = nn.Linear(config.dim, config.kv_heads * width, bias=qkv_bias)
        self.out = nn.Linear(config.heads * width, config.dim, bias=config.bias)
        self.q_norm = nn.RMSNorm(width, eps=config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(width, eps=config.qk_norm_eps) if config.qk_norm else None
        self.compose = ComposeProjection(config) if config.compose_branches() else None

    def forward(self, x_BTE: Tensor, rope: tuple, mask_BS: Tensor | None, cache: LayerCache | None) -> Tensor:
        q, k, v = (project(x_BTE).unflatten(-1, (-1, self.width)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        weights = {"pre": {}, "post": {}} if self.compose is None else self.compose(x_BTE)
        if cache is not None:
            # Weights of the query side (q1, q2, qg) are needed for new tokens only.
            new = {"k": k, "v": v}
            for stage in weights:
                new |= {f"{stage}.{name}": x for name, x in weights[stage].items() if name[0] == "k"}
            seen = cache.extend(new)
            k, v = seen["k"], seen["v"]
            for stage in weights:
                weights[stage] |= {name: seen[f"{stage}.{name}"] for name in weights[stage] if name[0] == "k"}
        if mask_BS is not None:
            mask_BS = mask_BS[:, -k.shape[1] :]
        return self.out(attend(q, k, v, weights, self.window, mask_BS).flatten(2))


class FeedForward(nn.Module):
    """swiglu: down(silu(gate(x)) * up(x)); with multi_gate, softmax(multi_gate(x)) scales equal parts of the hidden
    width. gelu: down(gelu(up(x))), with the exact GELU.
    """

    def __init__(self, config: DCScaleConfig):
        super().__init__()
        gated = config.ffn == "swiglu"
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=config.bias) if gated else None
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)
        self.multi_gate = nn.Linear(config.dim, config.multi_gate, bias=False) if config.multi_gate else None

    def forward(self, x_BTE: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x_BTE)) if self.gate is None else F.silu(self.gate(x_BTE)) * self.up(x_BTE)
        if self.multi_gate is not None:
            gates = self.multi_gate(x_BTE).softmax(-1)
            hidden = (hidden.unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)).flatten(-2)
        return self.down(hidden)


class DCScaleBlock(GradientCheckpointingLayer):
    def __init__(self, config: DCScaleConfig, window: int | None):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm = make_norm(config)
        self.attention = DCScaleAttention(config, window)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x_BTE: Tensor, rope: tuple, mask_BS: Tensor | None, cache: LayerCache | None) -> Tensor:
        attended_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), rope, mask_BS, cache)
        return attended_BTE + self.ffn(self.ffn_norm(x_BTE if self.parallel_residual else attended_BTE))


class DCScaleForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Its parameters have the same names as in dcscale."""

    config_class = DCScaleConfig
    base_model_prefix = ""
    _input_embed_layer = "embedding"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # forward takes num_items_in_batch from Trainer
    _no_split_modules = ["DCScaleBlock"]
    _tied_weights_keys = {"output.weight": "embedding.weight"}
    _is_stateful = True  # a layer with a window cannot drop its last tokens: generate() refuses assistants

    def __init__(self, config: DCScaleConfig):
        super().__init__(config)
        self.windows = [config.windows[layer % len(config.windows)] for layer in range(config.layers)]
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DCScaleBlock(config, window) for window in self.windows)
        self.norm = make_norm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() and forward create a DCScaleCache: compose needs more than keys and values

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights as in dcscale: see dcscale/models/init.py."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=min(0.006 * max(1.0, 1024 / self.config.dim), 0.05))
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        elif isinstance(module, ComposeProjection):
            hidden = 2 * module.rank * module.heads
            if module.dw1 is not None:
                nn.init.normal_(module.dw1, std=(2 / (self.config.dim + hidden)) ** 0.5)
                nn.init.normal_(module.qkw, std=0.02 / (hidden**0.5 * (module.heads + module.rank)))
            if module.dd is not None:
                nn.init.normal_(module.dd, std=module.gate_init * (2 / (self.config.dim + module.heads)) ** 0.5)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: DCScaleCache | None = None,
        past_key_values: DCScaleCache | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> tuple | CausalLMOutputWithPast:
        """Logits [B, T, V], or only those of the last ``logits_to_keep`` tokens; float32, or float64 for a float64
        model.

        Args:
            attention_mask: [B, cached and new tokens], 0 for padding, on either side.
            position_ids: [B, T]; None counts the tokens that are not padding.
            labels: [B, T], the ids of the tokens themselves, -100 where there is no loss; forward shifts them by one.
            cache, past_key_values: from an earlier call for the same rows; it is extended in place.
            output_hidden_states: return the embeddings, the output of each block but the last, and that of the final
                norm, [B, T, E] each.

        Raises:
            ValueError: the inputs do not match.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is set, but attention is computed in chunks and not kept: leave it out")
        if cache is not None and not isinstance(cache, DCScaleCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, without compose weights: leave it out, the model creates one"
            )
        x_BTE = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        # Recomputing a block would add its tokens to the cache a second time.
        recompute = self.blocks[0].gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recompute and cache is not None:
            raise ValueError("a cache is given, but gradient checkpointing recomputes blocks without one: leave it out")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache and not recompute:
            cache = DCScaleCache(self.windows)
        past, tokens = 0 if cache is None else cache.length, x_BTE.shape[1]
        if past and (rows := len(cache.layers[0].tensors["k"])) != len(x_BTE):
            raise ValueError(
                f"the cache holds {rows} rows, but the input has {len(x_BTE)}: repeat the cache's rows with its "
                "batch_repeat_interleave(), or leave it out"
            )
        if attention_mask is not None and attention_mask.shape != (len(x_BTE), past + tokens):
            shape = f"{list(attention_mask.shape)}, but must be {[len(x_BTE), past + tokens]}"
            raise ValueError(f"attention_mask is {shape}, for the {past} cached and {tokens} new tokens")
        if position_ids is None:
            counted = x_BTE.new_ones(1, past + tokens) if attention_mask is None else attention_mask
            position_ids = (counted.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        rope = rope_table(position_ids, self.config)
        # torch.compile and torch.export cannot branch on the values of a mask.
        needed = attention_mask is not None and (torch.compiler.is_compiling() or not attention_mask.all())
        mask_BS = attention_mask.bool() if needed else None

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        for number, block in enumerate(self.blocks):
            if output_hidden_states:
                states.append(x_BTE)
            x_BTE = block(x_BTE, rope, mask_BS, None if cache is None else cache.layers[number])
        x_BTE = self.norm(x_BTE)
        if cache is not None:
            cache.length += tokens
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.output(x_BTE[:, kept])
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        loss = None
        if labels is not None:
            counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **counted)
        states = (*states, x_BTE) if output_hidden_states else None
        extra = {CACHE_NAME: cache if use_cache else None, "hidden_states": states}
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **extra)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args) -> None:
        """Creates the cache of ``generate()``, if none is given."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {kind!r}, but only the model's own cache, which grows with the text, holds "
                "the compose weights of earlier tokens: leave it out"
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size is set, but inputs_embeds are not read in chunks: leave one out")
        if model_kwargs.get(CACHE_NAME) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = DCScaleCache(self.windows)

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs) -> dict:
        """The inputs of the next step: the tokens that are not in the cache yet. Called by ``generate()``."""
        cache, new = kwargs.get(CACHE_NAME), kwargs.get("next_sequence_length")
        if "cache_position" in kwargs:  # transformers 4, whose positions count padding if prefill_chunk_size is set
            new, kwargs["position_ids"] = len(kwargs["cache_position"]), None
        if new is not None and new < 1:
            raise ValueError(
                f"the cache holds {cache.get_seq_length()} tokens already, so that no new one is left to read: give "
                "input_ids that begin with these tokens and are longer"
            )
        if None not in (cache, inputs_embeds) and cache.get_seq_length() >= inputs_embeds.shape[1]:
            inputs_embeds = None  # transformers 4 would read a single embedding again in every step
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        for unused in ("cache_position", "tokenizer"):  # the tokenizer of stop_strings
            inputs.pop(unused, None)
        return inputs

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: transformers' continuous batching has a cache of its own, and calls this method."""
        raise ValueError(
            "continuous batching (cache_implementation 'paged', generate_batch) keeps keys and values only, not the "
            "compose weights of earlier tokens: use generate() without it"
        )
