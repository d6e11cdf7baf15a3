"""Figures hold what they should: looked at as matplotlib's objects, and as the bytes that leave."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import figures, photographs
from reidlib.look.figures import EXCLUDED, PLAIN, QUERY, RIGHT, WRONG
from reidlib.recipes import make_recipe


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        figures.use_style()
        yield


@pytest.fixture
def photos():
    """Twelve smooth pictures with a little noise, as photographs are."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 128)[:, None, None] + np.zeros((1, 64, 3))
    return [(ramp + rng.integers(0, 40, (128, 64, 3))).astype(np.uint8) for _ in range(12)]


def frames(axes):
    """The frames of photographs: (colour, line style) in the order they were drawn."""
    found = [p for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]
    return [(to_hex(p.get_edgecolor()), p.get_linestyle()) for p in found]


def texts(axes):
    return [t.get_text() for t in axes.texts if t.get_text()]


def drawn_photos(axes):
    return [child for child in axes.get_children() if isinstance(child, AxesImage)]


def inside(figure):
    """Whether all texts of a sheet lie inside the figure."""
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    return all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 + 1 for b in boxes)


# --- leaving


def test_marks_differ_in_more_than_colour():
    for field in ("colour", "sign", "line"):
        assert len({getattr(mark, field) for mark in (RIGHT, WRONG, EXCLUDED)}) == 3
    assert len(set(figures.PALETTE)) == len(figures.LINES) == 7
    assert len(set(figures.MARKERS)) == 10
    again = [{figures.MARKERS[i], figures.MARKERS[i + 7]} for i in range(3)]  # of the same colour
    alike = [set("dD"), set("hHo8p"), set("Xx"), set("P+")]
    assert not any(pair <= one for pair in again for one in alike)


def contrast(a, b):
    """WCAG's contrast of two colours, (3,) of 0 to 1."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (a, b)]
    dark, light = sorted(c @ [0.2126, 0.7152, 0.0722] for c in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", [*figures.PALETTE, EXCLUDED.colour])
def test_inks_stand_out_in_light_and_in_dark(colour):
    """3 to 1, as WCAG asks of what is no text; print is black. The filter's matrix is the browsers'."""
    ink, hue = np.array(to_rgb(colour)), np.array([0.213, 0.715, 0.072])
    invert = float(re.search(r"invert\(([\d.]+)\)", figures.DARK)[1])
    turned = 2 * np.outer(np.ones(3), hue) - np.eye(3)  # hue-rotate(180deg) keeps grey as it is
    on_dark = np.clip(turned @ (ink + invert * (1 - 2 * ink)), 0, 1)
    assert contrast(ink, np.ones(3)) >= 3
    assert contrast(on_dark, np.array(to_rgb("#111111"))) >= 3


def drawings(history, photos):
    """One of each kind of figure."""
    number, pids = np.arange(40.0), np.arange(40) % 12
    table = pd.DataFrame(np.arange(36.0).reshape(6, 6))
    interval = pd.DataFrame({"value": [0.1], "low": [0], "high": [1]}, index=["a"])
    per_query = pd.DataFrame({"camid": range(6), "AP": 0.5})
    yield figures.curves({str(i): (number, number) for i in range(8)}, "x", "y")
    yield figures.camera_bars(per_query)
    yield figures.training_curves(history, make_recipe("demo"))
    yield figures.side_by_side({str(i): history for i in range(4)})
    yield figures.intervals({"a": interval, "b": interval, "c": interval})
    yield figures.distance_histograms(number, number)
    yield figures.heat_maps({"a": (table, "{:.1f}"), "b": (table, "{:.0f}")})
    yield photographs.photo_grid(photos, ["c1 id 3"] * 12, columns=4)
    yield photographs.photo_grid(photos, ["c1 id 3"] * 12, columns=12, row_titles=["a person"])
    yield photographs.embedding_map(np.c_[number, -number], pids, photos[:1] * 40)


def test_print_is_large_enough_where_a_page_shows_a_figure_800_pixels_wide(history, photos):
    for figure in drawings(history, photos):
        figure.draw_without_rendering()
        written = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
        points = min(t.get_fontsize() for t in written)
        scale = min(1, 8 / figure.get_figwidth())
        assert points / 72 * 100 * scale >= 9, [t.get_text() for t in written]


def test_show_gives_an_image_with_escaped_alt_text(monkeypatch, photos):
    """The bundle goes through JSON and its image decodes: what an executed notebook stores."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    figures.show(photographs.photo_grid(photos), 'A "grid" of <12> & more', photo=True)
    (bundle, raw) = shown.pop()
    page = json.loads(json.dumps(bundle))["text/html"]
    assert raw and 'alt="A &quot;grid&quot; of &lt;12&gt; &amp; more"' in page
    assert 'src="data:image/jpeg;base64,/9j/' in page and page.count("<img") == 1
    assert '"grid"' in bundle["text/plain"]
    figures.show(figures.curves({"a": ([1, 2], [1, 2])}, "x", "y"), "A line from 1 to 2.")
    with pytest.raises(ValueError, match="66,000 pixels on a side: show fewer"):
        figures.encode(figures.Figure(figsize=(1, 440)), photo=True)
    page = shown.pop()[0]["text/html"]
    data = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", page)[1])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and image.size == (1350, 540)
    assert 'width="900"' in page
    with pytest.raises(ValueError, match="alt text"):
        figures.show(photographs.photo_grid(photos), " ")


def test_save_chooses_the_format_by_name(tmp_path, photos):
    figure = photographs.photo_grid(photos)
    sizes = []
    for file, kind in ((tmp_path / "a.jpg", "JPEG"), (tmp_path / "a.png", "PNG")):
        figures.save(figure, file)
        sizes.append(file.stat().st_size)
        with Image.open(file) as image:
            assert image.format == kind and image.getpixel((1, 1))[:3] == (255, 255, 255)
            assert image.size == pytest.approx(150 * figure.get_size_inches(), abs=1)
    assert sizes[0] < 0.4 * sizes[1], "photographs are small as JPEG"


@pytest.mark.slow
def test_runs_without_a_screen_and_without_pyplot():
    code = (
        "import sys, numpy as np; from reidlib.look import figures, photographs; figures.use_style();"
        "f = photographs.photo_grid([np.zeros((8, 4, 3), np.uint8)]);"
        "print(len(figures.encode(f)), 'matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[1] == "False"


# --- photographs


def test_photo_grid_draws_each_photograph_once_in_reading_order(photos):
    marks = [RIGHT] * 3 + [WRONG] * 2 + [EXCLUDED] + [PLAIN] * 6
    titles = [f"t{i}" for i in range(12)]
    figure = photographs.photo_grid(photos, titles, 5, marks, row_titles=["a", "b", "c"])
    axes = figure.axes[0]
    drawn = drawn_photos(axes)
    assert all(np.array_equal(d.get_array(), p) for d, p in zip(drawn, photos, strict=True))
    lefts = [d.get_extent()[0] for d in drawn]
    tops = [d.get_extent()[3] for d in drawn]
    assert lefts[:5] == sorted(lefts[:5]) and lefts[5] == lefts[0]
    assert tops[0] == tops[4] < tops[5] < tops[10]
    assert frames(axes) == [(m.colour.lower(), m.line) for m in marks if m != PLAIN]
    assert {"✓ t0", "✗ t3", "– t5", "t6", "a", "c"} <= set(texts(axes))
    assert drawn[5].get_alpha() < 0.5 and drawn[0].get_alpha() == 1
    assert inside(figure)


def test_photographs_that_belong_together_stand_together(photos):
    figure = photographs.photo_grid(photos, columns=6, together=2)
    ends = [photo.get_extent()[:2] for photo in drawn_photos(figure.axes[0])]
    gaps = [ends[i + 1][0] - ends[i][1] for i in range(5)]
    assert min(gaps[1], gaps[3]) > 2 * max(gaps[0], gaps[2], gaps[4])
    assert ends[5][1] < figure.get_figwidth() and ends[6:] == ends[:6]


def test_photographs_keep_their_proportions():
    wide, tall = np.zeros((50, 100, 3), np.uint8), np.zeros((100, 25, 3), np.uint8)
    for photo in drawn_photos(photographs.photo_grid([wide, tall], height=1).axes[0]):
        x0, x1, y1, y0 = photo.get_extent()
        rows, columns = photo.get_array().shape[:2]
        assert (x1 - x0) / (y1 - y0) == pytest.approx(columns / rows)
        assert y1 - y0 <= 1.001 and x1 - x0 <= 2.001  # no larger than its place


def test_photo_grid_leaves_gaps(photos):
    figure = photographs.photo_grid([None, photos[0], photos[1]], ["a", "b", "c"], columns=2)
    drawn = drawn_photos(figure.axes[0])
    assert len(drawn) == 2 and texts(figure.axes[0]) == ["b", "c"]
    assert drawn[0].get_extent()[0] > drawn[1].get_extent()[0]


@pytest.mark.parametrize("wrong", [{"titles": ["a"]}, {"marks": [RIGHT]}, {"row_titles": ["a"]}])
def test_photo_grid_refuses_lists_that_do_not_fit(photos, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        photographs.photo_grid(photos, **wrong)
    for nothing in ([None], []):
        with pytest.raises(ValueError, match="no photographs"):
            photographs.photo_grid(nothing)


# --- ranked lists


@pytest.fixture
def row(tmp_path, photos):
    """A ranked list: one match, two wrong ones, and three excluded, two of them side by side."""
    paths = [str(tmp_path / f"{i}.png") for i in range(7)]
    for path, photo in zip(paths, photos, strict=False):
        Image.fromarray(photo).save(path)
    results = pd.DataFrame({"rank": pd.array([None, 1, None, None, 2, 3], dtype="Int64")})
    results = results.assign(gallery=range(6), path=paths[1:], pid=[7, 7, -1, 7, 9, 0])
    results["camid"], results["distance"] = [1, 2, 3, 1, 4, 5], [0.1, 0.25, 0.3, 0.4, 1.0, 12.345]
    results["status"] = ["same camera", "match", "junk", "same camera", "wrong", "wrong"]
    return photographs.RankedRow("Query 3, camera 1", paths[0], results)


@pytest.fixture
def said(row):
    """What is written when a ranked list has other results."""
    draw = lambda results: photographs.ranked_lists([row._replace(results=results)])
    return lambda results: texts(draw(results).axes[0])


def test_ranked_lists_mark_each_result_by_frame_sign_and_words(row, photos):
    figure = photographs.ranked_lists([row, row])
    axes = figure.axes[0]
    order = [QUERY, EXCLUDED, RIGHT, EXCLUDED, WRONG, WRONG]
    assert frames(axes) == 2 * [(m.colour.lower(), m.line) for m in order]
    drawn = drawn_photos(axes)
    assert len(drawn) == 12
    # query, then the images in their order; of two excluded ones side by side the nearer
    for photo, i in zip(drawn[:6], (0, 1, 2, 3, 5, 6), strict=True):
        assert np.array_equal(photo.get_array(), photos[i])
    assert [d.get_alpha() < 0.5 for d in drawn[:6]] == [m == EXCLUDED for m in order]
    words = texts(axes)
    assert words.count("Query 3, camera 1") == 2
    assert {"✓ 1", "✗ 2", "✗ 3", "query"} <= set(words)
    assert {"c2 id 7\n0.250", "c4 id 9\n1.00", "distractor\nc5 12.3"} <= set(words)
    assert {"–\nsame\ncamera", "–\njunk\nsame\ncamera"} <= set(words)
    assert inside(figure)
    for nothing in ([], [row._replace(results=row.results.iloc[:0])]):
        with pytest.raises(ValueError, match="nothing to draw"):
            photographs.ranked_lists(nothing)


def test_ranked_lists_state_the_ap_of_what_they_list(row, said):
    assert "AP 100.00\xa0% of 1 match, ranks: 1" in said(row.results)
    last = row.results.iloc[[1, 1]].assign(rank=pd.array([5, 1200], dtype="Int64"))
    words = said(pd.concat([row.results, last], ignore_index=True))
    # (1/1 + 2/5 + 3/1200) / 3
    assert "AP 46.75\xa0% of 3 matches, ranks: 1     not shown: 2, at 5, 1,200" in words
    assert "✓ 5" not in words and "✓ 1200" not in words, "missed matches are not in the list"
    # A missed match whose rank happens to follow on is one that the list shows.
    words = said(pd.concat([row.results, last.iloc[:1].assign(rank=4)], ignore_index=True))
    assert "AP 75.00\xa0% of 2 matches, ranks: 1, 4" in words and "✓ 4" in words
    for n, listed in ((10, "8, 9, 10"), (11, "8, … 11")):  # never one alone is left out
        many = row.results.iloc[[1] * n].assign(rank=pd.array(range(1, n + 1), dtype="Int64"))
        assert f"AP 100.00\xa0% of {n} matches, ranks: 1, 2, 3, 4, 5, 6, 7, {listed}" in said(many)
    nothing = row.results.replace({"status": {"match": "wrong"}})
    assert "no match in the gallery: not scored" in said(nothing)
    unknown = row.results.replace({"status": {"match": "unknown", "wrong": "unknown"}})
    assert not any("AP" in word or "✓" in word or "✗" in word for word in said(unknown))


def test_ranked_lists_state_no_ap_of_half_a_list(row, said):
    query = pd.DataFrame({"pid": [1], "camid": [1], "path": [row.results["path"][0]]})
    gallery = pd.DataFrame({"pid": [2, 1, 2, 1], "camid": 2, "path": row.results["path"][1:5]})
    found = Retrieval([[0.0]], query, [[1.0], [2.0], [3.0], [4.0]], gallery)
    with pytest.raises(ValueError, match="show_missed=True"):
        said(found.ranked_list(0, topk=2))
    for whole in ({"topk": 2, "show_missed": True}, {"topk": None}):
        words = said(found.ranked_list(0, **whole))
        assert any(word.startswith("AP 50.00\xa0% of 2 matches") for word in words)


def test_ranked_lists_count_a_run_and_leave_unknown_cameras_out(row, said):
    results = pd.concat([row.results.iloc[[2, 2, 2]], row.results.iloc[[4]]], ignore_index=True)
    results["camid"], results.loc[3, "rank"] = -1, 1
    words = said(results)
    assert "–\njunk ×3" in words and "id 9\n1.00" in words
    assert not any("c-1" in word for word in words)


def test_a_long_ranked_list_is_broken_into_lines(row):
    results = row.results.iloc[[0, *[4] * 40]].reset_index(drop=True)
    results["rank"] = pd.array([None, *range(1, 41)], dtype="Int64")
    figure = photographs.ranked_lists([row._replace(results=results), row])
    assert figure.get_figwidth() <= photographs.PAGE + 0.1 and inside(figure)
    places = [i.get_extent() for i in drawn_photos(figure.axes[0])[1:42]]  # without the query
    tops = sorted({place[3] for place in places[1:]})
    assert len(tops) == 5 and max(place[2] for place in places) < figure.get_figheight()
    starts = [min(p[0] for p in places if p[2] == bottom) for bottom in {p[2] for p in places}]
    assert np.ptp(starts) < 0.1, "all lines start below each other"
    in_order = [(p[2], p[0]) for p in places]
    assert in_order == sorted(in_order), "read like text"
    words = texts(figure.axes[0])
    assert [word for word in words if word.startswith("✗")][:40] == [f"✗ {i}" for i in range(1, 41)]


def test_a_list_of_known_length_fills_its_line_and_counts_what_is_not_shown(row):
    results = row.results.iloc[[0, *[1] * 12]].reset_index(drop=True)
    results["rank"] = pd.array([None, *range(1, 13)], dtype="Int64")
    figure = photographs.ranked_lists([row._replace(results=results, topk=10)])
    assert len(drawn_photos(figure.axes[0])) == 1 + photographs.COLUMNS and inside(figure)
    (account,) = [word for word in texts(figure.axes[0]) if word.startswith("AP")]
    assert account.endswith("6, 7, 8, 9     not shown: 3, at 10, 11, 12")
    smallest = min(text.get_fontsize() for text in figure.axes[0].texts)
    assert smallest / 72 * 800 / figure.get_figwidth() >= 9, "pixels, at 800 across"


def test_results_of_nobody_known_carry_their_file_names(row):
    results = row.results.assign(pid=-1, camid=-1)
    results["status"] = results["status"].replace(["match", "wrong"], "unknown")
    path = Path(results["path"][1])
    results.loc[1, "path"] = str(path.rename(path.with_name("$x_1$ " + 30 * "y" + ".png")))
    figure = photographs.ranked_lists([row._replace(results=results)])
    words = texts(figure.axes[0])
    assert "5\n1.00" in words and r"\$x_1…yyyy" in [w.split("\n")[0] for w in words]
    assert inside(figure)
    assert any("its file" in word for word in words)


def test_examples_are_the_best_the_median_and_the_worst_queries(row):
    paths = row.results["path"]
    query = pd.DataFrame({"pid": range(1, 7), "camid": [1, 1, 1, 1, 1, 3], "path": paths})
    gallery = pd.DataFrame({"pid": [1, 2, 3, 4, 5, 9], "camid": 2, "path": paths[::-1]})
    # The match of query i, from 0, is at rank i + 1; of the last there is none.
    distances = np.sign(np.arange(6) - np.arange(6)[:, None])
    found = Retrieval.from_distances(distances, query, gallery)
    examples = photographs.ranked_examples(found, lists=2, topk=3)
    assert [one.title for one in examples] == [
        *("best: identity 1, camera 1", "best: identity 2, camera 1"),
        "median: identity 3, camera 1",
        *("worst: identity 5, camera 1", "worst: identity 4, camera 1"),
    ]
    assert [one.query for one in examples] == [paths[i] for i in (0, 1, 2, 4, 3)]
    assert [len(one.results) for one in examples] == [3, 3, 3, 4, 4], "three, and what is missed"
    assert photographs.ranked_lists(examples)
    assert len(photographs.ranked_examples(found, lists=9)) == 5, "there are five to choose from"
    bare = [table.drop(columns="camid") for table in (query, gallery)]
    unknown = Retrieval.from_distances(distances, bare[0].assign(pid=0), bare[1])
    twice = (table.assign(pid=table["pid"].replace(2, 1)) for table in (query, gallery))
    best, other, *_ = photographs.ranked_examples(Retrieval.from_distances(distances, *twice), 2)
    assert (best.title, other.title) == ("best: identity 1, camera 1", "best: identity 3, camera 1")
    assert photographs.ranked_row(unknown, 5).title == "somebody unknown"
    assert photographs.ranked_row(found, 5, "lost").title == "lost: identity 6, camera 3"


# --- curves


@pytest.fixture
def history():
    step = np.array([1, 20, 40, 60])
    columns = {"step": step, "loss": 1 / step, "active": 0.5, "lr": [1e-3, 1e-3, 1e-4, 1e-5]}
    columns |= {"norm": 3.0, "images_per_s": 90.0, "held_out_mAP": [np.nan, 0.3, np.nan, 0.5]}
    for p in (5, 50, 95):
        columns |= {f"positive_p{p}": float(p), f"negative_p{p}": 2.0 * p}
    return pd.DataFrame(columns | {"held_out_top1": [np.nan, 0.4, np.nan, 0.6]})


@pytest.fixture
def without(history):
    """A history of a run that holds nobody out."""
    return history.drop(columns=["held_out_mAP", "held_out_top1"])


def drawn_panels(history, **changes):
    axes = figures.training_curves(history, make_recipe("demo", **changes)).axes
    return {one.get_title(loc="left"): one for one in axes}


def test_training_curves_show_every_sign_of_health(history):
    panels = drawn_panels(history)
    loss, collapse = panels["loss"].lines
    assert np.array_equal(loss.get_ydata(), history.loss)
    assert collapse.get_ydata()[0] == pytest.approx(math.log(2))
    assert "ln 2" in collapse.get_label() and collapse.get_linestyle() == "--"
    positives, negatives = panels["distances: median, 5–95 %"].lines
    assert (positives.get_ydata() == 50).all() and (negatives.get_ydata() == 100).all()
    assert positives.get_linestyle() != negatives.get_linestyle()
    assert len(panels["distances: median, 5–95 %"].collections) == 2  # the bands
    assert panels["learning rate"].get_yscale() == "log"
    held_out = panels["held-out identities, %"].lines
    assert [list(line.get_ydata()) for line in held_out] == [[30, 50], [40, 60]]
    assert list(held_out[0].get_xdata()) == [20, 60]


def test_training_curves_of_a_margin_and_without_held_out_identities(without):
    panels = drawn_panels(without.assign(lr=1e-3), margin=0.2)
    assert panels["loss"].lines[1].get_ydata()[0] == 0.2
    assert (panels["images per second"].lines[0].get_ydata() == 90).all()
    assert panels["learning rate"].get_yscale() == "linear"
    with pytest.raises(ValueError, match="empty"):
        drawn_panels(without.iloc[:0])


def test_histories_side_by_side_have_a_row_of_held_out_scores_where_there_are_any(history, without):
    for second, rows in ((without, 4), (history, 5)):
        axes = np.reshape(figures.side_by_side({"a": without, "b": second}).axes, (rows, 2))
        assert [panel.get_title(loc="left") for panel in axes[0]] == ["a", "b"]
        assert [panel.get_xlabel() for panel in axes[-1]] == ["step", "step"]
        assert all(panel.get_ylabel() for panel in axes[:, 0])
    assert len(axes[4, 0].lines) == 0
    assert list(axes[4, 1].lines[0].get_ydata()) == [30, 50]
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.side_by_side({"a": history.iloc[:0]})


def test_curves_differ_in_colour_and_line(history):
    figure = figures.curves({str(i): ([0, 1], [i, i]) for i in range(20)}, "x", "y")
    lines = figure.axes[0].lines
    dashes = [line._dash_pattern[1] and tuple(line._dash_pattern[1]) for line in lines]
    assert len({(line.get_color(), dash) for line, dash in zip(lines, dashes, strict=True)}) == 20
    assert len(figure.axes[0].get_legend().get_texts()) == 20


def test_cmc_counts_first_matches_and_leaves_out_queries_without():
    (line,) = figures.cmc_curve({"a": [1, 1, 3, np.nan, 30]}, up_to=4).axes[0].lines
    assert line.get_xydata().tolist() == [[1, 50], [2, 50], [3, 75], [4, 75]]


def test_bars_of_each_camera_are_means_of_its_queries():
    per_query = pd.DataFrame({"camid": [1, 1, 2, 3], "AP": [0.2, 0.4, 0.9, np.nan]})
    axes = figures.camera_bars(per_query).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([30, 90])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    axes = figures.camera_bars(per_query.assign(camid=-1)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unknown"]
    in_words = figures.hardest_camera(per_query)
    assert "camera 1 are hardest (30.0% mAP over 2 queries), those of camera 2 easiest" in in_words
    assert "cannot be compared" in figures.hardest_camera(per_query[:2])
    assert "the same mAP, 100.0%" in figures.hardest_camera(per_query.assign(AP=1.0))


def test_distance_histograms_are_densities_and_name_their_overlap():
    figure = figures.distance_histograms([0, 1, 1, 2], np.repeat([0.0, 2.0, 3.0, 4.0], 100))
    filled_a, line_a, _, line_b, both = figure.axes[0].patches
    for stairs in (filled_a, line_b):
        values, edges, _ = stairs.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    # a quarter of each at 0, another at 2
    assert both.get_label() == "overlap: 50% of the area"
    assert line_a.get_linestyle() != line_b.get_linestyle()
    assert line_a.get_edgecolor() != line_b.get_edgecolor()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1 and legend.x1 <= figure.bbox.x1


def test_embedding_map_highlights_the_largest_identities(photos):
    pids = np.repeat([-1, 0, 5, 6, 7], [3, 3, 2, 1, 3])
    points = np.random.default_rng(0).normal(size=(12, 2))
    figure = photographs.embedding_map(points, pids, photos)
    legend, axes = figure.axes
    everything, *identities = axes.lines
    assert len(everything.get_xdata()) == 12
    assert texts(legend) == ["id 7", "id 5", "id 6"]
    assert [len(line.get_xdata()) for line in identities] == [3, 2, 1]
    assert len({(line.get_color(), line.get_marker()) for line in identities}) == 3
    for photo, pid in zip(drawn_photos(legend), (7, 5, 6), strict=True):
        its = np.flatnonzero(pids == pid)
        assert any(np.array_equal(photo.get_array(), photos[i]) for i in its)
    for wrong in ((points[:5], pids, photos), (points, pids, photos[:2])):
        with pytest.raises(ValueError, match="12 pids"):
            photographs.embedding_map(*wrong)


def test_heat_map_writes_each_number_in_its_cell():
    table = pd.DataFrame([[1, 2], [np.nan, 40]], index=["a", "b"], columns=["c", "d"])
    table.columns.name = "camera"
    first, axes = figures.heat_maps({"a": (-table / 2, "{:.1f}"), "b": (table, "{:.0f}")}).axes
    assert {t.get_text() for t in first.texts} == {"−0.5", "−1.0", "−20.0"}
    assert first.get_position().x1 < axes.get_position().x0
    cells = {(t.get_position(), t.get_text()) for t in axes.texts}
    assert cells == {((0, 0), "1"), ((1, 0), "2"), ((1, 1), "40")}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["c", "d"]
    assert axes.get_xlabel() == "camera"
    dark, pale = (next(t for t in axes.texts if t.get_text() == n) for n in ("40", "1"))
    assert (dark.get_color(), pale.get_color()) == ("white", "black")
