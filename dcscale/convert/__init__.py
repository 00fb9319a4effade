"""Models between dcscale's folders and those of others: what they hold, what it is here, and the writing of it."""

from dcscale.convert.conversion import DTYPES, FORMATS, Conversion, convert, prepare
from dcscale.convert.detect import add_source_options, source_options
from dcscale.convert.errors import ConversionError
from dcscale.convert.output import check_target

__all__ = [
    "DTYPES",
    "FORMATS",
    "Conversion",
    "ConversionError",
    "add_source_options",
    "check_target",
    "convert",
    "prepare",
    "source_options",
]
