"""What the HTML pages are filled with: data that cannot become markup, and small photographs."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

HELPERS = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")  # of the pages' scripts


def fill(template: str, **parts: str) -> str:
    """Return a page with its `[[name]]` filled in, in one pass: what is filled in is not looked at.

    >>> fill("<p>[[a]] and [[b]]", a="[[b]]", b="2")
    '<p>[[b]] and 2'
    """
    return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], template)


def script_json(data: Any) -> str:
    """Return JSON that may stand inside `<script>`: nothing in it can end the element or open another.

    >>> script_json(["</script>", 1])
    '["\\\\u003c/script\\\\u003e",1]'
    """
    # ASCII: line separators are escaped already
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def encodable(text: str) -> str:
    """Return text that can be encoded: file names may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def short_names(table: pd.DataFrame) -> list[str]:
    """Return file names, without the folders that all of a table share; "" where they are unknown."""
    if not table["path"].astype(bool).all():
        return [""] * len(table)
    paths = [str(path).replace(os.sep, "/") for path in table["path"]]
    shared = os.path.commonprefix([path[: path.rfind("/") + 1] for path in paths])
    start = shared.rfind("/") + 1  # at the end of a whole folder's name
    return [encodable(path[start:]) for path in paths]


def thumbnail(image: np.ndarray, height: int, quality: int) -> str:
    """Return a photograph, (H, W, 3) uint8, as WebP in base64, up to so high and twice as wide.

    WebP has no tables in its header: a small picture is some 600 bytes, a JPEG's header as many again.
    """
    photo, file = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    photo.thumbnail((2 * height, height), Image.Resampling.BILINEAR, reducing_gap=None)
    photo.save(file, "webp", quality=quality, method=4)
    return base64.b64encode(file.getvalue()).decode()
