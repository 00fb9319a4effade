"""What a conversion refuses with."""


class ConversionError(ValueError):
    """A source that cannot be converted as asked."""
