"""The error of everything that is wrong with data or with how it is asked for."""


class DataError(ValueError):
    """Data, or a request for it, is unusable. The message names the thing, its value, the rule and the way out."""
