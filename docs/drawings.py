"""The drawings of a triplet, of the network and of the notebooks, as SVG: `python docs/drawings.py`.

One style, light and dark: the file asks the reader's system which of the two it wants. Colours are those
of the figures. The network's shapes are read off the network itself, the margin off the recipe.
"""

import math
from pathlib import Path
from textwrap import wrap

import torch

from reidlib.look.figures import PALETTE
from reidlib.model.network import EmbeddingNet
from reidlib.recipes import make_recipe

DOCS = Path(__file__).resolve().parent
BLUE, ORANGE = PALETTE[:2]
STYLE = f"""
  text {{ font: 15px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }}
  .title {{ font-weight: 600; font-size: 17px; }} .small {{ font-size: 13px; fill: var(--soft); }}
  .middle {{ text-anchor: middle; }} .end {{ text-anchor: end; }}
  .same {{ fill: var(--blue); }} .other {{ fill: var(--orange); }}
  .line {{ fill: none; stroke: var(--soft); stroke-width: 1.5; }}
  .pull {{ fill: none; stroke: var(--blue); stroke-width: 3; }}
  .push {{ fill: none; stroke: var(--orange); stroke-width: 3; stroke-dasharray: 7 5; }}
  .box {{ fill: var(--box); stroke: var(--soft); }} .panel {{ fill: var(--paper); }}
  svg {{ --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --box: #f0f3f6;
        --blue: {BLUE}; --orange: {ORANGE}; }}
  @media (prefers-color-scheme: dark) {{
    svg {{ --ink: #e6edf3; --soft: #9ea7b1; --paper: #161b22; --box: #22272e;
          --blue: #56b4e9; --orange: #ff9f5a; }}
  }}"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of words; `kind` names classes of the style."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def line(x: float, y: float, to_x: float, to_y: float, kind: str, arrow: bool = True) -> str:
    """A straight line, with a head unless `arrow` is False."""
    mark = f' marker-end="url(#{kind})"' if arrow else ""
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" class="{kind}"{mark}/>'


def box(x: float, y: float, width: float, height: float, lines: list[str]) -> str:
    """A box with its words in the middle, the first of them strong."""
    top = y + height / 2 - 10 * (len(lines) - 1) + 5
    kinds = ["middle", *["middle small"] * (len(lines) - 1)]
    words = [text(x + width / 2, top + 20 * i, line, kinds[i]) for i, line in enumerate(lines)]
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" class="box"/>'
    return shape + "".join(words)


def person(x: float, y: float, kind: str) -> str:
    """A person of the colour `kind`, whose middle is at (x, y)."""
    body = f"M{x - 13} {y + 27} v-20 a13 13 0 0 1 26 0 v20 z"
    return f'<g class="{kind}"><circle cx="{x}" cy="{y - 18}" r="9"/><path d="{body}"/></g>'


def write(name: str, width: int, height: int, title: str, parts: list[str]) -> None:
    """Put the parts on a panel and write `name`.svg; `title` is what a screen reader says."""
    heads = "".join(
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="{size}" '
        f'markerHeight="{size}" orient="auto-start-reverse">'
        f'<path d="M0 0L10 5L0 10z" fill="var({colour})"/></marker>'
        for kind, size, colour in [
            ("line", 8, "--soft"),
            ("pull", 4, "--blue"),
            ("push", 4, "--orange"),
        ]
    )
    panel = f'<rect width="{width}" height="{height}" rx="12" class="panel"/>'
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    inner = "\n".join(
        [
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{heads}</defs>",
            panel,
            *parts,
        ]
    )
    (DOCS / f"{name}.svg").write_text(f"{head}\n{inner}\n</svg>\n", encoding="utf-8")


def triplet() -> list[str]:
    """An anchor, its positive and its negative, before and after; and what a margin asks."""
    parts = [
        text(24, 36, "A triplet, before training", "title"),
        text(364, 36, "and after", "title"),
    ]
    for left, positive, negative in [(0, (236, 148), (158, 246)), (340, (180, 148), (268, 222))]:
        for words, (x, y) in {"anchor": (110, 160), "positive": positive}.items():
            parts += [person(left + x, y, "same"), text(left + x, y - 34, words, "middle")]
        x, y = negative
        parts += [person(left + x, y, "other"), text(left + x, y + 46, "negative", "middle")]
    parts += [
        line(216, 150, 134, 158, "pull"),
        text(174, 142, "pull", "middle"),
        text(174, 178, "d⁺", "middle"),
    ]
    parts += [
        line(118, 192, 146, 226, "push"),
        text(140, 204, "push"),
        text(108, 222, "d⁻", "middle"),
    ]
    for radius, dash in [(71, "none"), (97, "3 5")]:
        parts.append(
            f'<circle cx="450" cy="160" r="{radius}" class="line" stroke-dasharray="{dash}"/>'
        )
    parts += [text(450, 226, "d⁺", "middle small"), text(450, 250, "m", "middle small")]
    said = [
        (24, "Same person: come nearer.", "Another person: go away."),
        (364, "The negative is farther than the", "positive, by the margin m: done."),
    ]
    return parts + [
        text(x, y, words, "small")
        for x, *both in said
        for y, words in zip((326, 344), both, strict=True)
    ]


def losses(left: float, margin: float) -> list[str]:
    """The hard and the soft margin over d⁺ − d⁻, drawn by their formulas."""
    low, high, scale = -2.0, 2.0, 60.0
    at = lambda x, y: (left + 24 + (x - low) * scale, 276 - y * scale)  # noqa: E731
    steps = [low + (high - low) * i / 60 for i in range(61)]
    curve = lambda loss: "M" + "L".join("{:.1f} {:.1f}".format(*at(x, loss(x))) for x in steps)  # noqa: E731
    hard, soft = (lambda x: max(0.0, margin + x)), (lambda x: math.log1p(math.exp(x)))
    (x0, y0), (x1, _), (zero, _), (kink, _) = at(low, 0), at(high, 0), at(0, 0), at(-margin, 0)
    return [
        text(left + 24, 36, "Loss of a triplet", "title"),
        line(x0, y0, x1 + 8, y0, "line"),
        line(zero, y0 + 6, zero, 124, "line", arrow=False),
        f'<path d="{curve(hard)}" class="pull"/>',
        f'<path d="{curve(soft)}" class="push"/>',
        line(left + 24, 62, left + 54, 62, "pull", arrow=False),
        text(left + 62, 67, "hard: max(0, m + d⁺ − d⁻)"),
        line(left + 24, 86, left + 54, 86, "push", arrow=False),
        text(left + 62, 91, "soft: softplus(d⁺ − d⁻)"),
        text(kink + 6, y0 + 20, "−m", "end small"),
        text(zero + 2, y0 + 20, "0", "small"),
        text(x1 + 4, y0 + 20, "d⁺ − d⁻", "end small"),
        text(left + 24, 326, f"Hard (here m = {margin:g}): zero once m is kept.", "small"),
        text(left + 24, 344, "Soft: never zero, so it always pulls a little.", "small"),
    ]


def network() -> list[str]:
    """The paper's network, with the shape between every two parts as the network itself gives it."""
    recipe = make_recipe("trinet")
    net = EmbeddingNet(
        recipe.backbone, recipe.dim, recipe.hidden, recipe.last_stride, recipe.head
    ).eval()
    images = torch.zeros(1, 3, recipe.height, recipe.width)
    with torch.inference_mode():
        features = net.backbone(images)
        shapes = [images, features, features.mean(dim=(2, 3))]
        for part in net.head:
            shapes.append(part(shapes[-1]))
    said = [" × ".join(["B", *map(str, shape.shape[1:])]) for shape in shapes]
    parts, x = (
        [
            text(24, 36, "The network", "title"),
            text(
                24,
                58,
                "Under each part: the shape of what it gives, for a batch of B images.",
                "small",
            ),
        ],
        24,
    )
    boxes = [
        (["images", "normalised"], 124, said[0]),
        (["ResNet-50", "ImageNet weights"], 148, said[1]),
        (["average", "over the map"], 116, said[2]),
        (["Linear"], 82, said[3]),
        (["BatchNorm", "ReLU"], 104, said[5]),
        (["Linear"], 82, said[6]),
        (["distances", "of all pairs"], 120, "B × B"),
    ]
    for i, (words, width, shape) in enumerate(boxes):
        parts += [box(x, 84, width, 66, words), text(x + width / 2, 174, shape, "middle small")]
        if i + 1 < len(boxes):
            parts.append(line(x + width + 4, 117, x + width + 24, 117, "line"))
        x += width + 28
    head = 24 + 124 + 28 + 148 + 28 + 116 + 28
    parts.append(f'<path d="M{head} 190 v8 h{82 + 28 + 104 + 28 + 82} v-8" class="line"/>')
    parts.append(
        text(head + 162, 216, "the head; other backbones keep it, or leave it out", "middle small")
    )
    return parts


def notebooks() -> list[str]:
    """The course in its order, what it leaves behind, and the tools that start from there."""
    names = sorted(path.stem for path in (DOCS.parent / "notebooks").glob("[0-9]*.ipynb"))
    course = [name for name in names if name < "10"]
    parts = [text(24, 36, "The course, in order", "title")]
    parts += [text(24, 208, "The tools, in any order: each opens a trained run", "title")]
    for row, y in [(course, 56), (names[len(course) :], 226)]:
        for i, name in enumerate(row):
            number, words = name.split("_", 1)
            parts.append(
                box(24 + 130 * i, y, 106, 84, [number, *wrap(words.replace("_", " "), 12)])
            )
            if row is course and i:
                parts.append(line(24 + 130 * i - 20, y + 42, 24 + 130 * i - 2, y + 42, "line"))
    trains = 77 + 130 * course.index("03_train")
    parts += [
        line(trains, 144, trains, 180, "pull"),
        text(trains + 14, 166, "a run: weights, scores, ranked lists", "small"),
    ]
    return parts


if __name__ == "__main__":
    margin = make_recipe("plain").margin
    words = "A triplet before and after training, and its loss with a hard and a soft margin"
    write("triplet", 1040, 364, words, [*triplet(), *losses(690, margin)])
    words = "The network: ResNet-50, average pooling, Linear, BatchNorm, ReLU, Linear"
    write("network", 1040, 236, words, network())
    words = "The notebooks: a course, and tools that open a trained run"
    write("notebooks", 940, 334, words, notebooks())
