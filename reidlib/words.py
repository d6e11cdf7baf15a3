"""Words for people: long lists cut short, and sentences shown in a notebook."""

import difflib
import re
from collections.abc import Iterable

from reidlib.progress import in_notebook


def some(items: Iterable, most: int = 5) -> str:
    """Return the first items in words, and how many more there are.

    >>> some([1, 2, 3], 2)
    '1, 2 and 1 more'
    """
    items = [str(item) for item in items]
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return how a sentence on an unknown name ends: with the nearest known ones, if any is near.

    >>> did_you_mean("marign", ["margin", "lr"]), did_you_mean("x", ["margin", "lr"])
    ("; did you mean 'margin'?", '.')
    """
    close = difflib.get_close_matches(name, dict.fromkeys(known), most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."


def span(values: Iterable[int]) -> str:
    """Return from where to where counts go; 0 without any.

    >>> span([3, 5, 4]), span([2, 2]), span([])
    ('3 to 5', '2', '0')
    """
    low, *_, high = sorted([*values] * 2) or (0, 0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def if_cameras(cameras: Iterable[int], said: str) -> str:
    """Return what is said of cameras; of one alone, or of none that is known (-1), that it cannot be said.

    >>> if_cameras([-1, -1], "They differ."), if_cameras([1, 2], "They differ.")
    ('One camera is known, or none, so cameras cannot be compared here.', 'They differ.')
    """
    several = len({camera for camera in cameras if camera >= 0}) > 1
    return said if several else "One camera is known, or none, so cameras cannot be compared here."


def typeset(text: str) -> str:
    """Return numbers as people write them: a true minus sign, a space before %; `code` stays as it is.

    >>> typeset("-0.5 of 10%, from 2-1 to `-1 %d 5%`, a-1.jpg, -1_c1.jpg")
    '−0.5 of 10\xa0%, from 2-1 to `-1 %d 5%`, a-1.jpg, -1_c1.jpg'
    """
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):  # between code
        parts[i] = re.sub(r"(?<![^\s(\[])-(?=\d[\d.,]*(?![\w.]))", "−", parts[i])
        parts[i] = re.sub(r"(?<=\d) ?%(?!\w)", "\xa0%", parts[i])
    return "".join(parts)


def say(*paragraphs: str, bullets: bool = False) -> None:
    """Show sentences as Markdown in a notebook, and print them elsewhere.

    >>> say("The mAP is **61 %**.", bullets=True)
    - The mAP is **61\xa0%**.
    """
    text = "\n".join(f"- {p}" for p in paragraphs) if bullets else "\n\n".join(paragraphs)
    text = typeset(text)
    if not in_notebook():
        print(text)
        return
    from IPython.display import Markdown, display

    display(Markdown(text))
