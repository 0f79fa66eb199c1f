"""What is said of data that cannot be used."""

from collections.abc import Sequence


class DataError(ValueError):
    """Files of a data set are missing or do not fit; the message says which and what to do."""


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, for a message."""
    return ', '.join(map(str, names[:limit])) + (', ...' if len(names) > limit else '')
