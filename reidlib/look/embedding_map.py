"""A map of embeddings as one HTML page: choose a dot, see its photograph and its neighbours.

The page needs nothing beside itself: no network, no server, no library. Photographs and data are
inside, and a content security policy forbids it to load anything.
"""

import base64
import html
import io
import json

import numpy as np
import pandas as pd
from PIL import Image


def linked_map(
    points: np.ndarray,
    table: pd.DataFrame,
    pixels: np.ndarray,
    neighbours: np.ndarray,
    distances: np.ndarray,
    *,
    title: str = "Map of the embedding space",
    height: int = 96,
) -> str:
    """Return a page that links a map of embeddings with its images.

    A dot is chosen with the mouse, with a finger, or with the keyboard (Tab to the map; arrows to
    the next dot in that direction; Home and End, first and last). Then its photograph, identity
    and camera are shown, with its nearest neighbours by distance between embeddings: on the map, with
    lines to them, and as a list to go on from. Same identity: ✓, full line, blue; another one: ✗,
    dashed, orange. All images of the chosen identity are larger dots.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        table: N rows: ``path``, ``pid``, ``camid``; ``split``, if there, is shown.
        pixels: (N, H, W, 3) uint8; kept in the page as JPEG thumbnails.
        neighbours: (N, K) row numbers, nearest first. With t-SNE, dots that lie side by side need not
            be neighbours: that is what these are for.
        distances: (N, K), to them.
        title: of the page.
        height: of a thumbnail, in pixels; larger ones are scaled down.

    Returns:
        A complete HTML document; about 2 kB an image.

    Raises:
        ValueError: no points, points that are not finite, or shapes that do not fit.
    """
    points, neighbours = np.asarray(points, float), np.asarray(neighbours)
    n = len(table)
    if n == 0 or points.shape != (n, 2) or len(pixels) != n or not np.isfinite(points).all():
        raise ValueError(
            f"A map of {n} images needs as many photographs, and finite points of shape ({n}, 2); "
            f"there are {len(pixels)} and {points.shape}."
        )
    if neighbours.ndim != 2 or len(neighbours) != n or np.shape(distances) != neighbours.shape:
        raise ValueError(
            f"{neighbours.shape} neighbours and {np.shape(distances)} distances: not (N, K)."
        )
    if neighbours.size and not (neighbours.min() >= 0 and neighbours.max() < n):
        raise ValueError(f"neighbours must be row numbers from 0 to {n - 1}.")
    low, spread = points.min(axis=0), np.ptp(points, axis=0)
    placed = (points - low) / np.where(spread > 0, spread, 1)
    splits = table["split"] if "split" in table else [""] * n
    dots = [
        {
            "x": round(20 + 960 * float(x), 1),
            "y": round(20 + 660 * float(1 - y), 1),  # upwards, as figures have it
            "pid": int(pid),
            "text": _name(int(pid), int(camid), str(split)),
            "file": str(path).replace("\\", "/").rsplit("/", 1)[-1],
            "photo": _thumbnail(image, height),
            "near": [int(row) for row in near],
            "far": [float(f"{d:.3g}") for d in far],
        }
        for (x, y), pid, camid, split, path, image, near, far in zip(
            *(placed, table["pid"], table["camid"], splits, table["path"], pixels),
            *(neighbours, np.asarray(distances)),
            strict=True,
        )
    ]
    # "<" would end the script early, were it in a file's name
    data = json.dumps(dots, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _PAGE.replace("[[title]]", html.escape(title)).replace("[[data]]", data)


def _name(pid: int, camid: int, split: str) -> str:
    who = f"identity {pid}" if pid > 0 else "distractor" if pid == 0 else "unknown person"
    return ", ".join(
        [who, *([f"camera {camid}"] if camid >= 0 else []), *([split] if split else [])]
    )


def _thumbnail(image: np.ndarray, height: int) -> str:
    """A JPEG as a data address."""
    photo = Image.fromarray(np.ascontiguousarray(image))
    photo.thumbnail((height, height))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>[[title]]</title>
<style>
:root { color-scheme: light dark;
  --ink: light-dark(#1a1a1a, #ececec); --ground: light-dark(#fff, #16181b);
  --dot: light-dark(#8a8a8a, #8f8f8f); --right: light-dark(#0072b2, #6cc0f0);
  --wrong: light-dark(#a84400, #ff9d5c); --line: light-dark(#c9ccd1, #4a4f57); }
body { margin: 0; padding: 12px; font: 14px/1.4 system-ui, sans-serif;
  color: var(--ink); background: var(--ground); }
h1 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 8px; }
/* Columns whose widths no content changes: else dots would move from under the mouse. */
main { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 2fr); gap: 12px; align-items: start; }
@media (max-width: 640px) { main { grid-template-columns: minmax(0, 1fr); } }
#map { width: 100%; border: 1px solid var(--line); touch-action: manipulation; }
#side { overflow-wrap: anywhere; }
circle { fill: var(--dot); stroke: var(--ground); stroke-width: 1; cursor: pointer; }
circle.same { fill: var(--right); }
circle.near.other { fill: var(--wrong); }
circle.chosen { fill: var(--ink); stroke: var(--right); stroke-width: 3; }
circle:focus { outline: none; }
circle:focus-visible { stroke: var(--ink); stroke-width: 4; }
line { stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 5 4; pointer-events: none; }
line.same { stroke: var(--right); stroke-dasharray: none; }
figcaption { min-width: 0; }
figure { margin: 0 0 8px; display: flex; gap: 10px; align-items: start; }
figure img { height: 160px; image-rendering: auto; border: 1px solid var(--line); }
ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 6px; }
li button { font: inherit; font-size: 12px; color: inherit; background: none; width: 92px; padding: 4px;
  border: 2px dashed var(--wrong); cursor: pointer; overflow-wrap: anywhere; }
li button.same { border: 2px solid var(--right); }
li img { display: block; margin: 0 auto; height: 80px; }
button:focus-visible { outline: 3px solid var(--ink); }
#file { font-size: 12px; }
</style>
</head>
<body>
<h1>[[title]]</h1>
<p>Choose a dot: with the mouse, or with Tab, then the arrow keys. Lines lead to its nearest neighbours
by distance between embeddings: ✓ full, the same identity; ✗ dashed, another one. Larger dots: all
images of its identity.</p>
<noscript><p>This page needs JavaScript to show its map.</p></noscript>
<main>
<svg id="map" viewBox="0 0 1000 700" role="group" aria-label="[[title]]"></svg>
<section id="side" aria-live="polite" aria-label="The chosen image"></section>
</main>
<script type="application/json" id="data">[[data]]</script>
<script>
"use strict";
const dots = JSON.parse(document.getElementById("data").textContent);
const map = document.getElementById("map"), side = document.getElementById("side");
const svg = (name, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const html = (name, attributes, ...inside) => {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...inside);
  return made;
};
const lines = map.appendChild(svg("g", {}));
const circles = dots.map((dot, i) => {
  const circle = svg("circle", { cx: dot.x, cy: dot.y, r: 4, tabindex: -1, role: "button",
    "aria-label": dot.text, "data-row": i });
  circle.appendChild(svg("title", {})).textContent = dot.text;
  return map.appendChild(circle);
});
let chosen = -1;
const same = (i, j) => dots[i].pid > 0 && dots[i].pid === dots[j].pid;

function choose(i, focus) {
  if (focus) circles[i].focus();
  if (i === chosen) return;
  if (chosen >= 0) circles[chosen].setAttribute("tabindex", -1);
  chosen = i;
  const dot = dots[i], near = new Set(dot.near);
  circles.forEach((circle, j) => {
    const names = [j === i && "chosen", same(i, j) && "same", near.has(j) && "near",
      near.has(j) && !same(i, j) && "other"].filter(Boolean);
    circle.setAttribute("class", names.join(" "));
    circle.setAttribute("r", j === i ? 10 : same(i, j) || near.has(j) ? 7 : 4);
    circle.setAttribute("aria-pressed", j === i);
  });
  circles[i].setAttribute("tabindex", 0);
  lines.replaceChildren(...dot.near.map((j) => svg("line",
    { x1: dot.x, y1: dot.y, x2: dots[j].x, y2: dots[j].y, class: same(i, j) ? "same" : "other" })));
  const list = html("ol", {});
  dot.near.forEach((j, place) => {
    const sign = same(i, j) ? "✓" : "✗";
    const button = html("button", { type: "button", className: same(i, j) ? "same" : "other" },
      html("img", { src: dots[j].photo, alt: "" }),
      `${sign} ${dots[j].text}, at ${dot.far[place]}`);
    button.addEventListener("click", () => choose(j, true));
    list.append(html("li", {}, button));
  });
  const right = dot.near.filter((j) => same(i, j)).length;
  side.replaceChildren(
    html("figure", {}, html("img", { src: dot.photo, alt: `Photograph: ${dot.text}` }),
      html("figcaption", {}, html("strong", { textContent: dot.text }),
        html("div", { id: "file", textContent: dot.file }))),
    html("p", { textContent: `${right} of its ${dot.near.length} nearest are of the same identity.` }),
    list);
}

// The nearest dot in a direction: its distance counts, and twice as much what it lies aside.
function next(from, dx, dy) {
  let best = from, least = Infinity;
  dots.forEach((dot, j) => {
    const along = (dot.x - dots[from].x) * dx + (dot.y - dots[from].y) * dy;
    const aside = Math.abs((dot.x - dots[from].x) * dy) + Math.abs((dot.y - dots[from].y) * dx);
    if (along > 0 && along + 2 * aside < least) { best = j; least = along + 2 * aside; }
  });
  return best;
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
map.addEventListener("keydown", (event) => {
  const to = event.key in STEPS ? next(chosen, ...STEPS[event.key])
    : event.key === "Home" ? 0 : event.key === "End" ? dots.length - 1 : -1;
  if (to < 0) return;
  event.preventDefault();
  choose(to, true);
});
const row = (event) => event.target.closest("circle")?.dataset.row;
let pinned = false;  // a dot that was clicked stays, until another is clicked
const pin = (event) => {
  const i = row(event);
  pinned = i !== undefined;
  if (pinned) choose(+i, true);
};
map.addEventListener("pointerdown", pin);
map.addEventListener("click", pin);  // what a screen reader sends
map.addEventListener("pointerover", (event) => {
  const i = row(event);
  if (i !== undefined && !pinned && event.pointerType === "mouse") choose(+i, false);
});
map.addEventListener("focusin", (event) => { const i = row(event); if (i !== undefined) choose(+i, false); });
choose(0, false);
</script>
</body>
</html>
"""
