"""The error raised for unusable data and for invalid requests for data."""


class DataError(ValueError):
    """Data, or a request for it, is unusable. The message names the item, its value, the rule and how to fix it."""
