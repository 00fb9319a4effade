"""The error of conversions."""


class ConversionError(ValueError):
    """A source that cannot be converted as requested."""
