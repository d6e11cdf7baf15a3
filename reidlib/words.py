"""Words that several rooms say alike."""

from collections.abc import Iterable


def some(items: Iterable, most: int = 5) -> str:
    """Return the first items in words, and how many more there are.

    >>> some([1, 2, 3], 2)
    '1, 2 and 1 more'
    """
    items = [str(item) for item in items]
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
