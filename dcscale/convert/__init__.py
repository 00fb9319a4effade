"""Converts models between dcscale's checkpoints and other formats: see ``formats/``."""

from dcscale.convert.conversion import DTYPES, TARGETS, Conversion, convert, prepare
from dcscale.convert.errors import ConversionError
from dcscale.convert.output import check_target

__all__ = [
    "DTYPES",
    "TARGETS",
    "Conversion",
    "ConversionError",
    "check_target",
    "convert",
    "prepare",
]
