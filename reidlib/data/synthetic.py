"""Draws the embedded data set: pedestrians made by code, in Market-1501's layout and file names.

Nobody has to sign for these pictures, and they are drawn anew in seconds, so every notebook runs
without a download. They keep what makes re-identification hard: identities share the colours of
their clothes and differ in pattern, cut, bag, hair and hat; cameras differ in light, colour cast,
height and background; views differ in direction and step; boxes are misaligned, people occluded.

A body is a stick figure in three dimensions (x to its left, y down from the crown at 0 to the
soles at 100, z forward), turned by a yaw, clothed with capsules (limbs) and elliptic cylinders
(torso, skirt), and painted from far to near at four times the size of the picture.
"""

import json
import math
import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # of the pictures: raise it with every change that alters a drawn pixel
ZOOM = 4  # drawn so many times larger, then averaged down: smooth edges without any other means
FAMILY = 8  # so many neighbouring pids wear the same colours

# Few colours on purpose: many people must share them.
TOPS = ((40, 44, 52), (225, 222, 214), (178, 42, 44), (45, 72, 140), (58, 112, 72),
        (214, 168, 52), (128, 128, 132), (150, 92, 128))  # fmt: skip
BOTTOMS = ((34, 36, 44), (52, 68, 108), (110, 108, 104), (176, 152, 112), (84, 60, 46))
ACCENTS = ((238, 236, 228), (28, 28, 34), (226, 186, 60), (60, 104, 176), (190, 54, 50))
SKINS = ((244, 208, 180), (228, 182, 148), (196, 144, 108), (146, 98, 70), (96, 64, 48))
HAIRS = ((28, 24, 24), (62, 42, 30), (112, 74, 44), (192, 152, 88), (150, 148, 146), (140, 62, 34))
SHOES = ((32, 30, 32), (232, 230, 226), (110, 74, 48), (176, 48, 46))
BAGS = ((34, 34, 38), (150, 40, 44), (60, 84, 60), (130, 92, 56), (58, 82, 136), (222, 196, 84))

PATTERNS = ("plain", "stripes", "pinstripes", "checks", "print", "yoke", "band", "dots")
VIEWS = {"front": 0.0, "right": 90.0, "back": 180.0, "left": -90.0}  # degrees of yaw


class Look(NamedTuple):
    """What makes an identity: the same in each of its pictures."""

    top: tuple
    bottom: tuple
    accent: tuple
    pattern: str  # one of PATTERNS
    cut: str  # tank, tshirt, long, jacket, hoodie, coat, dress
    legs: str  # slim, trousers, wide, shorts, skirt
    skin: tuple
    hair: tuple
    hair_style: str  # short, bald, bob, long, ponytail, bun
    hat: str  # "", cap, beanie
    hat_colour: tuple
    bag: str  # "", backpack, shoulder, handbag
    bag_colour: tuple
    bag_side: int
    shoes: tuple
    boots: bool
    side_stripe: bool  # down the trousers
    build: float  # width of the torso, 1 = mean
    female: bool


class Camera(NamedTuple):
    """What a camera does to every picture it takes."""

    scene: str
    gain: tuple  # of red, green, blue
    gamma: float  # above 1 darkens
    saturation: float
    haze: float  # share of the range lifted from black
    blur: float  # pixels
    noise: float  # standard deviation, in grey levels of 255
    tilt: float  # sine of the angle at which it looks down
    foreshorten: float  # how much the height of the camera shortens the legs
    light: int  # the side that light comes from: -1 left, 1 right


CAMERAS = {
    1: Camera("pavement", (1.07, 1.01, 0.91), 0.95, 1.05, 0.00, 0.3, 3, 0.10, 0.05, -1),
    2: Camera("park", (0.95, 1.03, 0.92), 1.04, 1.00, 0.02, 0.4, 4, 0.18, 0.14, 1),
    3: Camera("shop", (1.09, 0.97, 0.84), 1.08, 0.96, 0.02, 0.4, 5, 0.06, 0.00, -1),
    4: Camera("road", (0.92, 0.99, 1.09), 1.00, 0.90, 0.06, 0.6, 3, 0.14, 0.08, 1),
    5: Camera("brick", (1.01, 0.91, 1.03), 1.14, 0.94, 0.02, 0.4, 6, 0.16, 0.12, -1),
    6: Camera("hall", (1.06, 1.07, 1.07), 0.90, 0.86, 0.03, 0.4, 4, 0.22, 0.18, 1),
}


class Street(NamedTuple):
    """What stands behind the people; lengths in rows of a picture of 128."""

    horizon: int
    ground: tuple
    wall: tuple  # what is above the horizon
    tiles: bool
    things: tuple  # (gap, parts): parts painted again at about every gap, far to near
    # A part is (x, y, width, height, colour or None for any, radius of its corners).


# fmt: off
_MORTAR = (104, 66, 56)
STREETS = {
    "pavement": Street(54, (172, 166, 156), (196, 188, 172), True, (
        (46, ((0, 0, 40, 54, (186, 176, 158), 0),  # a house with three windows
              *((4 + 12 * i, 8, 8, 22, (88, 104, 122), 0) for i in range(3)))),
        (384, ((0, 44, 400, 10, (86, 106, 70), 0),)))),  # a hedge
    "park": Street(40, (104, 128, 74), (70, 96, 62), False, (
        (27, ((14, 0, 4, 44, (84, 66, 50), 0), (0, -12, 32, 46, (76, 106, 60), 16))),
        (43, ((9, 0, 3, 42, (84, 66, 50), 0), (0, 0, 22, 36, (60, 88, 48), 11))),
        (384, ((0, 86, 400, 20, (176, 160, 130), 0),)))),  # a path
    "shop": Street(80, (112, 104, 98), (92, 84, 84), True, (
        (58, ((0, 6, 52, 12, None, 0), (0, 21, 40, 53, (206, 190, 150), 0),  # a sign, a window,
              *((3 + 8 * i, 32 + 17 * (i % 3), 6, 10, None, 0) for i in range(5)),  # goods,
              (42, 21, 10, 59, (58, 50, 48), 0))),)),  # a door
    "road": Street(46, (104, 106, 110), (142, 148, 152), False, (
        (384, ((0, 46, 400, 6, (166, 164, 158), 0),)),  # the kerb
        (70, ((10, 18, 36, 18, (62, 74, 86), 6), (0, 30, 56, 20, None, 5),  # a parked car
              (6, 42, 12, 12, (30, 30, 32), 6), (38, 42, 12, 12, (30, 30, 32), 6))),
        (40, ((0, 96, 22, 6, (214, 214, 208), 0),)))),
    "brick": Street(66, (134, 128, 126), (140, 84, 66), True, (
        (384, tuple((0, 6 * i, 400, 1, _MORTAR, 0) for i in range(11))),
        (14, tuple((7 * (i % 2), 6 * i, 1, 6, _MORTAR, 0) for i in range(11))),
        (80, ((0, 14, 24, 32, (210, 204, 190), 0), (3, 18, 18, 14, None, 0))))),  # a poster
    "hall": Street(32, (190, 190, 186), (150, 158, 166), True, (
        (34, ((0, 0, 26, 32, (120, 146, 164), 0), (27, 0, 6, 38, (212, 208, 200), 0))),
        (384, ((0, 102, 400, 6, (206, 176, 70), 0),)),  # a guiding line
        (60, ((0, 32, 14, 96, (206, 206, 202), 0),)))),  # mirrored light
}
# fmt: on


def _rng(*key):
    return np.random.default_rng([int(k) for k in key])


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _shade(colour, factor):
    return tuple(max(0, min(255, int(c * factor))) for c in colour)


def look(pid, seed=0):
    """Return the `Look` of an identity.

    Pids of one block of `FAMILY` (0 to 7, 8 to 15, …) wear the same two colours in eight
    different patterns, so colour alone cannot tell them apart.

    >>> a, b = look(9), look(10)
    >>> (a.top, a.bottom) == (b.top, b.bottom), a.pattern == b.pattern
    (True, False)
    """
    family = _rng(seed, 1, pid // FAMILY)
    top, bottom = _pick(family, TOPS), _pick(family, BOTTOMS)
    pattern = PATTERNS[family.permutation(len(PATTERNS))[pid % FAMILY]]
    rng = _rng(seed, 2, pid)
    female = bool(rng.random() < 0.5)
    # An accent too close to the garment would hide its pattern.
    accents = [c for c in ACCENTS if sum(abs(a - b) for a, b in zip(c, top, strict=True)) > 180]
    cuts = ("tank", "tshirt", "tshirt", "long", "jacket", "hoodie", "coat")
    styles = ("short", "short", "short", "bald", "bob")
    if female:
        styles = ("bob", "long", "ponytail", "bun", "short")
    # fmt: off
    return Look(
        top=top, bottom=bottom, accent=_pick(rng, accents), pattern=pattern,
        cut=_pick(rng, (*cuts, "dress", "dress") if female else cuts),
        legs=_pick(rng, ("slim", "trousers", "wide", "shorts", *(("skirt",) * 2 * female))),
        skin=_pick(rng, SKINS), hair=_pick(rng, HAIRS), hair_style=_pick(rng, styles),
        hat=_pick(rng, ("", "", "", "cap", "beanie")), hat_colour=_pick(rng, BAGS),
        bag=_pick(rng, ("", "", "backpack", "backpack", "shoulder", "handbag")),
        bag_colour=_pick(rng, BAGS), bag_side=_pick(rng, (-1, 1)),
        shoes=_pick(rng, SHOES), boots=bool(rng.random() < 0.25),
        side_stripe=bool(rng.random() < 0.2),
        build=float(rng.uniform(0.90, 1.14) * (0.93 if female else 1.0)), female=female,
    )
    # fmt: on


# ---------------------------------------------------------------- the pen: body space to pixels


class _Pen:
    """Paints parts of one body on a canvas: it knows yaw, place, size and the camera's height."""

    def __init__(self, draw, camera, yaw, centre, crown, scale, stretch=1.38):
        self.draw, self.camera, self.light = draw, camera, camera.light
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.centre, self.crown, self.scale, self.stretch = centre, crown, scale, stretch

    def screen(self, across, y, depth):
        """Place a point `across` the view, `depth` towards the camera, at height y."""
        f = self.camera.foreshorten
        x = self.stretch * across * (1 + f * (0.5 - y / 100))  # the nearer end, the head, is wider
        y = y + f * y * (100 - y) / 100 + self.camera.tilt * depth
        return self.centre + self.scale * x, self.crown + self.scale * y

    def at(self, x, y, z):
        """Turn a point of the body by the yaw and place it."""
        return self.screen(self.across(x, z), y, self.depth(x, z))

    def across(self, x, z):
        return x * self.cos + z * self.sin

    def depth(self, x, z):
        return z * self.cos - x * self.sin

    def capsule(self, p, q, rp, rq, fill):
        """Fill the hull of two circles around the pixels p and q (radii in body units)."""
        rp, rq = rp * self.scale, rq * self.scale
        a = math.atan2(q[1] - p[1], q[0] - p[0])
        hull = [(q[0] + rq * math.cos(a + t), q[1] + rq * math.sin(a + t)) for t in _HALF]
        hull += [(p[0] - rp * math.cos(a + t), p[1] - rp * math.sin(a + t)) for t in _HALF]
        self.draw.polygon(hull, fill)

    def limb(self, a, b, ra, rb, colour):
        """Draw a round limb between two points of the body: rim, flesh, and a dark side."""
        p, q = self.at(*a), self.at(*b)
        self.capsule(p, q, ra + 0.3, rb + 0.3, _shade(colour, 0.68))
        self.capsule(p, q, ra, rb, colour)
        away = -self.light * 0.5 * self.scale
        self.capsule(
            (p[0] + away * ra, p[1]), (q[0] + away * rb, q[1]), ra * 0.5, rb * 0.5, (0, 0, 0, 44)
        )

    def disc(self, across, y, depth, rx, ry, fill):
        x, y = self.screen(across, y, depth)
        rx, ry = rx * self.scale * self.stretch, ry * self.scale
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)

    def patch(self, widths, phi, half, y0, y1, colour, slant=0.0):
        """Paint a patch of an elliptic cylinder around the body, as far as it faces the camera.

        `widths` are (y, half width) pairs; the patch spans the angles phi ± half (0 = chest,
        π/2 = left side) and the heights y0 to y1; `slant` turns it on the way down.
        """
        # A cylinder of depth 0.62 of its width, turned by the yaw, is seen under the parameter u:
        # across = width · k · sin u, and it faces us where |u| < π/2.
        k = math.hypot(self.cos, 0.62 * self.sin)
        mid = (phi - self.front() + math.pi) % (2 * math.pi) - math.pi if half < math.pi else 0.0
        ys = [y0 + (y1 - y0) * i / 4 for i in range(5)]
        rs = np.interp(ys, *zip(*widths, strict=True))

        def point(i, u):
            across, depth = rs[i] * k * math.sin(u), rs[i] * 0.62 / k * math.cos(u)
            return self.screen(across, ys[i], depth)

        for turn in (-2 * math.pi, 0.0, 2 * math.pi):
            ends = [
                [
                    min(_RIGHT, max(-_RIGHT, mid + turn + slant * i / 4 + sign * half))
                    for sign in (-1, 1)
                ]
                for i in range(5)
            ]
            if any(lo < hi for lo, hi in ends):
                (a, b), (c, d) = ends[0], ends[4]
                outline = [point(0, a + (b - a) * s) for s in (0, 0.25, 0.5, 0.75)]
                outline += [point(i, ends[i][1]) for i in range(4)]
                outline += [point(4, d + (c - d) * s) for s in (0, 0.25, 0.5, 0.75)]
                outline += [point(i, ends[i][0]) for i in (4, 3, 2, 1)]
                self.draw.polygon(outline, colour)

    def front(self):
        """Return the angle on a cylinder that faces the camera."""
        return -math.atan2(0.62 * self.sin, self.cos)

    def box(self, middle, sides, colour):
        """Draw a soft bag: a box around a point of the body, with three half sides."""
        (x, y, z), (wx, wy, wz) = middle, sides
        across, depth = self.across(x, z), self.depth(x, z)
        half = abs(wx * self.cos) + abs(wz * self.sin)
        left, top = self.screen(across - half, y - wy, depth)
        right, bottom = self.screen(across + half, y + wy, depth)
        r = max(1.0, min(0.35 * (right - left), 1.6 * self.scale))
        dark, thick = _shade(colour, 0.6), max(1, int(0.45 * self.scale))
        self.draw.rounded_rectangle((left, top, right, bottom), r, colour, dark, thick)
        mid = top + 0.42 * (bottom - top)
        self.draw.line((left + r / 2, mid, right - r / 2, mid), dark, thick)


_RIGHT = math.pi / 2
_HALF = [math.pi * (i / 6 - 0.5) for i in range(7)]


# ---------------------------------------------------------------- the body


def _between(a, b, t):
    return tuple(m + t * (n - m) for m, n in zip(a, b, strict=True))


def _paint_person(pen, who, phase):
    """Paint one person, parts from far to near; `phase` is that of the step, in radians."""
    swing = 0.36 * math.sin(phase)
    pen.crown += 45 * (1 - math.cos(swing)) * pen.scale  # a stride lowers the body
    parts = [(0.0, lambda: _paint_torso(pen, who)), (40.0, lambda: _paint_head(pen, who))]
    for side in (-1, 1):
        parts.append(
            (
                -50 + pen.depth(side * 4, 20 * swing * side),
                lambda s=side: _paint_leg(pen, who, s, swing * s),
            )
        )
        parts.append(
            (pen.depth(side * 9, 0) + 0.5, lambda s=side: _paint_arm(pen, who, s, -1.2 * swing * s))
        )
    if who.hair_style in ("long", "ponytail"):  # over the torso only where we see the back
        parts.append((41.0 if pen.cos < 0.25 else -0.5, lambda: _paint_mane(pen, who)))
    if who.bag == "backpack":
        parts.append(
            (
                pen.depth(0, -8),
                lambda: pen.box((0, 31, -9.0), (6.4 * who.build, 11, 3.6), who.bag_colour),
            )
        )
    if who.bag == "shoulder":
        x = who.bag_side * 9.5 * who.build
        parts.append(
            (pen.depth(x, 0) + 1.5, lambda: pen.box((x, 50, 0), (2.6, 6.0, 5.6), who.bag_colour))
        )
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()


def _paint_leg(pen, who, side, angle):
    width = {"slim": 0.84, "wide": 1.28}.get(who.legs, 1.0) * (0.5 + 0.5 * who.build)
    hip = (side * 4.3 * who.build, 50.0, 0.0)
    low = angle - max(0.0, -angle) * 1.1 - 0.06  # the knee of the leg behind is bent
    knee = (side * 4.0, 50 + 23 * math.cos(angle), 23 * math.sin(angle))
    ankle = (side * 3.7, knee[1] + 22 * math.cos(low), knee[2] + 22 * math.sin(low))
    toe = (side * 4.2, ankle[1] + 2.2 + 3 * min(0.0, low), ankle[2] + 4.6)
    pen.limb(ankle, toe, 2.3, 1.9, who.shoes)
    if who.legs in ("shorts", "skirt") or who.cut == "dress":
        pen.limb(knee, ankle, 2.9, 2.0, who.skin)
        pen.limb(hip, knee, 4.6, 3.1, who.skin)
        if who.legs == "shorts" and who.cut != "dress":
            pen.limb(hip, _between(hip, knee, 0.8), 5.2, 4.6, who.bottom)
    else:
        pen.limb(knee, ankle, 3.6 * width, (3.6 if who.legs == "wide" else 2.7) * width, who.bottom)
        pen.limb(hip, knee, 5.1, 3.8 * width, who.bottom)
        if who.side_stripe and pen.depth(side, 0) > -0.6:
            seam = ((hip, 4), (knee, 3), (ankle, 2))
            seam = [pen.at(p[0] + side * r, p[1], p[2]) for p, r in seam]
            pen.draw.line(seam, who.accent, int(1.5 * pen.scale))
    if who.boots:
        pen.limb(_between(ankle, knee, 0.45), ankle, 3.1, 2.6, who.shoes)


def _paint_arm(pen, who, side, angle):
    b, fore = who.build, angle + 0.3
    shoulder = (side * 8.4 * b, 20.6, 0.0)
    elbow = (side * 10.4 * b, 20 + 14 * math.cos(angle), 14 * math.sin(angle))
    hand = (side * 10.6 * b, elbow[1] + 13 * math.cos(fore), elbow[2] + 13 * math.sin(fore))
    below = (hand[0], hand[1] + 2.4, hand[2] + 0.6)
    if who.bag == "handbag" and side == who.bag_side:
        pen.box((hand[0], hand[1] + 8.5, hand[2]), (2.4, 4.8, 5.4), who.bag_colour)
    pen.limb(hand, below, 1.6, 1.2, who.skin)
    pen.limb(elbow, hand, 2.1, 1.6, who.skin)
    pen.limb(shoulder, elbow, 2.6, 2.1, who.skin)
    sleeve = {"tank": 0.0, "dress": 0.0, "tshirt": 0.62}.get(who.cut, 1.0)
    if sleeve == 1.0:
        pen.limb(elbow, hand, 2.5, 2.1, who.top)
    if sleeve:
        pen.limb(shoulder, _between(shoulder, elbow, sleeve), 3.0, 2.6, who.top)
        if who.pattern in ("stripes", "checks"):
            (x0, y0), (x1, y1) = pen.at(*shoulder), pen.at(*elbow)
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            dx, dy = (2.2 * pen.scale * d / length for d in (y0 - y1, x1 - x0))  # across the arm
            for s in (0.28 * sleeve, 0.72 * sleeve):
                x, y = x0 + s * (x1 - x0), y0 + s * (y1 - y0)
                pen.capsule((x - dx, y - dy), (x + dx, y + dy), 0.9, 0.9, who.accent)


def _paint_torso(pen, who):
    b, waist = who.build, (6.9 if who.female else 8.2)
    hem = {"dress": 68.0, "coat": 66.0, "tank": 50.0}.get(who.cut, 52.0)
    flare = 11.5 if who.cut == "dress" else 9.6
    widths = [
        (14.5, 3.6),
        (16.5, 7.0 * b),
        (19.5, 9.4 * b),
        (24, 9.6 * b),
        (40, waist * b),
        (49, 8.6 * b),
        (68, flare * b),
    ]
    around, front = math.pi, pen.front()

    def patch(phi, half, y0, y1, colour, slant=0.0):
        pen.patch(widths, phi, half, y0, y1, colour, slant)

    pen.limb((0, 11, 0), (0, 16, 0), 2.9, 3.2, who.skin)
    if who.legs == "skirt" and who.cut != "dress":
        skirt = [(46, 8.2 * b), (54, 9.6 * b), (66, 11.0 * b)]
        pen.patch(skirt, 0, around, 46, 66, who.bottom)
        pen.patch(skirt, front - pen.light * 1.1, 0.5, 46, 66, (0, 0, 0, 50))
        if who.side_stripe:
            pen.patch(skirt, 0, around, 62, 64, who.accent)
    patch(0, around, 14.5, hem + 0.6, _shade(who.top, 0.66))  # the rim of the hem
    patch(0, around, 14.5, hem, who.top)
    _paint_pattern(patch, who, hem)
    if who.cut in ("tank", "dress", "tshirt"):
        patch(0, 0.5, 14.5, 17.5 if who.cut == "tshirt" else 19.5, who.skin)
    if who.cut in ("jacket", "coat"):
        gap = 0.44 if who.cut == "jacket" else 0.18
        patch(0, gap + 0.1, 15.5, hem, _shade(who.top, 0.6))
        patch(0, gap, 15.5, hem, who.accent)
    if who.cut == "hoodie":
        patch(math.pi, 0.85, 14.5, 23, _shade(who.top, 0.78))  # the hood, down on the back
        patch(0, 0.55, 39, 47, _shade(who.top, 0.78))  # the pocket
    if who.cut == "dress":
        patch(0, around, 38, 40, _shade(who.top, 0.6))  # a belt
    if who.bag == "backpack":
        for side in (-1, 1):
            patch(side * 0.62, 0.13, 15.5, 38, who.bag_colour)
    if who.bag == "shoulder":  # the strap runs from the far shoulder to the bag, front and back
        patch(-who.bag_side * 0.6, 0.12, 16, 47, who.bag_colour, who.bag_side * 1.7)
        patch(math.pi + who.bag_side * 0.6, 0.12, 16, 47, who.bag_colour, -who.bag_side * 1.7)
    for reach, alpha in ((0.75, 30), (0.45, 40)):  # the side away from the light
        patch(front - pen.light * (_RIGHT - reach / 2), reach / 2, 15.5, hem, (0, 0, 0, alpha))
    patch(front + pen.light * 0.8, 0.35, 17, hem, (255, 255, 255, 22))


def _paint_pattern(patch, who, hem):
    around, accent = math.pi, who.accent
    if who.pattern in ("stripes", "checks"):
        step = 6.4 if who.pattern == "stripes" else 7.4
        for y in np.arange(20, hem - 2, step):
            patch(0, around, y, y + (3.0 if who.pattern == "stripes" else 1.7), accent)
    if who.pattern in ("pinstripes", "checks"):
        for i in range(12):
            patch(i * around / 6, 0.11, 16.5, hem, accent)
    if who.pattern == "print":  # on the chest, and a smaller one on the back
        patch(0, 0.55, 23, 35, accent)
        patch(0, 0.28, 26.5, 31.5, _shade(who.top, 0.8))
        patch(math.pi, 0.5, 22, 27, accent)
    if who.pattern == "yoke":
        patch(0, around, 14.5, 27, accent)
    if who.pattern == "band":
        patch(0, around, 30, 37.5, accent)
    if who.pattern == "dots":
        for row, y in enumerate(np.arange(20, hem - 3, 6.0)):
            for i in range(8):
                patch((i + 0.5 * (row % 2)) * around / 4, 0.17, y, y + 2.9, accent)


def _paint_mane(pen, who):
    """Paint hair that hangs over the back: in front of the torso only where the back is seen."""
    if who.hair_style == "long":
        pen.limb((0, 8, -1.8), (0, 25, -4.2), 5.0, 4.6, who.hair)
    else:
        pen.limb((0, 5, -5.6), (0, 19, -7.2), 1.9, 1.3, who.hair)


def _paint_head(pen, who):
    s, c = pen.sin, pen.cos
    hair = who.skin if who.hair_style == "bald" else who.hair
    if who.hair_style == "bun":
        pen.disc(-3.6 * s, 0.8, -3.6 * c, 2.6, 2.6, _shade(hair, 0.85))
    if who.hair_style in ("bob", "long"):
        pen.disc(-0.9 * s, 9.0, 0, 5.5, 6.6, _shade(hair, 0.9))
    pen.disc(-0.5 * s, 7.0, 0, 4.9, 7.0, _shade(hair, 0.7))
    pen.disc(-0.5 * s, 6.8, 0, 4.6, 6.6, hair)
    if c > -0.65:  # the face, which narrows as it turns away
        width = 4.1 * (0.62 + 0.38 * c)
        brow = 5.4 if who.hair_style != "bald" else 7.0
        pen.disc(2.4 * s, 14.0 - brow, 2, width, brow, who.skin)
        pen.disc(2.4 * s - pen.light * 0.45 * width, 9, 2, width * 0.45, 4.0, (0, 0, 0, 26))
        for eye in (-1.7, 1.7):
            if pen.depth(eye, 3.2) > 0.6:
                pen.disc(eye * c + 3.4 * s, 7.7, 0, 0.55, 0.6, (40, 30, 30))
        if c > 0.2:
            pen.disc(3.4 * s, 11.4, 0, 1.2, 0.4, _shade(who.skin, 0.62))
    elif who.hair_style in ("short", "bald"):
        pen.disc(0, 12.4, 0, 3.1, 1.6, who.skin)  # the nape
    if who.hair_style in ("short", "bald", "bun", "ponytail"):
        for side in (-4.6, 4.6):
            if pen.depth(side, -0.3) > 1:
                pen.disc(side * c - 0.3 * s, 8.4, 0, 0.8, 1.4, _shade(who.skin, 0.85))  # an ear
    if who.hat:
        x, y = pen.screen(-0.3 * s, 5.4, 0)
        rx, ry = 5.3 * pen.scale * pen.stretch, 6.4 * pen.scale
        pen.draw.pieslice((x - rx, y - ry, x + rx, y + ry), 180, 360, who.hat_colour)
        if who.hat == "cap" and c > -0.5:
            pen.disc(5.0 * s, 5.3, 5, 3.0 + 1.2 * abs(c), 1.2, _shade(who.hat_colour, 0.72))
        if who.hat == "beanie":
            pen.draw.rectangle(
                (x - rx, y - 0.16 * ry, x + rx, y + 0.22 * ry), _shade(who.hat_colour, 0.75)
            )
            pen.disc(-0.3 * s, -1.4, 0, 1.5, 1.5, _shade(who.hat_colour, 1.25))


# ---------------------------------------------------------------- the street


def _texture(rng, h, w, cell, strength):
    """Return smooth noise (h, w, 1) around 1: a coarse random grid, enlarged."""
    grid = rng.normal(0, 40, (h // cell + 2, w // cell + 2)) + 128
    big = Image.fromarray(grid.clip(0, 255).astype(np.uint8)).resize((w, h), Image.BICUBIC)
    return 1 + strength * (np.asarray(big, np.float32)[..., None] - 128) / 128


@lru_cache(maxsize=16)
def _scene(seed, camera, height, width):
    """Paint the street of a camera, six pictures wide: each picture shows another piece of it."""
    rng, street = _rng(seed, 3, camera), STREETS[CAMERAS[camera].scene]
    h, w = height * ZOOM, 6 * width * ZOOM
    u = h / 128
    image = Image.new("RGB", (w, h), street.wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, street.horizon * u, w, h), street.ground)
    if street.tiles:  # their rows are denser towards the horizon
        seam = _shade(street.ground, 0.8)
        for i in range(6):
            y = (street.horizon + (128 - street.horizon) * (i / 6) ** 1.7) * u
            draw.line((0, y, w, y), seam, int(u))
        for x in np.arange(0, w, 18 * u):
            draw.line((x, street.horizon * u, x + 12 * u, h), seam, int(u))
    for gap, parts in street.things:
        x = -gap * u * rng.random() if gap < 384 else 0
        while x < w:
            for left, top, wide, high, colour, radius in parts:
                colour = _shade(colour or _pick(rng, TOPS + BAGS), rng.uniform(0.9, 1.1))
                box = (x + left * u, top * u, x + (left + wide) * u, (top + high) * u)
                draw.rounded_rectangle(box, radius * u, colour)
            x += gap * u * (1 + (rng.uniform(-0.3, 0.3) if gap > 14 else 0))
    pixels = np.asarray(image, np.float32) * _texture(rng, h, w, 60, 0.3)
    pixels = pixels * _texture(rng, h, w, 9, 0.15 if street.tiles else 0.3)
    pixels = 0.65 * pixels + 0.35 * 132  # the air between
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(2.0))  # out of focus behind the people


def _clutter(draw, rng, camera, h, w):
    """Put something in front of the person: a post, a bicycle, a bin, or another pedestrian."""
    u, side, kind = h / 128, _pick(rng, (-1, 1)), int(rng.integers(5))
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
        draw.line([(x + p * u, y - q * u) for p, q in frame], _pick(rng, BAGS), int(1.8 * u))
        draw.line((x + 8 * u, y - 30 * u, x + 16 * u, y - 30 * u), (30, 30, 30), int(2.4 * u))
    elif kind == 2:  # a bin
        x, y = w / 2 + side * rng.uniform(10, 24) * u, h * rng.uniform(0.66, 0.8)
        draw.rounded_rectangle((x - 13 * u, y, x + 13 * u, h + 9 * u), 3 * u, (66, 84, 72))
        draw.rectangle((x - 9 * u, y + 5 * u, x + 9 * u, y + 9 * u), (26, 32, 30))
    else:
        centre, crown = w * (0.5 + side * rng.uniform(0.42, 0.52)), h * rng.uniform(0.02, 0.2)
        _stranger(draw, rng, camera, centre, crown, 1.02 * h / 100)


def _stranger(draw, rng, camera, centre, crown, scale):
    pen = _Pen(draw, camera, rng.uniform(-math.pi, math.pi), centre, crown, scale)
    _paint_person(pen, look(int(rng.integers(20_000, 90_000))), rng.uniform(0, 2 * math.pi))


# ---------------------------------------------------------------- one picture


def draw_person(pid, camera, *, frame=0, view=None, seed=0, size=(128, 64), clean=False, bad=False):
    """Draw one picture of an identity as a camera sees it.

    Args:
        pid: identity, 0 or above; `look(pid, seed)` tells what it wears.
        camera: 1 to 6.
        frame: number of the picture: another frame is another step, box, light and piece of street.
        view: "front", "back", "left" or "right" (towards that edge of the picture), a yaw in
            degrees, or None: drawn from pid, camera and frame, as in the data set.
        seed: of the whole data set.
        size: (height, width) in pixels.
        clean: leave out occlusions, strangers and misaligned boxes.
        bad: a detection gone wrong: half a body, or far off the centre (Market's junk).

    Returns:
        (height, width, 3) uint8 RGB array, the same for the same arguments.

    >>> draw_person(2, 1, view="front").shape
    (128, 64, 3)
    """
    if camera not in CAMERAS:
        raise ValueError(f"There are cameras 1 to {len(CAMERAS)}, not {camera!r}.")
    if isinstance(view, str) and view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, a yaw in degrees or None.")
    cam, (height, width) = CAMERAS[camera], size
    h, w = height * ZOOM, width * ZOOM
    walk = _rng(seed, 4, pid, camera)  # within one camera a person keeps the direction
    rng = _rng(seed, 5, pid, camera, frame)
    yaw = _pick(walk, tuple(VIEWS.values())) + walk.uniform(-35, 35) + rng.normal(0, 14)
    yaw = math.radians(yaw if view is None else VIEWS.get(view, view))

    street = _scene(seed, camera, height, width)
    left = int(rng.integers(street.width - w))
    image = street.crop((left, 0, left + w, h))
    draw = ImageDraw.Draw(image, "RGBA")

    fill = rng.uniform(0.88, 0.96)  # the share of the picture's height that the person takes
    off_x, off_y = rng.normal(0, 0.03), rng.normal(0, 0.012)
    if bad:
        fill = rng.uniform(1.15, 1.9)
        off_x = rng.choice((-1, 1)) * rng.uniform(0.15, 0.5)
        off_y = rng.uniform(-0.75, -0.1) if rng.random() < 0.6 else rng.uniform(0.15, 0.5)
    elif not clean and rng.random() < 0.15:  # a loose or a tight box
        fill *= rng.choice((0.8, 1.14))
        off_x, off_y = rng.normal(0, 0.08), rng.normal(0, 0.05)
    scale = fill * h / 100
    centre, crown = w * (0.5 + off_x), h * (0.5 + off_y) - 50 * scale
    if not clean and rng.random() < 0.15:
        _stranger(draw, rng, cam, w * rng.choice((0.12, 0.88)), 0.16 * h, 0.6 * scale)
    pen = _Pen(draw, cam, yaw, centre, crown, scale)
    for reach, alpha in ((1.0, 26), (0.75, 30), (0.5, 34)):  # the shadow at the feet
        pen.disc(-cam.light * 4, 98.5, 0, 14 * reach, 3.2 * reach, (0, 0, 0, alpha))
    _paint_person(pen, look(pid, seed), rng.uniform(0, 2 * math.pi))
    if not clean and rng.random() < 0.2:
        _clutter(draw, rng, cam, h, w)
    return _expose(image.reduce(ZOOM), cam, rng)


def _expose(image, cam, rng):
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


# ---------------------------------------------------------------- the data set


def draw_dataset(
    root,
    *,
    train_ids=150,
    test_ids=50,
    images_per_camera=3,
    cameras=6,
    distractors=100,
    junk=75,
    seed=0,
    size=(128, 64),
):
    """Draw a whole data set in Market-1501's layout and return its folder.

    `root` gets `bounding_box_train`, `query` and `bounding_box_test`, with JPEG files named like
    `0002_c1s1_000451_03.jpg` (pid, camera, sequence, frame, box), and `dataset.json`, which names
    the settings. Even pids train, odd ones test. An identity walks past 2 to `cameras` cameras;
    each takes `images_per_camera` pictures of it, and of a test identity one query more. So every
    query has a match in another camera. Distractors have pid 0000, junk −1.

    The pictures depend on seed, pid, camera and frame alone: more identities leave the others as
    they are. All is drawn into a folder beside `root` and renamed at the end, so a half-drawn data
    set never stands there. A `root` drawn before with the same settings is returned at once.

    Raises:
        ValueError: settings that make no data set.
        FileExistsError: `root` is there and is something else; it is left untouched.
    """
    root = Path(root)
    settings = dict(
        version=VERSION,
        train_ids=train_ids,
        test_ids=test_ids,
        images_per_camera=images_per_camera,
        cameras=cameras,
        distractors=distractors,
        junk=junk,
        seed=seed,
        size=list(size),
    )
    if not 2 <= cameras <= len(CAMERAS):
        raise ValueError(f"cameras must be 2 to {len(CAMERAS)}: a query needs a match in another.")
    if not (1 <= train_ids < 5000 and 1 <= test_ids < 5000 and images_per_camera >= 1):
        raise ValueError("train_ids and test_ids must be 1 to 4999, images_per_camera 1 or more.")
    if min(distractors, junk, seed) < 0 or min(size) < 32:
        raise ValueError("distractors, junk and seed must be 0 or more, size 32 or more.")
    if _drawn_before(root, settings):
        return root

    part = root.with_name(f".{root.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for folder in ("bounding_box_train", "query", "bounding_box_test"):
            (part / folder).mkdir(parents=True)
        for pid in range(2, 2 * train_ids + 1, 2):
            for camera in _seen_by(pid, cameras, seed):
                for i in range(images_per_camera):
                    _save(part / "bounding_box_train", pid, camera, i, pid, seed, size)
        for pid in range(1, 2 * test_ids, 2):
            for camera in _seen_by(pid, cameras, seed):
                _save(part / "query", pid, camera, 0, pid, seed, size)
                for i in range(1, images_per_camera + 1):
                    _save(part / "bounding_box_test", pid, camera, i, pid, seed, size)
        for i in range(distractors):  # pids that no one else has, each seen once
            _save(part / "bounding_box_test", 0, 1 + i % cameras, i, 10_000 + i, seed, size)
        for i in range(junk):
            pid = 1 + 2 * (i % test_ids)
            camera = _seen_by(pid, cameras, seed)[0]
            _save(part / "bounding_box_test", -1, camera, i, pid, seed, size, bad=True)
        (part / "dataset.json").write_text(json.dumps(settings, indent=1) + "\n")
        try:
            part.rename(root)
        except OSError:  # someone else drew it meanwhile
            if not _drawn_before(root, settings):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def _drawn_before(root, settings):
    """Say whether root holds this very data set; raise where it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / "dataset.json"
    if not marker.is_file():
        raise FileExistsError(f"{root} is there, and not drawn by reidlib: name another folder.")
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        found = None
    if found != settings:
        raise FileExistsError(
            f"{root} was drawn with other settings, see dataset.json in it: "
            "remove it or name another folder."
        )
    return True


def _seen_by(pid, cameras, seed):
    """Return the sorted cameras that an identity walks past."""
    rng = _rng(seed, 6, pid)
    count = min(cameras, int(_pick(rng, (2, 3, 3, 4, 4, 5))))
    return sorted(int(c) + 1 for c in rng.permutation(cameras)[:count])


def _save(folder, pid, camera, i, who, seed, size, bad=False):
    """Draw picture i of `who` in a camera and save it under the name of `pid`."""
    # Distractors and junk share one pid each, so there the frame has to count the files.
    start = int(_rng(seed, 7, who, camera).integers(1, 4000)) if pid > 0 else 0
    frame = 25 * (start + i) + 1
    pixels = draw_person(who, camera, frame=frame, seed=seed, size=size, bad=bad)
    name = f"{pid:04d}" if pid >= 0 else "-1"
    box = 0 if folder.name == "query" else 1 + i % 9
    path = folder / f"{name}_c{camera}s{1 + who % 3}_{frame:06d}_{box:02d}.jpg"
    Image.fromarray(pixels).save(path, quality=90)
