"""Draws the built-in data set: pedestrians made by code, in Market-1501's layout. You need not read this.

Nobody has to sign for these pictures, and they are drawn anew in seconds, so every notebook runs
without a download. They keep what makes re-identification hard: identities share the colours of
their clothes and differ in pattern, cut, bag, hair and hat; cameras differ in light, colour cast,
height and background; views differ in direction and step; boxes are misaligned, people occluded.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFilter
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from reidlib.data.files import whole_folder
from reidlib.data.people import TOLD, Pen, look, paint_person, pick, shade
from reidlib.paths import data_dir
from reidlib.records import read_json

VERSION = 1  # of the pictures: raise it with every change that alters a drawn pixel
BAGS = TOLD["worn"]["bag_colour"]
ZOOM = 4  # drawn so many times larger, then averaged down: smooth edges without any other means
YAWS = (0.0, 90.0, 180.0, -90.0)  # towards the camera, to the right, away, to the left

# What each camera does to its pictures, and the street before it: `people.toml` says what is what.
CAMERAS = {n: SimpleNamespace(**told) for n, told in enumerate(TOLD["camera"], 1)}


def _texture(rng: Generator, h: int, w: int, cell: int, strength: float) -> np.ndarray:
    """Return smooth noise (h, w, 1) around 1: a coarse random grid, enlarged."""
    grid = rng.normal(0, 40, (h // cell + 2, w // cell + 2)) + 128
    big = Image.fromarray(grid.clip(0, 255).astype(np.uint8)).resize((w, h), Image.BICUBIC)
    return 1 + strength * (np.asarray(big, np.float32)[..., None] - 128) / 128


@lru_cache(maxsize=16)
def _scene(seed: int, camera: int, h: int, w: int) -> Image.Image:
    """Paint the street of a camera, six pictures wide: each picture shows another piece of it."""
    rng = default_rng([seed, 3, camera])
    street, w, u = CAMERAS[camera], 6 * w, h / 128
    horizon, ground = street.horizon, tuple(street.ground)
    image = Image.new("RGB", (w, h), tuple(street.wall))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon * u, w, h), ground)
    if street.tiled:  # their rows are denser towards the horizon
        seam = shade(ground, 0.8)
        for i in range(6):
            y = (horizon + (128 - horizon) * (i / 6) ** 1.7) * u
            draw.line((0, y, w, y), seam, int(u))
        for x in np.arange(0, w, 18 * u):
            draw.line((x, horizon * u, x + 12 * u, h), seam, int(u))
    for gap, parts in street.things:
        x = -gap * u * rng.random() if gap < 384 else 0
        while x < w:
            for left, top, wide, high, colour, radius in parts:
                colour = shade(colour or pick(rng, TOLD["tops"] + BAGS), rng.uniform(0.9, 1.1))
                box = (x + left * u, top * u, x + (left + wide) * u, (top + high) * u)
                draw.rounded_rectangle(box, radius * u, colour)
            x += gap * u * (1 + (rng.uniform(-0.3, 0.3) if gap > 14 else 0))
    pixels = np.asarray(image, np.float32) * _texture(rng, h, w, 60, 0.3)
    pixels = pixels * _texture(rng, h, w, 9, 0.15 if street.tiled else 0.3)
    pixels = 0.65 * pixels + 0.35 * 132  # the air between
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(2.0))  # out of focus behind the people


def _clutter(rng: Generator, image: Image.Image, stranger: Callable) -> None:
    """Put something in front of the person: a post, a bicycle, a bin, or a stranger."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    u, side, kind = h / 128, pick(rng, (-1, 1)), int(rng.integers(5))
    if kind == 0:  # a post
        x = w / 2 + side * rng.uniform(4, 24) * u
        draw.rectangle((x - 3 * u, 0, x + 3 * u, h), (96, 98, 100))
    elif kind == 1:  # a bicycle
        x, y = w / 2 + rng.uniform(-28, -6) * u, h - rng.uniform(4, 14) * u
        for wheel in (x, x + 32 * u):
            rim = (wheel - 12 * u, y - 24 * u, wheel + 12 * u, y)
            draw.ellipse(rim, None, (24, 24, 26), int(1.6 * u))
        frame = [(0, 12), (12, 28), (16, 12), (0, 12), (16, 12), (28, 28), (12, 28), (28, 28)]
        frame += [(27, 34), (32, 12), (27, 34), (33, 36)]
        draw.line([(x + p * u, y - q * u) for p, q in frame], pick(rng, BAGS), int(1.8 * u))
        draw.line((x + 8 * u, y - 30 * u, x + 16 * u, y - 30 * u), (30, 30, 30), int(2.4 * u))
    elif kind == 2:  # a bin
        x, y = w / 2 + side * rng.uniform(10, 24) * u, h * rng.uniform(0.66, 0.8)
        draw.rounded_rectangle((x - 13 * u, y, x + 13 * u, h + 9 * u), 3 * u, (66, 84, 72))
        draw.rectangle((x - 9 * u, y + 5 * u, x + 9 * u, y + 9 * u), (26, 32, 30))
    else:
        centre, crown = w * (0.5 + side * rng.uniform(0.42, 0.52)), h * rng.uniform(0.02, 0.2)
        stranger(centre, crown, 1.02 * h / 100)


def draw_person(
    pid: int, camera: int, frame: int, seed: int, size: tuple[int, int], bad: bool = False
) -> np.ndarray:
    """Draw one picture of an identity as a camera (1 to 6) sees it, (height, width, 3) uint8 RGB.

    It is the same for the same arguments; another frame is another step, box, light and piece of
    street. `bad` is a detection gone wrong: half a body, or far off the centre (Market's junk).

    >>> draw_person(2, 1, frame=0, seed=0, size=(128, 64)).shape
    (128, 64, 3)
    """
    cam, (h, w) = CAMERAS[camera], (size[0] * ZOOM, size[1] * ZOOM)
    walk = default_rng([seed, 4, pid, camera])  # within one camera a person keeps the direction
    rng = default_rng([seed, 5, pid, camera, frame])
    yaw = math.radians(pick(walk, YAWS) + walk.uniform(-35, 35) + rng.normal(0, 14))

    street = _scene(seed, camera, h, w)
    left = int(rng.integers(street.width - w))
    image = street.crop((left, 0, left + w, h))
    draw = ImageDraw.Draw(image, "RGBA")

    def stranger(centre: float, crown: float, scale: float) -> None:
        pen = Pen(draw, cam, rng.uniform(-math.pi, math.pi), centre, crown, scale)
        paint_person(pen, look(int(rng.integers(20_000, 90_000))), rng.uniform(0, 2 * math.pi))

    fill = rng.uniform(0.88, 0.96)  # the share of the picture's height that the person takes
    off_x, off_y = rng.normal(0, 0.03), rng.normal(0, 0.012)
    if bad:
        fill = rng.uniform(1.15, 1.9)
        off_x = rng.choice((-1, 1)) * rng.uniform(0.15, 0.5)
        off_y = rng.uniform(-0.75, -0.1) if rng.random() < 0.6 else rng.uniform(0.15, 0.5)
    elif rng.random() < 0.15:  # a loose or a tight box
        fill *= rng.choice((0.8, 1.14))
        off_x, off_y = rng.normal(0, 0.08), rng.normal(0, 0.05)
    scale = fill * h / 100
    centre, crown = w * (0.5 + off_x), h * (0.5 + off_y) - 50 * scale
    if rng.random() < 0.15:
        stranger(w * rng.choice((0.12, 0.88)), 0.16 * h, 0.6 * scale)
    pen = Pen(draw, cam, yaw, centre, crown, scale)
    for reach, alpha in ((1.0, 26), (0.75, 30), (0.5, 34)):  # the shadow at the feet
        pen.disc(-cam.light * 4, 98.5, 0, 14 * reach, 3.2 * reach, (0, 0, 0, alpha))
    paint_person(pen, look(pid, seed), rng.uniform(0, 2 * math.pi))
    if rng.random() < 0.2:
        _clutter(rng, image, stranger)
    return _expose(image.reduce(ZOOM), cam, rng)


def _expose(image: Image.Image, cam: SimpleNamespace, rng: Generator) -> np.ndarray:
    """Turn a clean picture into what the camera records: blur, cast, gamma, haze and noise."""
    image = image.filter(ImageFilter.GaussianBlur(cam.blur * rng.uniform(0.7, 1.4)))
    x = np.asarray(image, np.float32) / 255  # (H, W, 3)
    grey = x.mean(axis=2, keepdims=True)  # (H, W, 1)
    x = grey + cam.saturation * (x - grey)
    x = x * np.asarray(cam.gain, np.float32) * rng.uniform(0.84, 1.14)
    x = x * (1 + rng.normal(0, 0.02, 3).astype(np.float32))
    x = x.clip(0, 1) ** cam.gamma * (1 - cam.haze) + cam.haze
    x = 255 * x + rng.standard_normal(x.shape, np.float32) * cam.noise
    return x.clip(0, 255).astype(np.uint8)


Side = Annotated[int, Field(ge=32)]


class Settings(BaseModel, extra="forbid"):
    """What decides a data set; `dataset.json` in its folder holds it."""

    version: int = VERSION
    train_ids: int = Field(150, ge=1, lt=5000)
    test_ids: int = Field(50, ge=1, lt=5000)
    images_per_camera: PositiveInt = 3
    cameras: int = Field(6, ge=2, le=len(CAMERAS))  # a query needs a match in another one
    distractors: NonNegativeInt = 100
    junk: NonNegativeInt = 75
    seed: NonNegativeInt = 0
    size: tuple[Side, Side] = (128, 64)  # (height, width)


def draw_dataset(root: str | Path, **settings) -> Path:
    """Draw a whole data set in Market-1501's layout and return its folder.

    `root` gets `bounding_box_train`, `query` and `bounding_box_test`, with JPEG files named like
    `0002_c1s1_000451_03.jpg` (pid, camera, sequence, frame, box), and `dataset.json`, which names
    the settings. Even pids train, odd ones test. An identity walks past 2 to `cameras` cameras;
    each takes `images_per_camera` pictures of it, and of a test identity one query more. So every
    query has a match in another camera. Distractors have pid 0000, junk −1.

    The pictures depend on seed, pid, camera and frame alone: more identities leave the others as
    they are. A half-drawn data set never stands at `root`. If something is there already, that is a
    FileExistsError; `Settings` that make no data set are a ValueError.
    """
    root, wanted = Path(root), Settings(**settings)
    if root.exists():
        raise FileExistsError(f"{root} is there: remove it, or name another folder.")
    with whole_folder(root) as part:
        for picture in _pictures(wanted):
            _save(part, wanted, *picture)
        (part / "dataset.json").write_text(json.dumps(wanted.model_dump(), indent=1) + "\n")
    return root


def draw_folder(root: str | Path, people: int, seed: int = 1) -> Path:
    """Draw a folder as somebody's own pictures may lie, if nothing is there, and return it.

    `root/person_001/camera3_0.jpg`: a folder for each person, who was seen by three cameras, three times
    by each. By another seed than that of the built-in data these are other people, in other streets.
    """
    root = Path(root)
    if not root.exists():
        with whole_folder(root) as part:
            for pid in range(1, people + 1):
                home = part / f"person_{pid:03d}"
                home.mkdir()
                for camera in 1 + default_rng([seed, 6, pid]).permutation(len(CAMERAS))[:3]:
                    for frame in range(3):
                        pixels = draw_person(pid, int(camera), frame, seed, (128, 64))
                        place = home / f"camera{camera}_{frame}.jpg"
                        Image.fromarray(pixels).save(place, quality=90)
    return root


def built_in_data() -> Path:
    """Return the folder of the built-in data, of any size, drawn when it is not there.

    If another version of the library drew it, that is a ValueError.
    """
    root, version = data_dir() / "synthetic", None
    if not root.exists():
        with suppress(FileExistsError):  # another process was first
            draw_dataset(root)
    with suppress(OSError, ValueError, TypeError, LookupError):  # of another shape, too
        version = read_json(root / "dataset.json")["version"]
    if version != VERSION:
        raise ValueError(f"{root} is not of this version of reidlib: remove it, to draw it again.")
    return root


def _pictures(s: Settings) -> Iterator[tuple[str, int, int, int, int]]:
    """Name every picture: its split's folder, pid, camera, number, and who is on it."""

    def seen_by(pid: int) -> list[int]:
        """Return the sorted cameras that an identity walks past."""
        rng = default_rng([s.seed, 6, pid])
        count = min(s.cameras, int(pick(rng, (2, 3, 3, 4, 4, 5))))
        return sorted(int(c) + 1 for c in rng.permutation(s.cameras)[:count])

    for pid in [*range(2, 2 * s.train_ids + 1, 2), *range(1, 2 * s.test_ids, 2)]:
        tested = pid % 2  # of whom there is one picture more, the query
        for camera in seen_by(pid):
            for i in range(s.images_per_camera + tested):
                side = "bounding_box_test" if i else "query"
                yield side if tested else "bounding_box_train", pid, camera, i, pid
    for i in range(s.distractors):  # pids that no one else has, each seen once
        yield "bounding_box_test", 0, 1 + i % s.cameras, i, 10_000 + i
    for i in range(s.junk):
        pid = 1 + 2 * (i % s.test_ids)
        yield "bounding_box_test", -1, seen_by(pid)[0], i, pid


def _save(root: Path, s: Settings, split: str, pid: int, camera: int, i: int, who: int) -> None:
    """Draw picture i of `who` in a camera and save it under the name of `pid`."""
    # Distractors and junk share one pid each, so there the frame has to count the files.
    start = int(default_rng([s.seed, 7, who, camera]).integers(1, 4000)) if pid > 0 else 0
    frame, box = 25 * (start + i) + 1, 0 if split == "query" else 1 + i % 9
    pixels = draw_person(who, camera, frame, s.seed, s.size, bad=pid < 0)
    name = f"{pid:04d}" if pid >= 0 else "-1"
    path = root / split / f"{name}_c{camera}s{1 + who % 3}_{frame:06d}_{box:02d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)
