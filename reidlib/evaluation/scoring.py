"""A run, opened and scored: its embeddings on disk, its scores, how sure they are, what they beat.

Notebooks, the shell, comparisons and releases all score here, so one run has one score.
"""

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from reidlib import runs
from reidlib.data.check import on_both_sides
from reidlib.data.pixels import load_images
from reidlib.data.tables import Dataset, fingerprint, hold_out, load
from reidlib.evaluation.baselines import score_baselines
from reidlib.evaluation.intervals import confidence_interval
from reidlib.evaluation.leaks import copied_queries
from reidlib.evaluation.metrics import SCORES, Evaluation
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.device import pick_device
from reidlib.model.embed import embed_views
from reidlib.model.network import EmbeddingNet
from reidlib.model.stored import read_embeddings, write_embeddings
from reidlib.model.weights import load_model
from reidlib.recipes import Recipe, listed, located, stored_recipe

PER_QUERY = {"test": "per_query.csv", "held_out": "per_query_held_out.csv"}  # in a run, by split


@dataclass(frozen=True, eq=False)
class OpenRun:
    """A trained run beside the people that it is asked about."""

    folder: Path
    model: EmbeddingNet  # on its device
    data: Dataset
    query: pd.DataFrame  # Q rows
    gallery: pd.DataFrame  # G rows
    query_pixels: np.ndarray  # (Q, H, W, 3) uint8
    gallery_pixels: np.ndarray  # (G, H, W, 3) uint8
    split: str  # "test" or "held_out"
    own: bool  # is this the data set that the run was trained on?
    weights_sha256: str  # of the file that the model is from
    exclude_same_camera: bool = True  # as in `Retrieval`
    left_out: int = 0  # images that cannot be read, where that was to be passed over
    _made: dict = field(default_factory=dict, init=False, repr=False)  # embeddings by view

    @property
    def recipe(self) -> Recipe:
        """The settings of the run."""
        return self.model.recipe

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def test_data(self) -> str:
        """The fingerprint of the data set."""
        return fingerprint(self.data)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the data set, and on what a score on it is worth."""
        said = [*self.data.notes, on_both_sides(self.data) if self.own else ""]
        if not self.own:
            several = {*listed(self.recipe.dataset)}
            trained = len(several) > 1 and several & {self.data.name, str(self.data.root)}
            of = "one of the data sets" if trained else "not the data set"
            said.append(
                f"{self.data.name} in {self.data.root} is {of} that {self.folder.name} was trained on: "
                f"results on it are kept apart, in {self.place().name}/."
            )
        if self.left_out:
            said.append(f"{self.left_out:,} images cannot be read: all results are without them.")
        return tuple(filter(None, said))

    def place(self, precision: str = "float32") -> Path:
        """Return where the results are kept: the run's folder, or for another data set, for another
        precision than float32, with matches by the query's own camera, or without images that cannot
        be read, a folder in it. So no result replaces one of something else.
        """
        named = [] if self.own else [f"on_{self.data.name}_{self.test_data[:8]}"]
        named += ["same_camera"] * (not self.exclude_same_camera)
        named += ["readable"] * (self.left_out > 0)
        return self.folder / "_".join(named + [precision] * (precision != "float32"))

    def embeddings(
        self, *, flip: bool = False, precision: str = "float32", show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of queries (Q, D) and gallery (G, D), float32.

        Those that `score_run` kept are read again, if they are of these very weights and images and
        of this precision, which is that of `embed`. All others are made, once. With `flip` they are
        the mean over each image and its mirror image.
        """
        views = ("plain", "mirrored") if flip else ("plain",)
        by_side = zip(*(self._view(view, precision, show_progress) for view in views), strict=True)
        return tuple(sum(of_side) / len(views) for of_side in by_side)  # as in `embed`

    def retrieval(self, **options) -> Retrieval:
        """Return the queries against the gallery; the options are those of `embeddings`."""
        return self.ranked(*self.embeddings(**options))

    def by_data_set(self, *embs: np.ndarray) -> dict[str, dict[str, float]]:
        """Return the scores on each data set by itself, where there are several, of all with a test."""
        found = {}
        for name in self.data.roots:
            sides = []
            for emb, table in zip(embs, (self.query, self.gallery), strict=True):
                own = (table["dataset"] == name).to_numpy()
                sides += [emb[own], table[own]]
            if all(map(len, sides)):
                retrieval = Retrieval(*sides, exclude_same_camera=self.exclude_same_camera)
                found[name] = retrieval.evaluate().scores
        return found

    def ranked(self, query_emb: np.ndarray, gallery_emb: np.ndarray) -> Retrieval:
        """Return the queries against the gallery by other embeddings, (Q, D) and (G, D)."""
        sides = (query_emb, self.query, gallery_emb, self.gallery)
        return Retrieval(*sides, exclude_same_camera=self.exclude_same_camera)

    def _view(self, view: str, precision: str, show_progress: bool) -> list[np.ndarray]:
        """One of the views of `embed_views`, of both sides."""
        if (view, precision) not in self._made:
            found = self._kept(precision) if view == "plain" else None
            options = {"precision": precision, "show_progress": show_progress}
            self._made[view, precision] = found or [
                embed_views(self.model, pixels, self.recipe, (view,), **options)[view]
                for pixels in (self.query_pixels, self.gallery_pixels)
            ]
        return self._made[view, precision]

    def _kept(self, precision: str) -> list[np.ndarray] | None:
        """Read the run's embedding files; None where one is missing, damaged or of something else."""
        files = [self.place(precision) / f"embeddings_{side}.h5" for side in ("query", "gallery")]
        try:
            embs, tables = zip(*map(read_embeddings, files), strict=True)
        except (OSError, ValueError):
            return None
        columns, about = ["path", "pid", "camid"], self.about(precision).items()
        images = [
            table[columns].to_numpy().tolist() for table in (*tables, self.query, self.gallery)
        ]
        # Files of older versions have no digest: nobody can say whether they are whole.
        theirs = all(about <= t.attrs.items() and "content_sha256" in t.attrs for t in tables)
        return [*embs] if theirs and images[:2] == images[2:] else None

    def about(self, precision: str) -> dict[str, str]:
        """Return what embeddings of this run say of themselves."""
        about = {"weights_sha256": self.weights_sha256, "data": self.test_data}
        return about | {"flip": "False", "precision": precision}


def trained_on(run: Path, recipe: Recipe, data: Dataset) -> bool | None:
    """Return whether a run was trained on a data set's images; None where its manifest does not say."""
    known = runs.read_json(run / "manifest.json", {}).get("train_data")
    if known is None:
        return None
    train = data.train
    try:
        if recipe.hold_out:
            train = hold_out(train, recipe.hold_out, seed=0)[0]
        if recipe.unreadable == "skip":
            train = load_images(train, recipe, show_progress=False, training=True)[1]
    except (OSError, ValueError):  # too few people, or not those that were held out
        return False
    return fingerprint(train) == known


def _is_own(folder: Path, recipe: Recipe, data: Dataset, given: bool) -> bool:
    """Say whether a data set is the run's own, wherever it lies now; `given`: it was asked for by name."""
    same = trained_on(folder, recipe, data)
    here = located(recipe) != recipe  # old runs name what lay in the working directory of then
    if not same or not (given or here):
        return not given if same is None else same
    # Other queries and another gallery may go with the same training images.
    scored = runs.read_json(folder / "metrics.json", {})
    return "mAP" not in scored or scored.get("test_data") == fingerprint(data)


def open_run(
    run: str | Path = "",
    dataset: str | Path | None = None,
    split: str = "test",
    *,
    pattern: str | None = None,
    unreadable: str | None = None,
    exclude_same_camera: bool = True,
    device: str = "auto",
    show_progress: bool = True,
) -> OpenRun:
    """Open a run: its network, and the images that it is to be asked about.

    Args:
        run: a run's name under `outputs/`, or its folder; "" takes the newest.
        dataset: ask about another data set than the run's own; results are kept apart.
        pattern: of that data set's file names, see `load`; None: for the run's own, its recipe's.
        unreadable: `"skip"` leaves broken images out, `"fail"` refuses them; None: as its recipe says.
        exclude_same_camera: False keeps matches from the query's own camera.
        split: `"test"`, or `"held_out"` for the training identities that the run held out.
        device: `"auto"`, `"cpu"`, `"cuda"`, …

    Raises:
        FileNotFoundError: no such run, no weights in it, or no such data set.
        ValueError: a bad `split`, a run that held nobody out, a data set without a test, or images
            that cannot be read.

    >>> run = "outputs/synthetic_batchhard_softplus_example"
    >>> opened = open_run(run, show_progress=False)
    >>> opened.retrieval().evaluate().scores["mAP"] > 0.3
    True
    """
    folder = runs.find_run(run) if run else runs.newest_run()
    model = load_model(folder, pick_device(device))
    asked = unreadable not in (None, model.recipe.unreadable)
    if asked:
        model.recipe = stored_recipe(model.recipe.model_dump() | {"unreadable": unreadable})
    weights = runs.sha256(folder / "weights.safetensors")
    given = dataset not in (None, "", model.recipe.dataset)
    names = pattern or ("" if given else model.recipe.pattern)
    data = load(dataset if given else model.recipe.dataset, pattern=names)
    own = _is_own(folder, model.recipe, data, given)
    tables = data.test if split == "test" else ()
    if split == "held_out" and model.recipe.hold_out and own:
        tables = hold_out(data.train, model.recipe.hold_out, seed=0)[1:]
    elif split != "test":
        raise ValueError(
            f"split = {split!r} of {folder.name}: choose test, or held_out of the run's own data set, "
            f"if it held people out (its hold_out is {model.recipe.hold_out!r})."
        )
    loaded = [load_images(table, model.recipe, show_progress) for table in tables]
    pixels, kept = zip(*loaded, strict=True)
    left_out = sum(map(len, tables)) - sum(map(len, kept)) if asked else 0
    of_run = (folder, model, data, *kept, *pixels, split, own, weights)
    return OpenRun(*of_run, exclude_same_camera, left_out)


@dataclass(frozen=True, repr=False, eq=False)
class Scored:
    """What `score_run` found and wrote."""

    run: OpenRun
    place: Path  # where it was written
    retrieval: Retrieval
    evaluation: Evaluation
    intervals: pd.DataFrame  # `value`, `low`, `high` of each score: 95 % over queries (bootstrap);
    # NaN where one query alone has a match
    baselines: dict[str, Evaluation]  # by name: see `score_baselines`
    with_flips: Evaluation | None  # None if it was not asked for
    notes: tuple[str, ...]  # what could not be had, as sentences
    by_data_set: dict[str, dict[str, float]]  # scores, where there are several

    @property
    def scores(self) -> dict[str, float | int]:
        """The scores as fractions, as in `metrics.json`."""
        return self.evaluation.scores

    def table(self) -> pd.DataFrame:
        """Return the scores in per cent: a row for the run, each data set, its flips, each baseline."""
        where = self.place.relative_to(self.run.folder.parent).as_posix()
        rows = {where: self.scores}
        rows |= {f"{name} by itself": scores for name, scores in self.by_data_set.items()}
        if self.with_flips:
            rows["with flips averaged"] = self.with_flips.scores
        rows |= {name.replace("_", " "): found.scores for name, found in self.baselines.items()}
        scores = pd.DataFrame(rows).T
        return 100 * scores[list(SCORES)].astype(float).rename(columns=SCORES)

    def spread_in_words(self) -> str:
        """Say how far the mAP would move with other queries, and where else intervals are drawn."""
        half = 50 * (self.intervals.loc["mAP", "high"] - self.intervals.loc["mAP", "low"])
        if not half > 0:  # NaN, of one query
            which = "One query alone" if np.isnan(half) else "Queries that all have the same AP"
            return f"{which} cannot say how far the mAP would move with others."
        return (
            f"With other queries like these the mAP would move by about ±{half:.1f} points. Other people "
            "may move it further, for queries of one person are alike: `05_compare_margins` draws people. On "
            "these same queries it tells two runs apart at smaller differences, pair by pair."
        )

    def __repr__(self) -> str:
        """The table, then the protocol."""
        return f"{self.table().round(2).to_string()}\n(per cent) {self.evaluation.protocol}"


def score_run(
    run: str | Path | OpenRun = "",
    dataset: str | Path | None = None,
    *,
    pattern: str | None = None,
    flip: bool = False,
    precision: str = "float32",
    baselines: bool = True,
    device: str = "auto",
    seed: int = 0,
    show_progress: bool = True,
    **opening: Any,
) -> Scored:
    """Score a run on the test split, and write what was found into its folder.

    Written together, as soon as the scores are known: `embeddings_query.h5`, `embeddings_gallery.h5`,
    `per_query.csv`, `metrics.json`, and an entry under `scored` in `manifest.json`; then what the
    scores are compared with, into `metrics.json`. Where: see `OpenRun.place`.

    Of a run on several data sets these are all queries against all galleries; the scores of each by
    itself are under `by_data_set`.

    Args:
        run: as in `open_run`, or what it returned.
        dataset, pattern, device: as in `open_run`.
        flip: also score the mean of each image's and its mirror image's embeddings, as `with_flips`.
            The scores themselves, and the embeddings on disk, are always those without.
        precision: `"float32"` gives the same scores everywhere; `"bfloat16"` is faster.
        baselines: also score what needs no training: `score_baselines`. Without it, those that
            were scored on the same images before stay in `metrics.json`.
        seed: of the bootstrap.
        opening: `unreadable` and `exclude_same_camera`, as in `open_run`.

    Raises:
        FileNotFoundError, ValueError: as in `open_run` and `Retrieval`; a run that was opened on
            people held out, whose scores are not those of the test split.
        RuntimeError: another process is writing this run.

    >>> from reidlib.training.loop import train
    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo", hold_out=0, height=32, width=16, p=4, k=2, steps=1)
    >>> run = train(recipe, show_progress=False)
    >>> scored = score_run(run, baselines=False, show_progress=False)
    >>> (run / "metrics.json").exists(), scored.scores["mAP"] > 0
    (True, True)
    """
    if not isinstance(run, OpenRun):
        opening |= {"pattern": pattern, "device": device, "show_progress": show_progress}
        run = open_run(run, dataset, **opening)
    if run.split != "test":
        raise ValueError(
            f"{run.folder.name} is opened on people held out; what is written are scores of the test "
            "split. Use its retrieval().evaluate()."
        )
    options = {"precision": precision, "show_progress": show_progress}
    with runs.lock(run.folder):
        place = run.place(precision)
        before = _before(run, place / "metrics.json")  # a broken one is refused before the work
        retrieval = run.retrieval(**options)
        evaluation = retrieval.evaluate()
        both = on_both_sides(run.data) if run.own else ""
        copied = copied_queries(retrieval, run.query_pixels, run.gallery_pixels)
        if warning := " ".join(filter(None, (both, copied))):
            evaluation = replace(evaluation, protocol=f"{evaluation.protocol} {warning}")
        intervals = confidence_interval(evaluation.per_query, seed=seed)
        each = run.by_data_set(retrieval.query_side.emb, retrieval.gallery_side.emb)
        scored = Scored(run, place, retrieval, evaluation, intervals, {}, None, (), each)
        _write(scored, before | {"warning": warning}, flip, run.about(precision))
        if baselines:
            compared, notes = score_baselines(run, **options)
            scored = replace(scored, baselines=compared, notes=tuple(notes))
            found = {name: found.scores for name, found in compared.items()}
            runs.update_json(place / "metrics.json", baselines=found)
        if flip:
            scored = replace(scored, with_flips=run.retrieval(flip=True, **options).evaluate())
            runs.update_json(place / "metrics.json", with_flips=scored.with_flips.scores)
    return scored


def _before(run: OpenRun, file: Path) -> dict:
    """Return what stays of a `metrics.json`: what is of the same images and weights, or of none."""
    subject = {"evaluated_on": run.data.name, "test_data": run.test_data}
    subject |= {"weights_sha256": run.weights_sha256}
    kept = runs.read_json(file, {})
    if any(kept.get(key, value) != value for key, value in subject.items()):
        kept = {key: kept[key] for key in kept if key not in ("baselines", "with_flips")}
    return {"baselines": {}} | kept | subject


def _write(scored: Scored, before: dict, flip: bool, about: dict[str, str]) -> None:
    """Write the run's files, all or none; `about` is what the embeddings say of themselves."""
    folder, data, retrieval = scored.run.folder, scored.run.data, scored.retrieval
    entry = {"at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "data": data.name}
    entry |= {"test_data": about["data"], "flip": flip, "precision": about["precision"]}
    entry["embeddings_sha256"] = {}
    with runs.together(folder) as fresh:
        place = fresh / scored.place.relative_to(folder)
        for side, of in (("query", retrieval.query_side), ("gallery", retrieval.gallery_side)):
            file = place / f"embeddings_{side}.h5"
            write_embeddings(file, of.emb, getattr(scored.run, side), about)
            entry["embeddings_sha256"][side] = runs.sha256(file)
        table = scored.evaluation.per_query
        # Relative names are the same on any machine.
        names = [os.path.relpath(path, data.root) for path in table["path"]]
        rows = table.assign(path=names).to_csv(index=False)
        runs.write_text(place / PER_QUERY["test"], rows)
        intervals = scored.intervals.dropna()[["low", "high"]].T.to_dict("list")
        content = scored.scores | {"intervals": intervals, "flip": False}
        content |= {"precision": about["precision"], "protocol": scored.evaluation.protocol}
        content["per_query_sha256"] = runs.text_sha256(rows)
        content |= {"by_data_set": scored.by_data_set} if scored.by_data_set else {}
        runs.write_json(place / "metrics.json", before | content)
        # Whoever chooses settings on a test split scores it more than once, and the manifest tells.
        manifest = runs.read_json(folder / "manifest.json", {})
        manifest["scored"] = [*manifest.get("scored", []), entry]
        runs.write_json(fresh / "manifest.json", manifest)
