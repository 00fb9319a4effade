"""The network: DCFormer with its initial weights, its size and cost, and text from it."""

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
