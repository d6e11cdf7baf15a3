"""A run, opened and scored: its embeddings on disk, its scores, how sure they are, what they beat.

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
from reidlib.model.embed import embed_views, read_about, read_embeddings, write_embeddings
from reidlib.model.network import EmbeddingNet
from reidlib.model.weights import load_model
from reidlib.recipes import Recipe

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
    split: str = "test"  # or "held_out"
    _made: dict = field(default_factory=dict, init=False, repr=False)  # embeddings by view

    @property
    def recipe(self) -> Recipe:
        """The settings of the run."""
        return self.model.recipe

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

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
        query_emb, gallery_emb = (sum(of_side) / len(views) for of_side in by_side)  # as in `embed`
        return query_emb, gallery_emb

    def retrieval(self, **options) -> Retrieval:
        """Return the queries against the gallery; the options are those of `embeddings`."""
        query_emb, gallery_emb = self.embeddings(**options)
        return Retrieval(query_emb, self.query, gallery_emb, self.gallery)

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
        """Read the run's embedding files; None where they are missing or of something else."""
        files = [self.folder / f"embeddings_{side}.h5" for side in ("query", "gallery")]
        about, columns = self._about(precision), ["path", "pid", "camid"]
        if any(read_about(file) != about for file in files):
            return None
        embs, tables = zip(*map(read_embeddings, files), strict=True)
        images = [
            table[columns].to_numpy().tolist() for table in (*tables, self.query, self.gallery)
        ]
        return [*embs] if images[:2] == images[2:] else None

    def _about(self, precision: str) -> dict[str, str]:
        """What embeddings of this run say of themselves."""
        weights = runs.sha256(self.folder / "weights.safetensors")
        about = {"weights_sha256": weights, "data": fingerprint(self.data)}
        return about | {"flip": "False", "precision": precision}


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

    Raises:
        FileNotFoundError: no such run, no weights in it, or no such data set.
        ValueError: a bad `split`, a run that held nobody out, or images that cannot be read.

    >>> run = "outputs/synthetic_batchhard_softplus_example"
    >>> opened = open_run(run, show_progress=False)
    >>> opened.retrieval().evaluate().scores["mAP"] > 0.3
    True
    """
    folder = runs.find_run(run) if run else runs.newest_run()
    model = load_model(folder, pick_device(device))
    data = load(dataset or model.recipe.dataset)
    tables = (data.query, data.gallery)
    if split == "held_out" and model.recipe.hold_out and dataset in (None, model.recipe.dataset):
        tables = hold_out(data.train, model.recipe.hold_out, seed=0)[1:]
    elif split != "test":
        raise ValueError(
            f"split = {split!r} of {folder.name}: choose test, or held_out of the run's own data set, "
            f"if it held people out (its hold_out is {model.recipe.hold_out!r})."
        )
    loaded = [load_images(table, model.recipe, show_progress) for table in tables]
    pixels, tables = zip(*loaded, strict=True)
    return OpenRun(folder, model, data, *tables, *pixels, split)


@dataclass(frozen=True, repr=False, eq=False)
class Scored:
    """What `score_run` found and wrote."""

    run: OpenRun
    retrieval: Retrieval
    evaluation: Evaluation
    intervals: pd.DataFrame  # `value`, `low`, `high` of each score: 95 % over queries (bootstrap)
    baselines: dict[str, Evaluation]  # `untrained`, `colour_histogram`
    with_flips: Evaluation | None  # None if it was not asked for
    notes: tuple[str, ...]  # what could not be had, as sentences

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
    `per_query.csv`, `metrics.json`, and an entry under `scored` in `manifest.json`.

    Args:
        run: as in `open_run`, or what it returned.
        dataset, device: as in `open_run`.
        flip: also score the mean of each image's and its mirror image's embeddings, as `with_flips`.
            The scores themselves, and the embeddings on disk, are always those without.
        precision: `"float32"` gives the same scores everywhere; `"bfloat16"` is faster.
        baselines: also score the untrained network and colour histograms. Without it, those that
            were scored on the same images before stay in `metrics.json`.
        seed: of the bootstrap.

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
    retrieval = run.retrieval(**options)
    evaluation = retrieval.evaluate()
    compared, notes = score_baselines(run, **options) if baselines else ({}, [])
    flipped = run.retrieval(flip=True, **options).evaluate() if flip else None
    intervals = confidence_interval(evaluation.per_query, seed=seed)
    scored = Scored(run, retrieval, evaluation, intervals, compared, flipped, tuple(notes))
    with runs.lock(run.folder):
        _write(scored, run._about(precision))
    return scored


def _write(scored: Scored, about: dict[str, str]) -> None:
    """Write the run's files; `about` is what the embeddings say of themselves."""
    folder, data, retrieval = scored.run.folder, scored.run.data, scored.retrieval
    embs = {"query": retrieval.query_side.emb, "gallery": retrieval.gallery_side.emb}
    for side, emb in embs.items():
        write_embeddings(folder / f"embeddings_{side}.h5", emb, getattr(scored.run, side), about)
    table = scored.evaluation.per_query
    # Relative names are the same on any machine.
    names = [os.path.relpath(path, data.root) for path in table["path"]]
    runs.write_text(folder / PER_QUERY["test"], table.assign(path=names).to_csv(index=False))

    file, subject = folder / "metrics.json", {"evaluated_on": data.name}
    subject |= {"test_data": about["data"], "weights_sha256": about["weights_sha256"]}
    kept = runs.read_json(file) if file.exists() else {}
    if any(kept.get(key, value) != value for key, value in subject.items()):
        # What was scored of other images or weights does not stand beside these scores.
        kept = {key: kept[key] for key in kept if key not in ("baselines", "with_flips")}
    if scored.baselines or "baselines" not in kept:
        kept["baselines"] = {name: found.scores for name, found in scored.baselines.items()}
    if scored.with_flips:
        kept["with_flips"] = scored.with_flips.scores
    intervals = scored.intervals[["low", "high"]].T.to_dict("list")
    content = scored.scores | {"intervals": intervals, **subject, "flip": False}
    content |= {"precision": about["precision"], "protocol": scored.evaluation.protocol}
    runs.write_json(file, kept | content)
    flip = scored.with_flips is not None
    runs.note_scored(folder, data=data.name, flip=flip, precision=about["precision"])
