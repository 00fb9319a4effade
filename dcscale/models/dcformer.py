"""The language model: DCFormer, DCPythia, or the plain Transformer with the same settings, depending on the config.

Axes in names: B batch, T tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcscale.config.reference import FIELDS
from dcscale.config.schema import ModelConfig, RopeScalingConfig
from dcscale.models.blocks import Block, make_norm
from dcscale.models.cache import MIN_SPARE, DecodingCache
from dcscale.models.dcmha import rotary_dim
from dcscale.ops import cross_entropy_sum, identity_distance, llama3_frequencies, rope_table

COMPILATIONS = 8
"""Of a block, that torch allows: its own default for a function."""


class OutputHead(nn.Module):
    """Computes logits from hidden states, or directly the loss, so that not all logits exist at once.

    The loss is part of this module because ZeRO-3 gathers ``weight`` [V, E] only while the module that owns it runs.

    Args:
        loss_chunk: number of tokens whose logits exist at once in the loss; 0 for all.
        tied: the embedding's parameter, used as the weight; None creates a separate one.
    """

    def __init__(self, vocab_size: int, dim: int, loss_chunk: int, tied: nn.Parameter | None = None):
        super().__init__()
        self.loss_chunk = loss_chunk
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if tied is None else tied

    def forward(self, hidden_BTE: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        if targets_BT is not None:
            return cross_entropy_sum(hidden_BTE, self.weight, targets_BT, self.loss_chunk)
        logits_BTV = F.linear(hidden_BTE, self.weight)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))


class DCFormer(nn.Module):
    """A decoder-only language model whose attention heads are dynamically composed.

    With ``model.attention`` = ``mha`` it is the plain Transformer: the same parameters without ``*.compose.*``.
    Parameters have no meaningful values until :func:`~dcscale.models.initialize` or a checkpoint sets them. There is no
    dropout, and nothing depends on train/eval mode. No buffer is registered, so casting the module keeps the rotary
    tables in float32.

    Args:
        recompute: ``none``, or ``block`` to keep only each block's input for backward and recompute the rest.
        loss_chunk: number of tokens whose logits exist at once in the loss; 0 for all.

    Raises:
        ValueError: the settings do not describe a valid model.
    """

    def __init__(self, config: ModelConfig, recompute: str = "none", loss_chunk: int = 4096):
        super().__init__()
        _check_settings(config, recompute, loss_chunk)
        self.config = config
        self.recompute = recompute
        # The constructor would draw normal values, which are overwritten; on the meta device that imports _dynamo.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        windows = (config.windows[layer % len(config.windows)] for layer in range(config.layers))
        self.blocks = nn.ModuleList(Block(config, window) for window in windows)
        self.norm = make_norm(config)
        tied = self.embedding.weight if config.tied_embeddings else None
        self.output = OutputHead(config.vocab_size, config.dim, loss_chunk, tied)

    def implementations(self, device: torch.device) -> list[tuple[str, str]]:
        """The attention implementations that are used on ``device``, as (name, reason): see :func:`choose_backend`."""
        dtype = next(self.parameters()).dtype
        return list(dict.fromkeys(block.attention.implementation(device, dtype) for block in self.blocks))

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block on its own, with options of torch.compile: blocks with the same window share the code."""
        # torch counts the compilations of a function, here for the windows of all blocks, and beyond a limit compiles
        # no more. A window takes some: for training and validation, with and without documents, and for any sizes.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS * len(set(self.config.windows)))
        for block in self.blocks:
            block.compile(**options)

    def new_cache(
        self, padding: Sequence[int] | None = None, *, min_spare: int = MIN_SPARE, fuse: bool = False
    ) -> DecodingCache:
        """An empty cache for a batch of texts. Pass it to every call, each with the new tokens only. It is of no use
        after the weights have changed.

        Args:
            padding: number of padding tokens on the left of each row, for texts of different lengths.
            min_spare: minimum number of spare positions of a new buffer.
            fuse: make calls with few tokens faster by a copy of some of the weights; see :class:`DecodingCache`.
        """
        windows = [block.attention.window for block in self.blocks]
        return DecodingCache(windows, padding, next(self.parameters()).device, min_spare=min_spare, fuse=fuse)

    def forward(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        *,
        logits_at_B: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """Computes logits, or the loss if there are targets.

        Args:
            input_ids_BT: int32 or int64 token ids below vocab_size (not checked: that would wait for the device).
            targets_BT: int64 ids to predict at each position, -100 for none.
            document_ids_BT: integers; a token sees only tokens of its own document. None: each row is one document.
                Positions continue across documents, because RoPE depends on differences of positions only.
            logits_at_B: int64, one position per row, or [B, N] for N positions; only their logits are computed.
            cache: from :meth:`new_cache`; the tokens continue those of earlier calls, and are added to it. For
                decoding only: gradients do not flow through it.

        Returns:
            With targets, the float32 SUM of the losses of targets that are not -100. Otherwise the logits [B, T, V],
            or [B, V] or [B, N, V] with ``logits_at_B``, in float32 (float64 for a float64 model).

        Raises:
            ValueError: an input has the wrong shape or type, or inputs exclude one another.
        """
        _check_inputs(input_ids_BT, targets_BT, document_ids_BT, logits_at_B)
        # The rotary table is computed once for all layers.
        rotary = (input_ids_BT.shape[1], rotary_dim(self.config), self.config.rope_base, input_ids_BT.device)
        scale = partial(_scaled_frequencies, self.config.rope_scaling)
        if cache is None:
            rope, layers = rope_table(*rotary, scale=scale), [None] * len(self.blocks)
        else:
            _check_cache(cache, len(self.blocks), len(input_ids_BT), document_ids_BT)
            rope, layers = cache.rope(*rotary, scale), cache.layers
            document_ids_BT = cache.document_ids(input_ids_BT.shape[1], input_ids_BT.device)
        x_BTE = self.embedding(input_ids_BT)
        for block, layer in zip(self.blocks, layers):
            if self.recompute == "block" and torch.is_grad_enabled():
                # Nothing in a block draws random numbers, so the generators' states need not be saved.
                x_BTE = checkpoint(block, x_BTE, rope, document_ids_BT, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTE = block(x_BTE, rope, document_ids_BT, cache=layer)
        if logits_at_B is not None:
            # Select positions before the output matrix: logits of all others are never computed.
            rows_B = torch.arange(len(x_BTE), device=x_BTE.device)
            x_BTE = x_BTE[rows_B if logits_at_B.dim() == 1 else rows_B[:, None], logits_at_B]
        return self.output(self.norm(x_BTE), targets_BT)

    @torch.no_grad()
    def compose_distances(self, input_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> dict[str, Tensor]:
        """Distance of each layer's compose from the identity on these tokens; see
        :func:`dcscale.ops.identity_distance`.

        Returns:
            float32 scalars under ``pre/layer_00``, ``post/layer_00``, ...; empty for a model without compose.
        """
        distances: dict[str, Tensor] = {}

        def record(layer: int, _module: nn.Module, _inputs: tuple, weights: tuple) -> None:
            for stage, weight in zip(("pre", "post"), weights):
                if weight is not None:
                    distances[f"{stage}/layer_{layer:02d}"] = identity_distance(weight)

        with ExitStack() as stack:
            # Compiled blocks ignore hooks that were added after their compilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for layer, block in enumerate(self.blocks):
                if block.attention.compose is not None:
                    stack.enter_context(block.attention.compose.register_forward_hook(partial(record, layer)))
            # With targets, as in training, the logits [B, T, V] never exist at once.
            self(input_ids_BT, input_ids_BT.long(), document_ids_BT)
        return distances


def _scaled_frequencies(scaling: RopeScalingConfig, inverse_F: Tensor) -> Tensor:
    if scaling.kind == "llama3":
        return llama3_frequencies(
            inverse_F, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
        )
    return inverse_F / scaling.factor if scaling.kind == "linear" else inverse_F


def _check_settings(config: ModelConfig, recompute: str, loss_chunk: int) -> None:
    values = {
        "model.attention": config.attention,
        "model.backend": config.backend,
        "model.compose.gelu": config.compose.gelu,
        "model.ffn": config.ffn,
        "model.norm": config.norm,
        "model.rope_scaling.kind": config.rope_scaling.kind,
        "train.recompute": recompute,
    }
    for name, value in values.items():
        choices = FIELDS[name].choices
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")
    if not config.windows or any(window is not None and window < 1 for window in config.windows):
        raise ValueError(f"model.windows is {config.windows}, but must list integers of at least 1, or null")
    if loss_chunk < 0:
        raise ValueError(f"train.loss_chunk is {loss_chunk}, but must be 0 (all tokens at once) or more")


def _check_inputs(
    input_ids_BT: Tensor, targets_BT: Tensor | None, document_ids_BT: Tensor | None, logits_at_B: Tensor | None
) -> None:
    integers = (torch.int32, torch.int64)
    if input_ids_BT.dim() != 2 or 0 in input_ids_BT.shape or input_ids_BT.dtype not in integers:
        raise ValueError(
            f"input_ids must be int32 or int64 of shape [batch, tokens], both 1 or more, "
            f"but is {input_ids_BT.dtype} {list(input_ids_BT.shape)}"
        )
    for name, value, types in (
        ("targets", targets_BT, (torch.int64,)),
        ("document_ids", document_ids_BT, integers),
    ):
        if value is not None and (value.shape != input_ids_BT.shape or value.dtype not in types):
            raise ValueError(
                f"{name} must be {' or '.join(map(str, types))} of input_ids' shape {list(input_ids_BT.shape)}, "
                f"but is {value.dtype} {list(value.shape)}"
            )
    if logits_at_B is not None:
        if targets_BT is not None:
            raise ValueError("logits_at and targets were both given: the loss needs every position; leave one out")
        fits = logits_at_B.dim() in (1, 2) and logits_at_B.shape[:1] == input_ids_BT.shape[:1]
        if not fits or logits_at_B.dtype != torch.int64:
            raise ValueError(
                f"logits_at must be torch.int64 with one or N positions for each of the {len(input_ids_BT)} rows, "
                f"but is {logits_at_B.dtype} {list(logits_at_B.shape)}"
            )


def _check_cache(cache: DecodingCache, layers: int, batch: int, document_ids_BT: Tensor | None) -> None:
    if torch.is_grad_enabled():
        raise ValueError("cache was given while gradients are recorded, but it has no gradients: use torch.no_grad()")
    if document_ids_BT is not None:
        raise ValueError("cache and document_ids were both given, but a cached row is one document: leave one out")
    if len(cache.layers) != layers:
        raise ValueError(
            f"cache has {len(cache.layers)} layers, but the model has {layers}: use the model's new_cache()"
        )
    if cache.padding_B is not None and len(cache.padding_B) != batch:
        raise ValueError(f"cache has padding for {len(cache.padding_B)} rows, but input_ids has {batch} rows")
