"""DCFormer language models for Hugging Face transformers (4.57 or newer): the whole model in this one file.

A folder made by ``tools/convert_checkpoint.py SRC DST --to huggingface`` of dcscale holds a copy of it, and needs
nothing else but torch and transformers. Dynamically composable multi-head attention (DCMHA) is from Xiao et al.,
ICML 2024, arXiv 2405.08553. It is written here as it is defined, in plain PyTorch, on one chunk of queries at a time.

Axes in names: B batch, T new tokens, S keys, C queries of a chunk, E model width, H query heads, G key/value heads,
D head width, R rank, F frequencies of the rotary table, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

W1_EPS = 1e-6  # epsilon of the normalisation of w1: no setting
SCRATCH_ELEMENTS = 2**25  # scores of a chunk of queries, all rows and heads: 128 MiB; a few of these exist at once
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed transformers calls the cache in inputs and outputs."""


def _one_of(*choices: str) -> tuple:
    return f"one of {', '.join(choices)}", lambda value: value in choices


_WHOLE = "a whole number from 1", lambda value: type(value) is int and value >= 1
_WHOLE_OR_NONE = "null or a whole number from 1", lambda value: value is None or _WHOLE[1](value)
_POSITIVE = "a number above 0", lambda value: type(value) in (int, float) and 0 < value < float("inf")
_SWITCH = "true or false", lambda value: type(value) is bool
_WINDOWS = "a list of nulls and numbers from 1", lambda v: type(v) is list and v and all(map(_WHOLE_OR_NONE[1], v))
_FORMAT = "of format 1, as this modelling file is", lambda value: isinstance(value, dict) and value.get("format") == 1

SETTINGS = {  # name: (default, rule); the names are those of dcscale's configs
    "attention": ("dcmha", _one_of("dcmha", "mha")),  # mha is the same without compose
    "vocab_size": (256, _WHOLE),
    "layers": (12, _WHOLE),
    "dim": (768, _WHOLE),  # E
    "heads": (12, _WHOLE),  # H
    "kv_heads": (None, _WHOLE_OR_NONE),  # G; null: as many as heads
    "head_dim": (None, _WHOLE_OR_NONE),  # D; null: dim / heads
    "ffn": ("swiglu", _one_of("swiglu", "gelu")),  # gelu: two matrices, exact GELU
    "ffn_dim": (2048, _WHOLE),
    "multi_gate": (None, _WHOLE_OR_NONE),  # gates over equal parts of the swiglu's hidden width
    "norm": ("rmsnorm", _one_of("rmsnorm", "layernorm")),
    "norm_eps": (1e-6, _POSITIVE),
    "qk_norm": (True, _SWITCH),  # RMSNorm on queries and keys, before RoPE
    "qk_norm_eps": (1e-6, _POSITIVE),
    "bias": (False, _SWITCH),  # in the matrices of attention and feed-forward
    "qkv_bias": (False, _SWITCH),  # in those of queries, keys and values in any case
    "parallel_residual": (False, _SWITCH),  # attention and feed-forward both read the block's input
    "rope_base": (10000.0, _POSITIVE),
    "rope_fraction": (1.0, _POSITIVE),  # leading part of each head that is turned
    "windows": ([None], _WINDOWS),  # keys a query sees, itself included, by layer, repeated; null: all
    "max_position_embeddings": (1024, _WHOLE),  # tokens of a training sequence; longer ones are computed as well
    "tie_word_embeddings": (False, _SWITCH),
    "use_cache": (True, _SWITCH),
    "dcscale": ({"format": 1}, _FORMAT),
}
COMPOSE = {
    "rank": (2, _WHOLE),  # R
    "pre": (True, _SWITCH),  # compose the scores
    "post": (True, _SWITCH),  # compose the probabilities
    "query_wise": (True, _SWITCH),
    "key_wise": (True, _SWITCH),
    "low_rank": (True, _SWITCH),
    "gates": (True, _SWITCH),
    "gelu": ("tanh", _one_of("tanh", "erf")),  # of the projection
    "gate_init": (0.005, ("a number from 0", lambda value: value == 0 or _POSITIVE[1](value))),  # initial weights only
}


ROPE_FREQUENCY_SCALING = {  # rope_scaling in dcscale, which is a word of transformers, too
    "kind": ("none", _one_of("none", "linear", "llama3")),  # linear: frequencies / factor; llama3: only the low ones
    "factor": (1.0, _POSITIVE),
    "low_freq_factor": (1.0, _POSITIVE),  # periods in original_length up to which a frequency is low
    "high_freq_factor": (4.0, _POSITIVE),  # and from which it is kept
    "original_length": (8192, _WHOLE),
}


def _require(fits: bool, name: str, value: object, rule: str) -> None:
    if not fits:
        raise ValueError(f"the model's config has {name} = {value!r}, but it must be {rule}")


def _take(given: dict, known: dict, prefix: str = "") -> dict:
    """The values of the known settings, checked; they are removed from ``given``."""
    taken = {name: given.pop(name, copy.copy(default)) for name, (default, _) in known.items()}
    for name, value in taken.items():
        rule, fits = known[name][1]
        _require(fits(value), prefix + name, value, rule)
    return taken


class DCScaleConfig(PretrainedConfig):
    """``SETTINGS``, ``COMPOSE`` and ``ROPE_FREQUENCY_SCALING``. Raises ValueError for what is of no use."""

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
            _require(fits, name, given, f"a table of {', '.join(known)}")
            s[name] = _take(dict(given), known, f"{name}.")
        width, even = s["head_dim"] or s["dim"] // s["heads"], s["head_dim"] or s["dim"] % s["heads"] == 0
        _require(even, "heads", s["heads"], f"a divisor of dim {s['dim']}, as head_dim is null")
        _require(s["heads"] % (s["kv_heads"] or 1) == 0, "kv_heads", s["kv_heads"], f"a divisor of heads {s['heads']}")
        fits = 2 <= int(s["rope_fraction"] * width) <= width and int(s["rope_fraction"] * width) % 2 == 0
        _require(fits, "rope_fraction", s["rope_fraction"], f"such that it turns an even part of a head's {width}")
        low, high = (s["rope_frequency_scaling"][f"{side}_freq_factor"] for side in ("low", "high"))
        _require(low < high, "rope_frequency_scaling.high_freq_factor", high, f"above low_freq_factor {low}")
        if s["multi_gate"] is not None:
            fits = s["ffn"] == "swiglu" and s["ffn_dim"] % s["multi_gate"] == 0
            _require(fits, "multi_gate", s["multi_gate"], f"a divisor of ffn_dim {s['ffn_dim']}, of a swiglu")
        for name, value in s.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=s["tie_word_embeddings"], **kwargs)

    @property
    def head_width(self) -> int:
        """D."""
        return self.head_dim or self.dim // self.heads

    def compose_branches(self) -> list:
        """The (stage, side) pairs of compose that are there, in the order that its parameters have."""
        c = self.compose
        if self.attention == "mha" or not (c["low_rank"] or c["gates"]):
            return []
        sides = [side for side, on in (("q", c["query_wise"]), ("k", c["key_wise"])) if on]
        return [(stage, side) for stage in ("pre", "post") if c[stage] for side in sides]


class LayerCache:
    """What one layer needs of earlier tokens, all [B, S, ...]: keys and values, and of ``pre`` and ``post`` what
    compose computes from a key's token: k1, k2, kg. A layer with a window keeps window - 1 tokens.
    """

    def __init__(self, window: int | None):
        self.window = window
        self.tensors: dict = {}

    def extend(self, new: dict) -> dict:
        """Keep the new tokens; return what is kept and new, in one."""
        seen = {name: torch.cat([self.tensors[name], x], dim=1) if self.tensors else x for name, x in new.items()}
        self.tensors = seen
        if self.window is not None and seen["k"].shape[1] >= self.window:
            first = seen["k"].shape[1] - self.window + 1
            self.tensors = {name: x[:, first:].clone() for name, x in seen.items()}  # so that the rest is freed
        return seen


class DCScaleCache:
    """The earlier tokens of a batch, made and returned by the model's forward; ``generate()`` uses it by itself."""

    is_compileable = False  # asked by generate()

    def __init__(self, windows: list):
        self.layers = [LayerCache(window) for window in windows]
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on from what was row beam_idx[b]: for beam search."""
        for layer in self.layers:
            layer.tensors = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in layer.tensors.items()}


def make_norm(config: DCScaleConfig) -> nn.Module:
    # torch computes both in float32 inside, whatever the type of the input, and rounds once.
    return {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm](config.dim, eps=config.norm_eps)


def rope_table(positions: Tensor, config: DCScaleConfig) -> tuple:
    """(cos, sin), float32 [..., F]; the angles in float64, as float32 is too coarse for late positions."""
    dim, s = int(config.rope_fraction * config.head_width), config.rope_frequency_scaling
    inverse_F = config.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / -dim)
    kept_F = {"none": 1.0, "linear": 0.0}.get(s["kind"])
    if s["kind"] == "llama3":  # as Llama 3.1
        periods_F = s["original_length"] * inverse_F / (2 * torch.pi)
        kept_F = ((periods_F - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    inverse_F = inverse_F * (kept_F + (1 - kept_F) / s["factor"])
    angles = positions.double().unsqueeze(-1) * inverse_F
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn dimension i with i + F by the table's angles, and leave those from 2F on; in float32 at least."""
    frequencies = cos_TF.shape[-1]
    first, second, rest = x_BTHD.split([frequencies, frequencies, x_BTHD.shape[3] - 2 * frequencies], dim=3)
    work_type = torch.promote_types(x_BTHD.dtype, torch.float32)
    first, second, cos, sin = first.to(work_type), second.to(work_type), cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([part.to(x_BTHD.dtype) for part in turned] + [rest], dim=3)


def compose(maps_BHCS: Tensor, w: dict) -> Tensor:
    """The heads' maps, mixed by weights from the query's token (q1, q2, qg) and the key's (k1, k2, kg):

    A'[h] = A[h] * (1 + qg[h] + kg[h]) + sum_r q2[r, h] * (sum_g q1[r, g] * A[g])
                                       + sum_r k2[r, h] * (sum_g k1[r, g] * A[g])     at each query and key
    """
    out_BHCS = maps_BHCS
    w = {name: x.to(maps_BHCS.dtype) for name, x in w.items()}
    if "qg" in w:
        out_BHCS = out_BHCS + maps_BHCS * w["qg"].transpose(1, 2).unsqueeze(3)
    if "kg" in w:
        out_BHCS = out_BHCS + maps_BHCS * w["kg"].transpose(1, 2).unsqueeze(2)
    if "q1" in w:
        latent_BRCS = torch.einsum("bgcs,bcrg->brcs", maps_BHCS, w["q1"])
        out_BHCS = out_BHCS + torch.einsum("brcs,bcrh->bhcs", latent_BRCS, w["q2"])
    if "k1" in w:
        latent_BRCS = torch.einsum("bgcs,bsrg->brcs", maps_BHCS, w["k1"])
        out_BHCS = out_BHCS + torch.einsum("brcs,bsrh->bhcs", latent_BRCS, w["k2"])
    return out_BHCS


def attend_chunk(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, pre: dict, post: dict, seen: Tensor) -> Tensor:
    """softmax(compose(q k^T / sqrt(D)), masked) composed again, times v -> [B, C, H, D]; in float32 at least."""
    work_type = torch.promote_types(q_BCHD.dtype, torch.float32)
    group = q_BCHD.shape[2] // k_BSGD.shape[2]
    q, k, v = (x.to(work_type) for x in (q_BCHD, k_BSGD, v_BSGD))
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores_BHCS = compose(torch.einsum("bchd,bshd->bhcs", q, k) * q.shape[-1] ** -0.5, pre)
    probabilities_BHCS = compose(scores_BHCS.masked_fill(~seen, -torch.inf).softmax(-1), post)
    return torch.einsum("bhcs,bshd->bchd", probabilities_BHCS, v).to(q_BCHD.dtype)


def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, weights: dict, window: int | None, mask_BS) -> Tensor:
    """Causal attention of the last T of S tokens, in chunks of queries, so that no [B, H, T, S] ever exists.

    ``weights``: those of compose, ``pre`` and ``post``. ``mask_BS``: False for padding, which nothing but itself sees;
    None for no padding.
    """
    (batch, queries, heads, _), keys = q_BTHD.shape, k_BSGD.shape[1]
    most_queries = queries if window is None else max(window, 64)
    most_keys = keys if window is None else min(keys, window + most_queries)
    step = max(1, min(most_queries, SCRATCH_ELEMENTS // (batch * heads * most_keys)))
    parts = []
    for start in range(0, queries, step):
        end = min(start + step, queries)
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
        if torch.is_grad_enabled() and step < queries:  # else backward would keep the maps of all chunks
            parts.append(checkpoint(attend_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(attend_chunk(*inputs))
    return torch.cat(parts, dim=1)


class ComposeProjection(nn.Module):
    """The weights of compose from the layer's normalised input, for each branch c, a stage and a side:

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
        """q1, q2, k1, k2 [B, T, R, H] and qg, kg [B, T, H] of ``pre`` and ``post``, where they are there."""
        weights: dict = {"pre": {}, "post": {}}
        if self.dw1 is not None:
            hidden = (x_BTE @ self.dw1.flatten(1)).unflatten(-1, self.dw1.shape[1:])
            hidden = F.gelu(hidden, approximate=self.approximate)
            w1, w2 = torch.einsum("btck,ckrh->btcrh", hidden, self.qkw).split(self.rank, dim=3)
            w1 = F.rms_norm(w1, (self.heads,), eps=W1_EPS)
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
        width, kv_heads, qkv_bias = config.head_width, config.kv_heads or config.heads, config.bias or config.qkv_bias
        self.width, self.window = width, window
        self.q = nn.Linear(config.dim, config.heads * width, bias=qkv_bias)
        self.k = nn.Linear(config.dim, kv_heads * width, bias=qkv_bias)
        self.v = nn.Linear(config.dim, kv_heads * width, bias=qkv_bias)
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
    """down(silu(gate(x)) * up(x)), where multi_gate scales equal parts of the hidden width by softmax(multi_gate(x));
    or down(gelu(up(x))), with the exact GELU.
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


class DCScaleBlock(nn.Module):
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
    """The language model; its parameters have the names that they have in dcscale."""

    config_class = DCScaleConfig
    base_model_prefix = ""
    _input_embed_layer = "embedding"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # forward takes num_items_in_batch from Trainer
    _no_split_modules = ["DCScaleBlock"]
    _tied_weights_keys = {"output.weight": "embedding.weight"}
    _is_stateful = True  # tokens cannot be taken back from a layer with a window: generate() refuses assistants

    def __init__(self, config: DCScaleConfig):
        super().__init__(config)
        self.windows = [config.windows[layer % len(config.windows)] for layer in range(config.layers)]
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DCScaleBlock(config, window) for window in self.windows)
        self.norm = make_norm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own, as a cache of keys and values is not enough

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initial weights that dcscale has: see dcscale/models/init.py."""
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
        """Logits [B, T, V] in float32 (float64 of a float64 model), or of the last ``logits_to_keep`` tokens only.

        attention_mask: [B, tokens so far and new], 0 for padding, on either side.
        position_ids: [B, T]; None counts the tokens that are no padding.
        labels: [B, T], ids of the tokens themselves (the shift is made here), -100 where there is no loss.
        cache, or past_key_values: what an earlier call returned for the same rows; it is extended in place.

        Raises ValueError for inputs that do not fit together.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is set, but the maps are computed in chunks and not kept: leave it out")
        if cache is not None and not isinstance(cache, DCScaleCache):
            raise ValueError(f"the cache is a {type(cache).__name__}, without compose weights: the model makes its own")
        x_BTE = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache and not recompute:
            cache = DCScaleCache(self.windows)
        past, tokens = 0 if cache is None else cache.length, x_BTE.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(x_BTE), past + tokens):
            shape = f"{list(attention_mask.shape)}, but must be {[len(x_BTE), past + tokens]}"
            raise ValueError(f"attention_mask is {shape}, for the {past} cached and {tokens} new tokens")
        if position_ids is None:
            counted = x_BTE.new_ones(1, past + tokens) if attention_mask is None else attention_mask
            position_ids = (counted.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        rope = rope_table(position_ids, self.config)
        mask_BS = None if attention_mask is None or attention_mask.all() else attention_mask.bool()

        states = [x_BTE] if output_hidden_states else []
        for number, block in enumerate(self.blocks):
            inputs = (x_BTE, rope, mask_BS, None if cache is None else cache.layers[number])
            x_BTE = self._gradient_checkpointing_func(block.__call__, *inputs) if recompute else block(*inputs)
            if output_hidden_states:
                states.append(x_BTE)
        if cache is not None:
            cache.length += tokens
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.output(self.norm(x_BTE[:, kept]))
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        loss = None
        if labels is not None:
            counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **counted)
        further = {CACHE_NAME: cache if use_cache else None, "hidden_states": tuple(states) or None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **further)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        """Only the tokens that the cache does not have yet; called by ``generate()``."""
        cache = kwargs.get(CACHE_NAME)
        inputs = {"input_ids": input_ids[:, 0 if cache is None else cache.get_seq_length() :]}
        if cache is None and kwargs.get("inputs_embeds") is not None:
            inputs = {"inputs_embeds": kwargs["inputs_embeds"]}
        tokens = next(iter(inputs.values())).shape[1]
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = kwargs["position_ids"][:, -tokens:]
        passed = ("attention_mask", "use_cache", "logits_to_keep", "output_hidden_states", "output_attentions")
        return inputs | {name: kwargs[name] for name in passed if name in kwargs} | {CACHE_NAME: cache}
