"""Small models for tests."""

from __future__ import annotations

import torch

from dcscale.config.schema import ModelConfig
from dcscale.models import DCFormer, initialize


def tiny_config(**changes) -> ModelConfig:
    """A model of a few thousand parameters with one local and one global layer."""
    settings = {"vocab_size": 61, "layers": 2, "dim": 32, "heads": 4, "ffn_dim": 48, "windows": [5, None], **changes}
    return ModelConfig(**settings)


def lively_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> DCFormer:
    """A model with weights as far from their beginning as training takes them.

    Fresh weights are so small that a wrong mask or a missing compose branch would change next to nothing.
    """
    model = DCFormer(config, **arguments).to(dtype)
    initialize(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif name == "embedding.weight":
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[0 if name.endswith((".dw1", ".dd")) else 1]
                parameter.copy_(noise / fan_in**0.5)
    return model


def random_ids(config: ModelConfig, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 [batch, tokens]."""
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
