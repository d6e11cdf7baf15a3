"""Crops of a tracker: a sequence in MOTChallenge's form becomes a table, and is cut as it is read.

A sequence is a folder with the frames in `img1/` and boxes in `gt/gt.txt` or `det/det.txt`, a line a
box: frame, identity (-1: unknown), left, top, width, height, and up to four numbers more, the first of
which is 0 in gt.txt for what is not to be looked at. Format: motchallenge.net/instructions.
"""

import math
from pathlib import Path

import pandas as pd

from reidlib.data.files import IMAGE_SUFFIXES, cut, open_image
from reidlib.words import some

FRAMES, BOXES = "img1", ("gt/gt.txt", "det/det.txt")


def boxes_of(place: Path) -> Path | None:
    """Return the boxes of a sequence: of its folder, where gt.txt goes before det.txt, or a file of them.

    None: it is no sequence. Raises ValueError: there are several, or there are frames without boxes.
    """
    if place.is_file():
        return place if place.suffix.lower() == ".txt" else None
    for name in (name for name in BOXES if (place / name).is_file()):
        return place / name
    if (place / FRAMES).is_dir():
        raise ValueError(
            f"{place} has frames in {FRAMES}, and no {' or '.join(BOXES)} of people in them."
        )
    inner = [p for p in sorted(place.iterdir()) if any((p / name).is_file() for name in BOXES)]
    if len(inner) > 1:
        raise ValueError(f"{place} holds several sequences, give one: {some(inner)}.")
    return boxes_of(inner[0]) if inner else None


def read_tracks(boxes: Path, notes: list[str]) -> pd.DataFrame:
    """Return a row a box, frame by frame: path, pid and camid, all text; `notes` say what is left out.

    The path names the frame and what is cut out of it, see `files.cut_of`. Cameras are unknown, for a
    person is to be found again within the sequence. Raises OSError: frames are missing or unreadable;
    ValueError: a line that is no box, or none that can be used.
    """
    folder = boxes.parent.parent / FRAMES
    if not folder.is_dir():
        raise FileNotFoundError(f"{boxes} goes with frames in {folder}, which is not there.")
    pictures = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    frames = {int(p.stem): str(p) for p in pictures if p.stem.isdecimal()}
    lines = boxes.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    found = [_box(boxes, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    used = [box for box in found if not (boxes.name == "gt.txt" and 0 in box[7:8])]
    if lost := sorted({box[1] for box in used} - {*frames}):
        raise FileNotFoundError(
            f"{folder} lacks {len(lost)} frames that {boxes} is of: {some(lost)}."
        )
    sizes, rows, clipped, out = {}, [], 0, []
    for number, frame, who, left, top, width, height, *_ in sorted(used, key=lambda box: box[1]):
        if frame not in sizes:
            with open_image(frames[frame]) as image:
                sizes[frame] = image.size
        x, y = max(0, left), max(0, top)
        right, bottom = min(sizes[frame][0], left + width), min(sizes[frame][1], top + height)
        if min(width, height, right - x, bottom - y) <= 0:
            out.append(number)
            continue
        clipped += (x, y, right, bottom) != (left, top, left + width, top + height)
        rows.append([cut(frames[frame], x, y, right - x, bottom - y), who])
    said = [(clipped, "boxes reach over the edge of their frame and are clipped")]
    lost = f"boxes have no size or lie outside of it and are left out, lines {some(out)}"
    said += [
        (len(out), lost),
        (len(found) - len(used), "are not to be looked at, as the file says"),
    ]
    notes += [f"{boxes}: {n:,} {text}." for n, text in said if n]
    if not rows:
        raise ValueError(f"{boxes} has no box that can be cut out. {' '.join(notes)}".rstrip())
    table = pd.DataFrame(rows, columns=["path", "pid"])
    if (table["pid"] == 0).any():  # else it would be a distractor
        notes.append(f"{boxes}: identities begin at 0, and all are numbered one higher.")
        table["pid"] += table["pid"] >= 0
    return table.assign(pid=table["pid"].astype(str), camid="-1")


def _box(boxes: Path, number: int, line: str) -> list[float]:
    """Return the number of a line, and its numbers."""
    try:
        values = [float(cell) for cell in line.split(",")]
        whole = all(v.is_integer() for v in values[:2]) and values[1] >= -1
    except (ValueError, IndexError):
        values, whole = [], False
    if not (6 <= len(values) <= 10 and whole and all(map(math.isfinite, values))):
        raise ValueError(
            f"{boxes}, line {number}: expected frame,identity,left,top,width,height and up to four numbers "
            f"more, with commas between them, got {line[:80]!r}."
        )
    return [number, int(values[0]), int(values[1]), *values[2:]]
