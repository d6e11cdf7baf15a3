"""Draws the people of the built-in data: who they are and how they are painted. You need not read this.

A body is a stick figure (x to its left, y down from the crown at 0 to the soles at 100, z forward),
turned by a yaw, clothed with capsules and elliptic cylinders, and painted from far to near.
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng
from PIL.ImageDraw import ImageDraw

Colour = tuple[int, ...]  # red, green, blue, and how opaque, 0 to 255
Point = tuple[float, float, float]  # of the body
Pixel = tuple[float, float]
Widths = list[tuple[float, float]]  # of an elliptic cylinder: (y, half its width), from above

TOLD = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FAMILY = 8  # so many neighbouring pids wear the same colours
MANES = TOLD["manes"]
AROUND, RIGHT_ANGLE = math.pi, math.pi / 2
_HALF = [math.pi * (i / 6 - 0.5) for i in range(7)]


def pick(rng: Generator, options: Sequence) -> Any:
    """Draw one of the options; a colour is a tuple."""
    option = options[int(rng.integers(len(options)))]
    return tuple(option) if isinstance(option, list) else option


def shade(colour: Colour, factor: float) -> Colour:
    """Return a colour so many times as bright."""
    return tuple(max(0, min(255, int(c * factor))) for c in colour)


def look(pid: int, seed: int = 0) -> SimpleNamespace:
    """Return what makes an identity, the same in each of its pictures.

    Pids of one block of `FAMILY` (0 to 7, 8 to 15, …) wear the same two colours in eight
    different patterns, so colour alone cannot tell them apart.

    >>> a, b = look(9), look(10)
    >>> (a.top, a.bottom) == (b.top, b.bottom), a.pattern == b.pattern
    (True, False)
    """
    family, patterns = default_rng([seed, 1, pid // FAMILY]), TOLD["patterns"]
    who = SimpleNamespace(top=pick(family, TOLD["tops"]), bottom=pick(family, TOLD["bottoms"]))
    who.pattern = patterns[family.permutation(len(patterns))[pid % FAMILY]]
    rng = default_rng([seed, 2, pid])
    who.female = bool(rng.random() < 0.5)
    worn = TOLD["worn"] | (TOLD["hers"] if who.female else {})
    # An accent too close to the garment would hide its pattern.
    worn["accent"] = [c for c in worn["accent"] if np.abs(np.subtract(c, who.top)).sum() > 180]
    for name, options in worn.items():
        setattr(who, name, pick(rng, options))
    who.boots = rng.random() < 0.25
    who.side_stripe = rng.random() < 0.2  # down the trousers
    who.build = rng.uniform(0.90, 1.14) * (0.93 if who.female else 1.0)  # width of the torso
    return who


class Pen:
    """Paints parts of one body on a canvas: it knows yaw, place, size and the camera's height."""

    def __init__(
        self, draw: ImageDraw, camera: Any, yaw: float, centre: float, crown: float, scale: float
    ):
        self.draw, self.camera, self.light = draw, camera, camera.light
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.front = -math.atan2(0.62 * self.sin, self.cos)  # the angle that faces the camera
        self.centre, self.crown, self.scale, self.stretch = centre, crown, scale, 1.38

    def screen(self, across: float, y: float, depth: float) -> Pixel:
        """Place a point `across` the view, `depth` towards the camera, at height y."""
        f = self.camera.foreshorten
        x = self.stretch * across * (1 + f * (0.5 - y / 100))  # the nearer end, the head, is wider
        y = y + f * y * (100 - y) / 100 + self.camera.tilt * depth
        return self.centre + self.scale * x, self.crown + self.scale * y

    def at(self, x: float, y: float, z: float) -> Pixel:
        """Turn a point of the body by the yaw and place it."""
        return self.screen(self.across(x, z), y, self.depth(x, z))

    def across(self, x: float, z: float) -> float:
        """How far a point of the body is across the view."""
        return x * self.cos + z * self.sin

    def depth(self, x: float, z: float) -> float:
        """How far a point of the body is towards the camera."""
        return z * self.cos - x * self.sin

    def capsule(self, p: Pixel, q: Pixel, rp: float, rq: float, fill: Colour) -> None:
        """Fill the hull of two circles around the pixels p and q (radii in body units)."""
        rp, rq = rp * self.scale, rq * self.scale
        a = math.atan2(q[1] - p[1], q[0] - p[0])
        hull = [(q[0] + rq * math.cos(a + t), q[1] + rq * math.sin(a + t)) for t in _HALF]
        hull += [(p[0] - rp * math.cos(a + t), p[1] - rp * math.sin(a + t)) for t in _HALF]
        self.draw.polygon(hull, fill)

    def limb(self, a: Point, b: Point, ra: float, rb: float, colour: Colour) -> None:
        """Draw a round limb between two points of the body: rim, flesh, and a dark side."""
        (px, py), (qx, qy) = p, q = self.at(*a), self.at(*b)
        self.capsule(p, q, ra + 0.3, rb + 0.3, shade(colour, 0.68))
        self.capsule(p, q, ra, rb, colour)
        away = -self.light * 0.5 * self.scale
        p, q = (px + away * ra, py), (qx + away * rb, qy)
        self.capsule(p, q, ra * 0.5, rb * 0.5, (0, 0, 0, 44))

    def disc(self, across: float, y: float, depth: float, rx: float, ry: float, fill: Colour):
        """Fill an ellipse around a point of the view (radii in body units)."""
        x, y = self.screen(across, y, depth)
        rx, ry = rx * self.scale * self.stretch, ry * self.scale
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)

    def patch(self, widths: Widths, phi: float, half: float, y0: float, y1: float, colour: Colour,
              slant: float = 0.0) -> None:  # fmt: skip
        """Paint a patch of an elliptic cylinder around the body, as far as it faces the camera.

        It spans the angles phi ± half (0 = chest, π/2 = left side) and the heights y0 to y1;
        `slant` turns it on the way down.
        """
        # A cylinder of depth 0.62 of its width, turned by the yaw, is seen under the parameter u:
        # across = width · k · sin u, and it faces us where |u| < π/2.
        k = math.hypot(self.cos, 0.62 * self.sin)
        mid = (phi - self.front + math.pi) % (2 * math.pi) - math.pi if half < math.pi else 0.0
        ys = [y0 + (y1 - y0) * i / 4 for i in range(5)]
        rs = np.interp(ys, *zip(*widths, strict=True))

        def point(i: int, u: float) -> Pixel:
            across, depth = rs[i] * k * math.sin(u), rs[i] * 0.62 / k * math.cos(u)
            return self.screen(across, ys[i], depth)

        for turn in (-2 * math.pi, 0.0, 2 * math.pi):
            middles = [mid + turn + slant * i / 4 for i in range(5)]
            ends = [[middle - half, middle + half] for middle in middles]
            ends = np.clip(ends, -RIGHT_ANGLE, RIGHT_ANGLE)  # as far as they face us
            if any(lo < hi for lo, hi in ends):
                outline = [point(0, u) for u in np.linspace(*ends[0], 5)[:4]]
                outline += [point(i, ends[i][1]) for i in range(4)]
                outline += [point(4, u) for u in np.linspace(*ends[4][::-1], 5)[:4]]
                outline += [point(i, ends[i][0]) for i in (4, 3, 2, 1)]
                self.draw.polygon(outline, colour)

    def box(self, middle: Point, sides: Point, colour: Colour) -> None:
        """Draw a soft bag: a box around a point of the body, with three half sides."""
        (x, y, z), (wx, wy, wz) = middle, sides
        across, depth = self.across(x, z), self.depth(x, z)
        half = abs(wx * self.cos) + abs(wz * self.sin)
        left, top = self.screen(across - half, y - wy, depth)
        right, bottom = self.screen(across + half, y + wy, depth)
        r = max(1.0, min(0.35 * (right - left), 1.6 * self.scale))
        dark, thick = shade(colour, 0.6), max(1, int(0.45 * self.scale))
        self.draw.rounded_rectangle((left, top, right, bottom), r, colour, dark, thick)
        mid = top + 0.42 * (bottom - top)
        self.draw.line((left + r / 2, mid, right - r / 2, mid), dark, thick)


def _between(a: Point, b: Point, t: float) -> Point:
    return tuple(m + t * (n - m) for m, n in zip(a, b, strict=True))


def paint_person(pen: Pen, who: SimpleNamespace, phase: float) -> None:
    """Paint one person, parts from far to near; `phase` is that of the step, in radians."""
    swing, b = 0.36 * math.sin(phase), who.build
    pen.crown += 45 * (1 - math.cos(swing)) * pen.scale  # a stride lowers the body
    parts = [(0.0, _paint_torso, pen, who), (40.0, _paint_head, pen, who)]  # depth, what to call
    for side in (-1, 1):
        step = swing * side
        parts.append((-50 + pen.depth(side * 4, 20 * step), _paint_leg, pen, who, side, step))
        parts.append((pen.depth(side * 9, 0) + 0.5, _paint_arm, pen, who, side, -1.2 * step))
    if who.hair_style in MANES:  # over the torso only where we see the back
        depth = 41.0 if pen.cos < 0.25 else -0.5
        parts.append((depth, pen.limb, *MANES[who.hair_style], who.hair))
    if who.bag == "backpack":
        parts.append((pen.depth(0, -8), pen.box, (0, 31, -9.0), (6.4 * b, 11, 3.6), who.bag_colour))
    if who.bag == "shoulder":
        x = who.bag_side * 9.5 * b
        parts.append((pen.depth(x, 0) + 1.5, pen.box, (x, 50, 0), (2.6, 6.0, 5.6), who.bag_colour))
    for _, paint, *arguments in sorted(parts, key=lambda part: part[0]):
        paint(*arguments)


def _paint_leg(pen: Pen, who: SimpleNamespace, side: int, angle: float) -> None:
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
            seam = [pen.at(p[0] + side * r, *p[1:]) for p, r in ((hip, 4), (knee, 3), (ankle, 2))]
            pen.draw.line(seam, who.accent, int(1.5 * pen.scale))
    if who.boots:
        pen.limb(_between(ankle, knee, 0.45), ankle, 3.1, 2.6, who.shoes)


def _paint_arm(pen: Pen, who: SimpleNamespace, side: int, angle: float) -> None:
    b, fore = who.build, angle + 0.3
    shoulder = (side * 8.4 * b, 20.6, 0.0)
    elbow = (side * 10.4 * b, 20 + 14 * math.cos(angle), 14 * math.sin(angle))
    hand = (side * 10.6 * b, elbow[1] + 13 * math.cos(fore), elbow[2] + 13 * math.sin(fore))
    if who.bag == "handbag" and side == who.bag_side:
        pen.box((hand[0], hand[1] + 8.5, hand[2]), (2.4, 4.8, 5.4), who.bag_colour)
    pen.limb(hand, (hand[0], hand[1] + 2.4, hand[2] + 0.6), 1.6, 1.2, who.skin)
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


def _paint_torso(pen: Pen, who: SimpleNamespace) -> None:
    b, waist = who.build, (6.9 if who.female else 8.2)
    hem = {"dress": 68.0, "coat": 66.0, "tank": 50.0}.get(who.cut, 52.0)
    widths = [(14.5, 3.6), (16.5, 7.0 * b), (19.5, 9.4 * b), (24, 9.6 * b)]
    widths += [(40, waist * b), (49, 8.6 * b), (68, (11.5 if who.cut == "dress" else 9.6) * b)]

    pen.limb((0, 11, 0), (0, 16, 0), 2.9, 3.2, who.skin)
    if who.legs == "skirt" and who.cut != "dress":
        skirt = [(46, 8.2 * b), (54, 9.6 * b), (66, 11.0 * b)]
        pen.patch(skirt, 0, AROUND, 46, 66, who.bottom)
        pen.patch(skirt, pen.front - pen.light * 1.1, 0.5, 46, 66, (0, 0, 0, 50))
        if who.side_stripe:
            pen.patch(skirt, 0, AROUND, 62, 64, who.accent)
    rim = shade(who.top, 0.66)
    patches = [(0, AROUND, 14.5, hem + 0.6, rim), (0, AROUND, 14.5, hem, who.top)]
    patches += _clothes(who, hem)
    for reach, alpha in ((0.75, 30), (0.45, 40)):  # the side away from the light
        away = pen.front - pen.light * (RIGHT_ANGLE - reach / 2)
        patches.append((away, reach / 2, 15.5, hem, (0, 0, 0, alpha)))
    patches.append((pen.front + pen.light * 0.8, 0.35, 17, hem, (255, 255, 255, 22)))
    for patch in patches:
        pen.patch(widths, *patch)


def _clothes(who: SimpleNamespace, hem: float) -> list[tuple]:
    """Return what `Pen.patch` paints on the torso: the pattern, then the cut, then the straps."""
    accent, belt, fold = who.accent, shade(who.top, 0.6), shade(who.top, 0.78)
    rows, side = enumerate(np.arange(20, hem - 3, 6.0)), who.bag_side
    pins = [(i * AROUND / 6, 0.11, 16.5, hem, accent) for i in range(12)]
    neck = (0, 0.5, 14.5, 19.5, who.skin)
    patches = {
        "stripes": [(0, AROUND, y, y + 3.0, accent) for y in np.arange(20, hem - 2, 6.4)],
        "pinstripes": pins,
        "checks": [(0, AROUND, y, y + 1.7, accent) for y in np.arange(20, hem - 2, 7.4)] + pins,
        "print": [  # on the chest, and a smaller one on the back
            (0, 0.55, 23, 35, accent),
            (0, 0.28, 26.5, 31.5, shade(who.top, 0.8)),
            (math.pi, 0.5, 22, 27, accent),
        ],
        "yoke": [(0, AROUND, 14.5, 27, accent)],
        "band": [(0, AROUND, 30, 37.5, accent)],
        "dots": [
            ((i + 0.5 * (row % 2)) * AROUND / 4, 0.17, y, y + 2.9, accent)
            for row, y in rows
            for i in range(8)
        ],
        "tank": [neck],
        "tshirt": [(0, 0.5, 14.5, 17.5, who.skin)],
        "jacket": [(0, 0.44 + 0.1, 15.5, hem, belt), (0, 0.44, 15.5, hem, accent)],
        "coat": [(0, 0.18 + 0.1, 15.5, hem, belt), (0, 0.18, 15.5, hem, accent)],
        # A hood, down on the back, and a pocket.
        "hoodie": [(math.pi, 0.85, 14.5, 23, fold), (0, 0.55, 39, 47, fold)],
        "dress": [neck, (0, AROUND, 38, 40, belt)],
        "backpack": [(s * 0.62, 0.13, 15.5, 38, who.bag_colour) for s in (-1, 1)],
        "shoulder": [  # from the far shoulder to the bag, front and back
            (-side * 0.6, 0.12, 16, 47, who.bag_colour, side * 1.7),
            (math.pi + side * 0.6, 0.12, 16, 47, who.bag_colour, -side * 1.7),
        ],
    }
    return [patch for worn in (who.pattern, who.cut, who.bag) for patch in patches.get(worn, [])]


def _paint_head(pen: Pen, who: SimpleNamespace) -> None:
    s, c = pen.sin, pen.cos
    hair = who.skin if who.hair_style == "bald" else who.hair
    if who.hair_style == "bun":
        pen.disc(-3.6 * s, 0.8, -3.6 * c, 2.6, 2.6, shade(hair, 0.85))
    if who.hair_style in ("bob", "long"):
        pen.disc(-0.9 * s, 9.0, 0, 5.5, 6.6, shade(hair, 0.9))
    pen.disc(-0.5 * s, 7.0, 0, 4.9, 7.0, shade(hair, 0.7))
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
            pen.disc(3.4 * s, 11.4, 0, 1.2, 0.4, shade(who.skin, 0.62))
    elif who.hair_style in ("short", "bald"):
        pen.disc(0, 12.4, 0, 3.1, 1.6, who.skin)  # the nape
    if who.hair_style in ("short", "bald", "bun", "ponytail"):
        for side in (-4.6, 4.6):
            if pen.depth(side, -0.3) > 1:
                pen.disc(side * c - 0.3 * s, 8.4, 0, 0.8, 1.4, shade(who.skin, 0.85))  # an ear
    if who.hat:
        x, y = pen.screen(-0.3 * s, 5.4, 0)
        rx, ry = 5.3 * pen.scale * pen.stretch, 6.4 * pen.scale
        pen.draw.pieslice((x - rx, y - ry, x + rx, y + ry), 180, 360, who.hat_colour)
        if who.hat == "cap" and c > -0.5:
            pen.disc(5.0 * s, 5.3, 5, 3.0 + 1.2 * abs(c), 1.2, shade(who.hat_colour, 0.72))
        if who.hat == "beanie":
            brim = (x - rx, y - 0.16 * ry, x + rx, y + 0.22 * ry)
            pen.draw.rectangle(brim, shade(who.hat_colour, 0.75))
            pen.disc(-0.3 * s, -1.4, 0, 1.5, 1.5, shade(who.hat_colour, 1.25))
