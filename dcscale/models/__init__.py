"""The network: DCFormer, its initial weights, parameter and FLOP counts, the decoding cache, and text generation."""

from dcscale.models.cache import DecodingCache
from dcscale.models.count import FlopCount, ParameterCount, count_flops, count_parameters
from dcscale.models.dcformer import DCFormer
from dcscale.models.generation import generate
from dcscale.models.init import initialize

__all__ = [
    "DCFormer",
    "DecodingCache",
    "FlopCount",
    "ParameterCount",
    "count_flops",
    "count_parameters",
    "generate",
    "initialize",
]
