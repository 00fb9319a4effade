"""What a model loses over tokens, and the ways to say it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcscale.ops import bits_per_byte


@dataclass(frozen=True)
class Losses:
    """Figures of one text or one folder of shards."""

    name: str
    tokens: int
    """Tokens that were predicted."""
    loss: float
    """Nats a token, mean."""
    perplexity: float
    """exp(loss), a token."""
    bits_per_byte: float | None
    """Bits a byte of the text, whatever the tokenizer; None where the text's bytes are not known."""


def losses(name: str, total: float, tokens: int, text_bytes_per_token: float | None) -> Losses:
    """Figures from a sum of ``total`` nats over ``tokens``.

    Raises:
        FloatingPointError: the loss is not finite, or so large that exp(loss) is no number any more.
    """
    loss = total / tokens
    if not loss < 700:
        raise FloatingPointError(
            f"{name}: the loss is {loss:.6g} nats/token: the model's weights are damaged or training has diverged"
        )
    bits = None if text_bytes_per_token is None else bits_per_byte(loss, text_bytes_per_token)
    return Losses(name, tokens, loss, math.exp(loss), bits)
