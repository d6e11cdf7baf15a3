"""A run, opened and scored: its embeddings on disk, its scores, how sure they are, what they beat.

    scored = score_run("market1501_batchhard_softplus")
    print(scored)

Notebooks, the shell, comparisons and releases all score here, so one run has one score.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from reidlib import runs
from reidlib.data.pixels import load_images
from reidlib.data.tables import Dataset, fingerprint, hold_out, load
from reidlib.evaluation.baselines import score_baselines
from reidlib.evaluation.intervals import confidence_interval
from reidlib.evaluation.metrics import SCORES, Evaluation
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.device import pick_device
from reidlib.model.embed import (
    embed,
    embed_views,
    read_about,
    read_embeddings,
    write_embeddings,
)
from reidlib.model.network import EmbeddingNet
from reidlib.model.weights import load_model
from reidlib.recipes import Recipe

SIDES = ("query", "gallery")
PER_QUERY = {"test": "per_query.csv", "held_out": "per_query_held_out.csv"}  # in a run, by split


@dataclass(frozen=True, eq=False)
class OpenRun:
    """A trained run beside the people that it is asked about.

    Attributes:
        folder: of the run.
        model: the trained network, on its device.
        data: the data set.
        query, gallery: the tables (Q rows, G rows).
        query_pixels, gallery_pixels: (Q, H, W, 3) and (G, H, W, 3) uint8.
        split: `"test"` or `"held_out"`, as in `open_run`.
    """

    folder: Path
    model: EmbeddingNet
    data: Dataset
    query: pd.DataFrame
    gallery: pd.DataFrame
    query_pixels: np.ndarray
    gallery_pixels: np.ndarray
    split: str = "test"

    @property
    def recipe(self) -> Recipe:
        """The settings of the run."""
        return self.model.recipe

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def about(self, precision: str = "float32") -> dict[str, str]:
        """Return what embeddings of this run say of themselves: weights, images, flips, precision."""
        return {
            "weights_sha256": runs.sha256(self.folder / "weights.safetensors"),
            "data": fingerprint(self.data),
            "flip": "False",
            "precision": precision,
        }

    def embeddings(
        self, *, flip: bool = False, precision: str = "float32", show_progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of queries (Q, D) and gallery (G, D), float32.

        Those that `score_run` kept are read again, if they are of these very weights and images and
        of this precision. All others are made.

        Args:
            flip: the mean over each image and its mirror image.
            precision: as in `embed`.
            show_progress: draw bars.
        """
        options = {"precision": precision, "show_progress": show_progress}
        plain = self._kept(precision)
        if plain is None:
            sides = (self.query_pixels, self.gallery_pixels)
            plain = tuple(embed(self.model, pixels, self.recipe, **options) for pixels in sides)
        return self._with_mirrored(plain, **options) if flip else plain

    def _with_mirrored(self, plain: tuple[np.ndarray, ...], **options) -> tuple[np.ndarray, ...]:
        """Return the mean of these embeddings and those of the mirror images, as `embed` has it."""
        found = []
        for emb, pixels in zip(plain, (self.query_pixels, self.gallery_pixels), strict=True):
            views = embed_views(self.model, pixels, self.recipe, ("mirrored",), **options)
            found.append((emb + views["mirrored"]) / 2)
        return tuple(found)

    def retrieval(self, **options) -> Retrieval:
        """Return the queries against the gallery; the options are those of `embeddings`."""
        query_emb, gallery_emb = self.embeddings(**options)
        return Retrieval(query_emb, self.query, gallery_emb, self.gallery)

    def _kept(self, precision: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Read the run's embedding files; None where they are missing or of something else."""
        files = [self.folder / f"embeddings_{side}.h5" for side in SIDES]
        if not all(file.is_file() for file in files):
            return None
        wanted, found = self.about(precision), []
        for file, table in zip(files, (self.query, self.gallery), strict=True):
            if read_about(file) != wanted:
                return None
            emb, of = read_embeddings(file)
            if not all(
                of[name].tolist() == table[name].tolist() for name in ("path", "pid", "camid")
            ):
                return None
            found.append(emb)
        return tuple(found)


def open_run(
    run: str | Path = "",
    dataset: str | Path | None = None,
    split: str = "test",
    *,
    device: str = "auto",
    show_progress: bool = True,
) -> OpenRun:
    """Open a run: its network, and the images that it is to be asked about.

    Args:
        run: a run's name under `outputs/`, or its folder; "" takes the newest.
        dataset: ask about another data set than the run's own.
        split: `"test"`, or `"held_out"` for the training identities that the run held out.
        device: `"auto"`, `"cpu"`, `"cuda"`, …
        show_progress: draw a bar while images are decoded.

    Raises:
        FileNotFoundError: no such run, no weights in it, or no such data set.
        ValueError: a bad `split`, a run that held nobody out, or images that cannot be read.

    >>> from reidlib.training.loop import train
    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo", hold_out=0, height=32, width=16, p=4, k=2, steps=1)
    >>> run = train(recipe, show_progress=False)
    >>> opened = open_run(run, show_progress=False)
    >>> opened.retrieval().evaluate().scores["mAP"] > 0
    True
    """
    folder = runs.find_run(run) if run else runs.newest_run()
    model = load_model(folder, pick_device(device))
    data = load(dataset or model.recipe.dataset)
    if split == "test":
        tables = (data.query, data.gallery)
    elif split == "held_out" and model.recipe.hold_out and dataset in (None, model.recipe.dataset):
        tables = hold_out(data.train, model.recipe.hold_out, seed=0)[1:]
    else:
        raise ValueError(
            f"split = {split!r} of {folder.name}: choose test, or held_out of the run's own data set, "
            f"if it held people out (its hold_out is {model.recipe.hold_out!r})."
        )
    (query_pixels, query), (gallery_pixels, gallery) = (
        load_images(table, model.recipe, show_progress) for table in tables
    )
    return OpenRun(folder, model, data, query, gallery, query_pixels, gallery_pixels, split)


@dataclass(frozen=True, repr=False, eq=False)
class Scored:
    """What `score_run` found and wrote.

    Attributes:
        run: the run, opened.
        retrieval: its queries against its gallery.
        evaluation: scores and per-query table.
        intervals: a row for each score, columns `value`, `low` and `high`: the 95 % interval over
            queries (bootstrap).
        baselines: evaluations on the same queries, by name: `untrained`, `colour_histogram`.
        with_flips: the evaluation with each image's and its mirror image's embeddings averaged, or
            None if it was not asked for.
        notes: what could not be had, as sentences.
    """

    run: OpenRun
    retrieval: Retrieval
    evaluation: Evaluation
    intervals: pd.DataFrame
    baselines: dict[str, Evaluation] = field(default_factory=dict)
    with_flips: Evaluation | None = None
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float | int]:
        """The scores as fractions, as in `metrics.json`."""
        return self.evaluation.scores

    def table(self) -> pd.DataFrame:
        """Return the scores in per cent: a row for the run, its flips and each baseline."""
        rows = {self.run.folder.name: self.evaluation}
        if self.with_flips:
            rows["with flips averaged"] = self.with_flips
        rows |= {name.replace("_", " "): found for name, found in self.baselines.items()}
        scores = pd.DataFrame({name: found.scores for name, found in rows.items()}).T
        return 100 * scores[list(SCORES)].astype(float).rename(columns=SCORES)

    def __repr__(self) -> str:
        """The table, then the protocol."""
        return f"{self.table().round(2).to_string()}\n(per cent) {self.evaluation.protocol}"


def score_run(
    run: str | Path | OpenRun = "",
    dataset: str | Path | None = None,
    *,
    flip: bool = False,
    precision: str = "float32",
    baselines: bool = True,
    device: str = "auto",
    seed: int = 0,
    show_progress: bool = True,
) -> Scored:
    """Score a run on the test split, and write what was found into its folder.

    Written, once everything is known: `embeddings_query.h5`, `embeddings_gallery.h5`,
    `per_query.csv`, `metrics.json`, and an entry under `scored` in `manifest.json`. The weights are
    read and never touched.

    Args:
        run: as in `open_run`, or what it returned.
        dataset: score on another data set than the run's own.
        flip: also score the mean of each image's and its mirror image's embeddings, as `with_flips`.
            The scores themselves, and the embeddings on disk, are always those without.
        precision: `"float32"` gives the same scores everywhere; `"bfloat16"` is faster.
        baselines: also score the untrained network and colour histograms. Without it, those that
            were scored on the same images before stay in `metrics.json`.
        device: as in `open_run`.
        seed: of the bootstrap.
        show_progress: draw bars.

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
        run = open_run(run, dataset, device=device, show_progress=show_progress)
    if run.split != "test":
        raise ValueError(
            f"{run.folder.name} is opened on people held out; what is written are scores of the test "
            "split. Use its retrieval().evaluate()."
        )
    options = {"precision": precision, "show_progress": show_progress}
    query_emb, gallery_emb = run.embeddings(**options)
    retrieval = Retrieval(query_emb, run.query, gallery_emb, run.gallery)
    evaluation = retrieval.evaluate()
    compared, notes = score_baselines(run, **options) if baselines else ({}, [])
    flipped = None
    if flip:
        query_flipped, gallery_flipped = run._with_mirrored((query_emb, gallery_emb), **options)
        flipped = Retrieval(query_flipped, run.query, gallery_flipped, run.gallery).evaluate()
    intervals = confidence_interval(evaluation.per_query, seed=seed)
    scored = Scored(run, retrieval, evaluation, intervals, compared, flipped, tuple(notes))
    about = run.about(precision)
    with runs.lock(run.folder):
        for side, emb in zip(SIDES, (query_emb, gallery_emb), strict=True):
            file = run.folder / f"embeddings_{side}.h5"
            write_embeddings(file, emb, getattr(run, side), about)
        _write(scored, about)
    return scored


def _write(scored: Scored, about: dict[str, str]) -> None:
    """Write `per_query.csv`, `metrics.json` and the manifest's record of this scoring.

    `about` is what the embeddings say of themselves.
    """
    folder, data = scored.run.folder, scored.run.data
    per_query = scored.evaluation.per_query
    # Relative names are the same on any machine.
    names = [os.path.relpath(path, data.root) for path in per_query["path"]]
    table = per_query.assign(path=names)
    runs.write_text(folder / PER_QUERY["test"], table.to_csv(index=False))

    file, subject = folder / "metrics.json", {"evaluated_on": data.name}
    subject |= {"test_data": about["data"], "weights_sha256": about["weights_sha256"]}
    before = runs.read_json(file) if file.exists() else {}
    # What was scored of other images or weights does not stand beside these scores.
    stale = any(before.get(key, value) != value for key, value in subject.items())
    kept = {k: v for k, v in before.items() if not (stale and k in ("baselines", "with_flips"))}
    if scored.baselines or "baselines" not in kept:
        kept["baselines"] = {name: found.scores for name, found in scored.baselines.items()}
    if scored.with_flips:
        kept["with_flips"] = scored.with_flips.scores
    intervals = {name: [row["low"], row["high"]] for name, row in scored.intervals.iterrows()}
    content = scored.scores | {"intervals": intervals, **subject, "flip": False}
    content |= {"precision": about["precision"], "protocol": scored.evaluation.protocol}
    runs.write_json(file, kept | content)
    flip = scored.with_flips is not None
    runs.note_scored(folder, data=data.name, flip=flip, precision=about["precision"])
