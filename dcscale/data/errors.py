"""The error raised for unusable data and for invalid requests for data."""


class DataError(ValueError):
    """Data, or a request for it, is unusable. The message names the item, its value, the rule and how to fix it.

    Args:
        message: the message.
        retry: whether the same request may succeed later: a storage was unreachable, or a worker was lost.
    """

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry
