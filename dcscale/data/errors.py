"""The error raised for unusable data and for invalid requests for data."""


class DataError(ValueError):
    """Data, or a request for it, is unusable. The message names the item, its value, the rule and how to fix it.

    Args:
        message: the message.
        retry: whether the same request may succeed later: a storage was unreachable, or a worker was lost.
        rank: the rank that it happened on, if all ranks raise it together; None: the one that raises it.
    """

    def __init__(self, message: str, *, retry: bool = False, rank: int | None = None) -> None:
        super().__init__(message)
        self.retry, self.rank = retry, rank
