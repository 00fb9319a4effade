"""Text generation: one forward pass over all prompts, then one per token, with a cache.

Axes in names: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor

from dcscale.models.dcformer import DCFormer


def generate(
    model: DCFormer,
    prompt_ids: list[list[int]],
    new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_id: int | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to ``new_tokens`` tokens.

    A continuation depends on the seed and its prompt, not on the other prompts; a prompt that is given several times
    gets different continuations. Under ZeRO-3 every rank must call this with the same ``new_tokens``: in a process
    group the model runs ``new_tokens`` times on every rank, even if all continuations have stopped.

    Args:
        prompt_ids: token ids of the prompts.
        new_tokens: maximum length of a continuation.
        temperature: 0 selects the most likely token; otherwise tokens are drawn from softmax(logits / temperature).
        top_p: draws only from the most likely tokens whose probabilities add up to this (nucleus sampling, Holtzman et
            al., arXiv 1904.09751), and at least from the first.
        seed: of the random choice.
        stop_id: a continuation ends before this token.

    Returns:
        The new tokens of each prompt, without the prompt.

    Raises:
        ValueError: an argument is out of range.
        FloatingPointError: the logits are not finite.
    """
    _check_arguments(prompt_ids, model.config.vocab_size, new_tokens, temperature, top_p)
    if not prompt_ids:
        return []
    device = next(model.parameters()).device
    in_process_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Inference mode makes small operations faster. What ZeRO-3 gathers in it could not be used for training again.
    no_gradients = torch.no_grad() if in_process_group else torch.inference_mode()
    generators = _generators(prompt_ids, seed)
    written: list[list[int]] = [[] for _ in prompt_ids]
    stopped = [False] * len(prompt_ids)
    longest = max(map(len, prompt_ids))
    padding = [longest - len(prompt) for prompt in prompt_ids]
    # Worth its memory on a CPU only: there, products with few rows read the weights twice as fast from the copy.
    cache = model.new_cache(padding if any(padding) else None, fuse=device.type == "cpu" and new_tokens > 1)
    input_ids_BT = torch.tensor([[0] * length + prompt for length, prompt in zip(padding, prompt_ids)], device=device)
    # The cache grows with every token: compiled blocks would be recompiled for each length.
    with no_gradients, torch.compiler.set_stance("force_eager"):
        for _ in range(new_tokens):
            if all(stopped) and not in_process_group:
                break
            last_B = torch.full((len(input_ids_BT),), input_ids_BT.shape[1] - 1, device=device)
            logits_BV = model(input_ids_BT, logits_at_B=last_B, cache=cache)
            uniform_B = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(device)
            next_B = sample(logits_BV, temperature, top_p, uniform_B)
            for row, token in enumerate(next_B.tolist()):
                stopped[row] = stopped[row] or token == stop_id
                if not stopped[row]:
                    written[row].append(token)
            input_ids_BT = next_B.unsqueeze(-1)
    return written


def sample(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> Tensor:
    """Draws one token id per row [B], by inverting the cumulative distribution at ``uniform_B`` in [0, 1).

    Raises:
        FloatingPointError: logits are not finite.
    """
    # NaN is also the least and the greatest of values that contain it.
    if not all(bound.isfinite() for bound in logits_BV.aminmax()):
        raise FloatingPointError("the model's logits are not finite: its weights are corrupt or training has diverged")
    if temperature == 0:
        return logits_BV.argmax(-1)
    # A tiny temperature must neither overflow the quotient nor round to 0 in the dtype of the logits.
    centred_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    probability_BV, token_BV = (centred_BV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A token is dropped if the more likely ones already reach top_p. The first has none before it and is always kept.
    before_BV = probability_BV.cumsum(-1) - probability_BV
    cumulative_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0).cumsum(-1)
    threshold_B1 = uniform_B.unsqueeze(-1) * cumulative_BV[:, -1:]
    return token_BV.gather(-1, torch.searchsorted(cumulative_BV, threshold_B1)).squeeze(-1)


def _generators(prompt_ids: list[list[int]], seed: int) -> list[torch.Generator]:
    """One generator per prompt, seeded by the seed, the prompt, and how often it has occurred before."""
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompt_ids):
        digest = hashlib.sha256(f"{seed}/{seen[prompt]}/{prompt}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))
        seen[prompt] += 1
    return generators


def _check_arguments(
    prompt_ids: list[list[int]], vocab_size: int, new_tokens: int, temperature: float, top_p: float
) -> None:
    for number, prompt in enumerate(prompt_ids):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: give it at least one token, such as the end-of-text token")
        out_of_range = [token for token in prompt if not 0 <= token < vocab_size]
        if out_of_range:
            raise ValueError(
                f"prompt {number} has the token id {out_of_range[0]}, but the model's vocabulary has {vocab_size} ids: "
                f"use the tokenizer of its training data"
            )
    if new_tokens < 1:
        raise ValueError(f"new_tokens is {new_tokens}, but must be 1 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (most likely token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")
