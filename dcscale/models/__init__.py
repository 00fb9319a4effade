"""The network: DCFormer, its initial weights, parameter and FLOP counts, the decoding cache, and text generation.

:class:`DCMHA` is its attention as a layer for other models.
"""

from dcscale.models.cache import DecodingCache
from dcscale.models.count import FlopCount, ParameterCount, count_flops, count_parameters
from dcscale.models.dcformer import DCFormer
from dcscale.models.drop_in import DCMHA
from dcscale.models.generation import generate
from dcscale.models.init import initialize

__all__ = [
    "DCMHA",
    "DCFormer",
    "DecodingCache",
    "FlopCount",
    "ParameterCount",
    "count_flops",
    "count_parameters",
    "generate",
    "initialize",
]
