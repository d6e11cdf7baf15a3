"""What TensorBoard shows of a run: curves, settings with scores, and ranked lists.

`tensorboard --logdir outputs` shows the numbers under the run's name, and pictures of people under
`<run>/pictures`; `make tensorboard` shows an `overview`. A run's own event files must never hold a
picture: they are given away with its weights (see `workbook.release`), and the people of data sets such
as Market-1501 may not be.

    events.out.tfevents.*                scalars, histograms and settings of the training
    events.out.tfevents.*.test           scores of the last evaluation, which it replaces
    pictures/events.out.tfevents.*       ranked lists of held-out queries over time
    pictures/events.out.tfevents.*.test  ranked lists of the last evaluation

A training holds a `Board`; `write_evaluation` adds an evaluation to the folder of a run.
"""

import io
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import SummaryWriter

from reidlib import runs
from reidlib.evaluation.metrics import SCORES, Evaluation
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look.figures import encode
from reidlib.look.photographs import ranked_lists, ranked_row
from reidlib.paths import cache_dir, outputs_dir
from reidlib.recipes import WATCHING, Recipe, bare

PICTURES = "pictures"

# Columns of the HParams tab. It shows the first five of each kind until more are ticked, and sorts
# settings by "differs", then by name: so it is told that the settings of a comparison differ.
COMPARED = ("loss", "margin", "mean", "lr", "seed")
FIRST = ("test/mAP", "test/top1", "held_out/mAP", "held_out/top1", "loss")
SCORE_TAGS = [*dict.fromkeys([*FIRST, *(f"test/{key}" for key in SCORES)])]
COLUMNS = {"lr": "learning rate", "p": "people a batch", "k": "images of each", "mean": "mean over"}
# What a run does beside its computation, or what another column says better.
NO_COLUMN = {*WATCHING, "unreadable", "hold_out", "height", "width", "epochs", "chunk"}
# An overview has these, released on Market-1501, and at most so many runs in all, each with pictures: of
# more than 40 TensorBoard shows none until some are ticked.
FOUR, MOST = ("batchall", "batchall_softplus", "batchhard", "batchhard_softplus"), 17


class Board(SummaryWriter):
    """The event file of a training, and beside it, from the first picture on, one for pictures.

    The recipe becomes a row of the HParams tab; `steps` has the whole training, `step` are done.
    """

    def __init__(self, folder: Path, recipe: Recipe, steps: int, step: int = 0):
        # Points from this step on are from before a kill, and will come again. Also on a new run:
        # the first such mark that TensorBoard reads purges nothing.
        self._folder, self._next = folder, step + 1
        if (cache_dir() / "tensorboard").is_dir():  # whoever looks at it sees a new run
            with suppress(OSError):
                overview(folder)
        super().__init__(str(folder), purge_step=self._next)
        add_hyperparameters(self, recipe, steps)

    def add_ranked_lists(
        self, name: str, retrieval: Retrieval, evaluation: Evaluation, step: int
    ) -> None:
        """Draw the same few queries each time, see `ranked_lists_image`, into the pictures' file."""
        if PICTURES not in self.all_writers:  # these are flushed and closed together
            pictures = SummaryWriter(str(self._folder / PICTURES), purge_step=self._next)
            self.all_writers[PICTURES] = pictures.file_writer
        self.all_writers[PICTURES].add_summary(_summary(name, retrieval, evaluation), step)


def overview(*running: Path) -> Path:
    """Return a folder of links for TensorBoard: the four, the example, and the newest runs of one's own.

    The four are first, without their data set's name. `running` have no checkpoint yet.
    """
    own = {file.parent for file in runs.in_runs("checkpoint.pt")} | {*running}
    newest = sorted(own, key=lambda run: run.stat().st_mtime)[-(MOST - len(FOUR) - 1) :]
    shown = {name: outputs_dir() / f"market1501_{name}" for name in FOUR}
    shown |= {"example": outputs_dir() / runs.EXAMPLE} | {run.name: run for run in newest}
    folder = cache_dir() / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # the links, not what they lead to
    folder.mkdir(parents=True)
    for name, run in shown.items():
        (folder / name).symlink_to(run, target_is_directory=True)
    return folder


def erase(folder: Path) -> None:
    """Remove all that TensorBoard shows of a run, before it is trained anew."""
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def write_evaluation(
    folder: Path, retrieval: Retrieval, evaluation: Evaluation, name: str = "test"
) -> None:
    """Show an evaluation of a trained run: its scores beside its settings, and ranked lists.

    It replaces what an earlier evaluation of this name has written. The HParams tab has columns for
    "test". The tables of the retrieval must have `path`.

    Raises:
        ValueError: an image cannot be read.
    """
    write_scores(folder, evaluation.scores, name)
    step = runs.read_json(folder / "manifest.json")["step"]
    with _afresh(folder / PICTURES, name) as (writer, tag):
        writer.file_writer.add_summary(_summary(tag, retrieval, evaluation), step)


def write_scores(folder: Path, scores: Mapping[str, float], name: str = "test") -> None:
    """Show the scores (fractions) of a trained run beside its settings, without pictures of anybody.

    They replace what earlier scores of this name have written.
    """
    manifest = runs.read_json(folder / "manifest.json")
    with _afresh(folder, name) as (writer, tag):
        # Again, for runs trained before there were any.
        add_hyperparameters(writer, runs.read_recipe(folder), manifest["steps"])
        for key, score in scores.items():
            if not key.startswith("queries"):
                writer.add_scalar(f"{tag}/{key}", score, manifest["step"])
        metrics = runs.read_json(folder / "metrics.json", {}) if name == "test" else {}
        for baseline, its in metrics.get("baselines", {}).items():
            writer.add_scalar(f"{tag}/mAP of {baseline}", its["mAP"], manifest["step"])


@contextmanager
def _afresh(folder: Path, name: str) -> Iterator[tuple[SummaryWriter, str]]:
    """Give a writer in place of the one of this name, and the name as file names and tags have it."""
    tag = re.sub(r"\W", "_", name)
    for old in folder.glob(f"events.out.tfevents.*.{tag}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=f".{tag}") as writer:
        yield writer, tag


# --- settings


def hyperparameters(recipe: Recipe, steps: int) -> dict[str, str | float | bool]:
    """Return what the HParams tab shows of a recipe, each setting always with the same type.

    Files and folders are named without where they are; `mean` is left out where the loss does not
    have it.

    >>> chosen = hyperparameters(Recipe(weights="/data/weights/r50.pth", margin=0.2), 100)
    >>> [chosen[key] for key in ("margin", "size", "weights", "steps", "lr", "seed")]
    ['0.2', '256×128', 'r50.pth', 100, '3e-4', '0']
    """
    hidden = NO_COLUMN if recipe.loss == "batch_all" else NO_COLUMN | {"mean"}
    return recipe.model_dump(exclude=hidden) | {
        "dataset": bare(recipe.dataset),
        "weights": bare(recipe.weights),
        "margin": str(recipe.margin),
        "lr": re.sub(r"\.?0*e-0*", "e-", f"{recipe.lr:e}"),
        "seed": str(recipe.seed),
        "size": f"{recipe.height}×{recipe.width}",
        "steps": steps,
    }


def add_hyperparameters(writer: SummaryWriter, recipe: Recipe, steps: int) -> None:
    """Write a run's row of the HParams tab into its own event file, so that it has the run's name.

    `SummaryWriter.add_hparams` writes a file of its own for it, wants the scores along with the
    settings, turns yes and no into numbers, and cannot say which columns come first.
    """
    chosen = hyperparameters(recipe, steps)
    # TensorBoard takes the columns from one run, any of them: so every run writes all of them.
    columns = api_pb2.Experiment()
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    for name, value in (chosen | {"mean": recipe.mean}).items():
        kind = kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64)
        named = {"name": name, "display_name": COLUMNS.get(name, name.replace("_", " "))}
        columns.hparam_infos.add(**named, type=kind, differs=name in COMPARED)
    for tag in SCORE_TAGS:
        where, _, key = tag.rpartition("/")
        named = {"display_name": f"{SCORES.get(key, key)} {where.replace('_', '-')}".strip()}
        columns.metric_infos.add(name=api_pb2.MetricName(tag=tag), **named)
    about = metadata.create_summary_metadata(HParamsPluginData(experiment=columns))
    options = {"metadata": about, "tensor": metadata.NULL_TENSOR}
    columns = Summary.Value(tag=metadata.EXPERIMENT_TAG, **options)
    writer.file_writer.add_summary(Summary(value=[columns]))
    # Without a name of its own TensorBoard gives the row the run's.
    writer.file_writer.add_summary(hparams_pb(chosen, trial_id=""))


# --- ranked lists


def ranked_lists_image(retrieval: Retrieval, evaluation: Evaluation) -> bytes:
    """Return ranked lists as JPEG, of the same queries at every call on the same tables.

    Four queries of different identities, drawn among those that have a match.

    Raises:
        ValueError: an image cannot be read.
    """
    known = evaluation.per_query.dropna(subset="AP").drop_duplicates("pid")
    queries = known["query"].sample(min(4, len(known)), random_state=0)
    # Without the excluded ones every list is as wide as at other steps, and can be compared.
    rows = [ranked_row(retrieval, query, show_excluded=False) for query in queries]
    return encode(ranked_lists(rows, height=1.2), photo=True, density=1)


def _summary(name: str, retrieval: Retrieval, evaluation: Evaluation) -> Summary:
    """Return ranked lists as they are: `SummaryWriter.add_image` makes a far larger PNG of them."""
    jpeg = ranked_lists_image(retrieval, evaluation)
    width, height = Image.open(io.BytesIO(jpeg)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg)
    return Summary(value=[Summary.Value(tag=f"ranked_lists/{name}", image=image)])
