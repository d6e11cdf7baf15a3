"""What TensorBoard shows of a run: its event files, settings with scores, and pictures.

Numbers go into the run's own folder, and `tensorboard --logdir outputs` shows them under the run's
name. Pictures of people go into the folder `pictures/` in it, shown as `<run>/pictures`: event files
of numbers are given away with a run's weights (see `release`), and data sets such as Market-1501 may
not be. So nothing in a run's own event files may ever hold a picture.

    events.out.tfevents.*                scalars, histograms and settings of the training
    events.out.tfevents.*.test           scores of the last evaluation, which it replaces
    pictures/events.out.tfevents.*       ranked lists of held-out queries over time
    pictures/events.out.tfevents.*.test  ranked lists of the last evaluation
    pictures/projector_config.pbtxt      the map of its embeddings, with …tensors.tsv,
                                         …metadata.tsv and …sprite.png beside it
"""

import io
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter

from reidlib import runs
from reidlib.evaluation.metrics import Evaluation
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look.figures import encode
from reidlib.look.photographs import RankedRow, ranked_lists
from reidlib.recipes import Recipe

PICTURES = "pictures"

# Columns of the HParams tab. It shows the first five of each kind until more are ticked, and sorts
# settings by "differs", then by name: so it is told that the settings of a comparison differ.
COMPARED = ("loss", "margin", "mean", "lr", "seed")
SCORES = (
    *("test/mAP", "test/top1", "held_out/mAP", "held_out/top1", "loss"),
    *("test/mAP_market", "test/top5", "test/top10", "test/mINP"),
)
# What a run does beside its computation, or what another column says better.
_NO_COLUMN = {
    *("unreadable", "hold_out", "height", "width", "epochs"),
    *("log_every", "checkpoint_every", "evaluate_every"),
}


class Board(SummaryWriter):
    """The event file of a training, and beside it, from the first picture on, one for pictures.

    Args:
        folder: of the run.
        recipe: its settings, which become a row of the HParams tab.
        steps: how many the whole training has.
        step: the last one that is done: 0 for a new training, more for one that goes on.
    """

    def __init__(self, folder: Path, recipe: Recipe, steps: int, step: int = 0):
        self._folder, self._done, self._pictures = folder, step, None
        # Points after this step are from before a kill, and will come again. Also on a new run: the
        # first such mark that TensorBoard reads purges nothing.
        super().__init__(str(folder), purge_step=step + 1)
        add_hyperparameters(self, recipe, steps)

    def add_ranked_lists(
        self, name: str, retrieval: Retrieval, evaluation: Evaluation, step: int
    ) -> None:
        """Draw the same few queries each time, see `ranked_lists_image`, into the pictures' file."""
        if self._pictures is None:
            folder = str(self._folder / PICTURES)
            self._pictures = SummaryWriter(folder, purge_step=self._done + 1)
        _add_ranked_lists(self._pictures, name, retrieval, evaluation, step)

    def flush(self) -> None:
        """Write to disk what is waiting."""
        super().flush()
        if self._pictures:
            self._pictures.flush()

    def close(self) -> None:
        """Write to disk what is waiting, and end."""
        super().close()
        if self._pictures:
            self._pictures.close()


def erase(folder: Path) -> None:
    """Remove all that TensorBoard shows of a run, before it is trained anew."""
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def write_evaluation(
    folder: Path,
    retrieval: Retrieval,
    evaluation: Evaluation,
    emb: tuple[np.ndarray, np.ndarray],
    pixels: tuple[np.ndarray, np.ndarray],
    name: str = "test",
) -> int:
    """Show an evaluation of a trained run: settings with scores, ranked lists, map of embeddings.

    It replaces what an earlier evaluation of this name has written, all but the map, which is that
    of the last evaluation. A running TensorBoard reads the map when it starts.

    Args:
        folder: of the run.
        retrieval: with `path` in its tables.
        evaluation: its scores.
        emb: embeddings of queries, (Q, D), and of the gallery, (G, D).
        pixels: of queries, (Q, H, W, 3) uint8, and of the gallery, (G, H, W, 3), of any size.
        name: under which scores and lists stand; the HParams tab has columns for "test".

    Returns:
        how many images the map has.
    """
    write_scores(folder, evaluation.scores, name)
    name = re.sub(r"\W", "_", name)  # part of file names and tags
    with _afresh(folder / PICTURES, name) as writer:
        step = runs.read_json(folder / "manifest.json")["step"]
        _add_ranked_lists(writer, name, retrieval, evaluation, step)
    sides = zip(("query", "gallery"), (retrieval.query, retrieval.gallery), strict=True)
    table = pd.concat([t.assign(split=split) for split, t in sides], ignore_index=True)
    return write_projector(
        folder / PICTURES, np.concatenate(emb), table, [*pixels[0], *pixels[1]], name=name
    )


def write_scores(folder: Path, scores: Mapping[str, float], name: str = "test") -> None:
    """Show the scores of an evaluation, and the run's settings beside them in the HParams tab.

    Args:
        folder: of the run. Its event files of the same name are replaced.
        scores: fractions, as in `metrics.json`; numbers of queries are left out.
        name: under which they stand, as in `write_evaluation`.
    """
    name = re.sub(r"\W", "_", name)
    manifest = runs.read_json(folder / "manifest.json")
    with _afresh(folder, name) as writer:
        # Again, for runs trained before there were any.
        add_hyperparameters(writer, runs.read_recipe(folder), manifest["steps"])
        for key, score in scores.items():
            if not key.startswith("queries"):
                writer.add_scalar(f"{name}/{key}", score, manifest["step"])


@contextmanager
def _afresh(folder: Path, name: str) -> Iterator[SummaryWriter]:
    """Give a writer of an event file that takes the place of the one of this name."""
    for old in folder.glob(f"events.out.tfevents.*.{name}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=f".{name}") as writer:
        yield writer


# --- settings


def hyperparameters(recipe: Recipe, steps: int) -> dict[str, str | float | bool]:
    """Return what the HParams tab shows of a recipe, each setting always with the same type.

    Files and folders are named without where they are. `margin` is text, since "soft" and numbers
    stand in one column; `mean` is left out where the loss does not have it.

    >>> chosen = hyperparameters(Recipe(weights="/data/weights/r50.pth", margin=0.2), 100)
    >>> [chosen[key] for key in ("margin", "size", "weights", "steps")]
    ['0.2', '256×128', 'r50.pth', 100]
    """
    hidden = _NO_COLUMN if recipe.loss == "batch_all" else _NO_COLUMN | {"mean"}
    return recipe.model_dump(exclude=hidden) | {
        "dataset": Path(recipe.dataset).name,
        "weights": Path(recipe.weights).name,
        "margin": str(recipe.margin),
        "size": f"{recipe.height}×{recipe.width}",
        "steps": steps,
    }


def add_hyperparameters(writer: SummaryWriter, recipe: Recipe, steps: int) -> None:
    """Write a run's row of the HParams tab into its own event file, so that it has the run's name.

    `SummaryWriter.add_hparams` makes a run of its own for it, named by the time.
    """
    session = SessionStartInfo()  # without a name of its own TensorBoard gives it the run's
    for name, value in hyperparameters(recipe, steps).items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(session.hparams[name], kind, value)
    # TensorBoard takes the columns from one run, any of them: so every run writes all of them.
    sample = hyperparameters(recipe, steps) | {"mean": recipe.mean}
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64),
                differs=name in COMPARED,
            )
            for name, value in sample.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in SCORES],
    )
    for tag, content in (
        (metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=columns)),
        (metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=session)),
    ):
        about = metadata.create_summary_metadata(content)
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        writer.file_writer.add_summary(Summary(value=[value]))


# --- ranked lists


def ranked_lists_image(
    retrieval: Retrieval, evaluation: Evaluation, queries: int = 4, topk: int = 10, seed: int = 0
) -> bytes:
    """Return ranked lists as JPEG, of the same queries at every call on the same tables.

    Queries are of different identities, drawn with `seed` among those that have a match.

    Raises:
        ValueError: an image cannot be read.
    """
    known = evaluation.per_query.dropna(subset="AP").drop_duplicates("pid")
    known = known.sample(min(queries, len(known)), random_state=seed)
    rows = [
        RankedRow(
            f"identity {one.pid}" + (f", camera {one.camid}" if one.camid >= 0 else ""),
            retrieval.query["path"].iloc[one.query],
            # Without the excluded ones every list is as wide as at other steps, and can be compared.
            retrieval.ranked_list(one.query, topk=topk, show_missed=True, show_excluded=False),
        )
        for one in known.itertuples()
    ]
    return encode(ranked_lists(rows, height=1.2), photo=True, density=1)


def _add_ranked_lists(
    writer: SummaryWriter, name: str, retrieval: Retrieval, evaluation: Evaluation, step: int
) -> None:
    image = ranked_lists_image(retrieval, evaluation)
    width, height = Image.open(io.BytesIO(image)).size
    # As it is: `SummaryWriter.add_image` makes a PNG of it, many times larger.
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=image)
    value = Summary.Value(tag=f"ranked_lists/{name}", image=image)
    writer.file_writer.add_summary(Summary(value=[value]), step)


# --- the map of embeddings


def write_projector(
    folder: Path,
    emb: np.ndarray,
    table: pd.DataFrame,
    images: Sequence[np.ndarray],
    *,
    name: str = "test",
    most: int = 1500,
    tile: int = 64,
    seed: int = 0,
) -> int:
    """Write embeddings, metadata and thumbnails for the Projector tab; needs event files beside it.

    `SummaryWriter.add_embedding` cannot write thumbnails that are taller than wide, nor see through
    the sides of narrow ones.

    Args:
        folder: whose event files TensorBoard shows as a run.
        emb: (N, D) floats.
        table: N rows: `path`, `pid`, `camid`, `split`, and `label` if there is one.
        images: N arrays (H, W, 3) uint8, of any sizes.
        name: of the map.
        most: points at most; `sample` draws them.
        tile: side of a thumbnail, pixels.
        seed: of the sample.

    Returns:
        how many points there are.

    Raises:
        ValueError: the sprite would be larger than TensorBoard draws, 8192 pixels a side.
    """
    rows = sample(table["pid"].to_numpy(), table["split"].to_numpy(), most, seed)
    # TensorBoard finds a thumbnail's place right only where there are as many columns as rows.
    side = math.ceil(math.sqrt(len(rows)))
    if side * tile > 8192:
        raise ValueError(
            f"{len(rows)} thumbnails of {tile} pixels make a picture of {side * tile} pixels a "
            "side, and TensorBoard draws up to 8192: take fewer, or smaller ones."
        )
    # The ground is transparent, and TensorBoard leaves it out: people do not hide their neighbours.
    sprite = Image.new("RGBA", (side * tile, side * tile), (0, 0, 0, 0))
    for place, row in enumerate(rows):
        height, width = images[row].shape[:2]
        scale = tile / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        thumbnail = Image.fromarray(images[row]).resize(size, Image.Resampling.BILINEAR)
        left, top = (tile * (place % side), tile * (place // side))
        sprite.paste(thumbnail, (left + (tile - size[0]) // 2, top + (tile - size[1]) // 2))
    shown = table.iloc[rows]
    # The first column that is no number is what TensorBoard labels points with.
    columns = {"name": [Path(path).name for path in shown["path"]]}
    columns |= {key: shown[key] for key in ("pid", "camid", "split", "label") if key in shown}
    lines = ["\t".join(columns), *map(_cells, zip(*columns.values(), strict=True))]
    tensors = io.StringIO()
    np.savetxt(tensors, emb[rows], fmt="%.6g", delimiter="\t")
    folder.mkdir(parents=True, exist_ok=True)
    sprite.save(folder / "sprite.png")
    runs.write_text(folder / "metadata.tsv", "\n".join(lines) + "\n")
    runs.write_text(folder / "tensors.tsv", tensors.getvalue())
    config = f"""embeddings {{
  tensor_name: {json.dumps(name)}
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: [{tile}, {tile}]
  }}
}}
"""
    runs.write_text(folder / "projector_config.pbtxt", config)
    return len(rows)


def _cells(values: Sequence) -> str:
    """Return one line of metadata: file names may hold tabs, line breaks, and what is no UTF-8.

    >>> _cells(("a\\tb\\n.jpg", 3))
    'a b .jpg\\t3'
    """
    words = (str(value).encode("utf-8", "replace").decode() for value in values)
    return "\t".join(re.sub(r"\s", " ", word) for word in words)


def sample(pids: np.ndarray, splits: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Return up to `most` rows: people of whom there is a query, whole, and distractors.

    People are drawn until no more fit, each with all their images, so that every query keeps all its
    matches; distractors (pid 0) keep the share that they have of all images. Junk is left out.

    Args:
        pids: (N,) identities.
        splits: (N,) "query" or "gallery".
        most: how many rows.
        seed: of the draw.

    Returns:
        (n,) row numbers, ascending. Where even one person has more than `most` images: the first
        of one.
    """
    kept = np.flatnonzero(pids != -1)
    if len(kept) <= most:
        return kept
    random = np.random.default_rng(seed)
    strangers = np.flatnonzero(pids == 0)
    strangers = random.choice(strangers, most * len(strangers) // len(kept), replace=False)
    people = random.permutation(np.unique(pids[(splits == "query") & (pids > 0)]))
    sizes = np.array([(pids == person).sum() for person in people])
    fit = np.cumsum(sizes) <= most - len(strangers)
    chosen = np.flatnonzero(np.isin(pids, people[fit] if fit[0] else people[:1]))
    return np.sort(np.concatenate([chosen[: most - len(strangers)], strangers]))
