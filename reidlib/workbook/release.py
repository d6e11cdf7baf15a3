"""A finished run made ready for others: weights in half precision, scored, a model card, and the Hub."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reidlib import runs
from reidlib.evaluation.scoring import score_run
from reidlib.extras import NORMALISATIONS
from reidlib.look import board
from reidlib.model.weights import PUBLISHED, load_model, save_weights, weights_file
from reidlib.recipes import bare

# What is released; the rest of a run is large, or shows people.
FILES = ["README.md", "config.json", "manifest.json", "metrics.json", "history.csv"]
FILES += ["per_query.csv", "weights.safetensors"]
# What is published.
HUB_FILES = [PUBLISHED, "README.md", "config.json", "manifest.json", "metrics.json"]


def release(run: str | Path) -> list[Path]:
    """Halve a run's weights, score these, with flips too, and write its model card.

    An error or a kill on the way leaves the run as it was: all is put in place at the end, together.

    Returns:
        The files to give away, all in the run's folder: `FILES`, and TensorBoard's events.

    Raises:
        FileNotFoundError: no such run, one whose training has not ended, or no data to score it on.
        ValueError: the data set of its recipe is no longer the one that it was trained on.
        RuntimeError: another process is writing this run.
    """
    folder = runs.find_run(run)
    model = load_model(folder)
    with runs.lock(folder), TemporaryDirectory(prefix=".release-", dir=folder) as place:
        made = Path(place) / folder.name  # as the card and the scores call it
        made.mkdir()
        for file in (folder / name for name in FILES if name.endswith(".json")):
            if file.is_file():
                shutil.copy(file, made)
        weights = made / "weights.safetensors"
        save_weights(weights, model, model.recipe, half=True)
        said = {"weights": "float16 where they are matrices or filters"}
        runs.update_json(made / "manifest.json", **said, weights_sha256=runs.sha256(weights))
        scored = score_run(made, flip=True)
        if not scored.run.own:
            raise ValueError(scored.run.notes[-1])
        runs.write_text(made / "README.md", model_card(made))
        with runs.together(folder) as ready:
            for file in made.glob("[!.]*"):
                file.rename(ready / file.name)
    board.write_scores(folder, scored.scores)
    return [*(folder / name for name in FILES), *sorted(folder.glob("events.out.tfevents.*"))]


def publish(run: str | Path, to: str | Path) -> list[Path]:
    """Write what the Hub of models expects of a scored run into a folder: weights, settings, scores, card.

    The card is that of `release`, which also halves the weights. `load_model` takes the folder, and
    `hf-hub:owner/name` once it is uploaded. Files of these names there are replaced, together.

    Raises:
        FileNotFoundError: no such run, or one whose training has not ended.
        ValueError: its scores are not there, or of other weights; `to` is the run itself, or a file.
    """
    folder, to = runs.find_run(run), Path(to).expanduser()
    weights, scored = weights_file(folder), runs.read_json(folder / "metrics.json", {})
    load_model(folder)  # or an error: it is whole, and fits its recipe
    digest = runs.sha256(weights)  # which older scores do not say: the run vouches for them
    if "mAP" not in scored or scored.get("weights_sha256", digest) != digest:
        raise ValueError(
            f"{folder.name} has no scores of its weights for the card: python -m reidlib score {run}"
        )
    if to.resolve() == folder.resolve() or (to.exists() and not to.is_dir()):
        raise ValueError(f"{to} cannot be written: give a new folder, or one that was published.")
    to.mkdir(parents=True, exist_ok=True)
    with runs.together(to) as ready:
        shutil.copy(weights, ready / PUBLISHED)
        for name in HUB_FILES[2:]:
            shutil.copy(folder / name, ready)
        runs.write_text(ready / "README.md", model_card(folder, hub=True))
    return [to / name for name in HUB_FILES]


def model_card(folder: Path, hub: bool = False) -> str:
    """Return the model card of a scored run, in Markdown; every number is from its files.

    For the Hub it begins with YAML that the Hub reads, and has the names that things have there.
    """
    recipe, metrics = runs.read_recipe(folder), runs.read_json(folder / "metrics.json")
    head = f"> Linear {recipe.hidden} > BatchNorm > ReLU > Linear {recipe.dim}"
    head = "> BatchNorm " * recipe.norm + (head if recipe.head else "(no head)")
    keys = ";\n`norm.` is `BatchNorm1d`" * recipe.norm
    keys += ";\n`head.` is `Sequential(Linear, BatchNorm1d, ReLU, Linear)`" * recipe.head
    mean, std = NORMALISATIONS[recipe.normalise]
    scaled = {"imagenet": ", less ImageNet's mean, over its standard deviation", "unit": ""}
    of_timm, power = recipe.backbone.startswith("timm:"), recipe.pooling_power
    pooling = (
        "global average\npooling"
        if power == 1
        else f"GeM\n(mean of x^{power:g} over the map, to the 1/{power:g}, x at least 1e-6)"
    )
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    template = template if hub else template[template.index("# {name}") :]
    beside = f", temperature {recipe.temperature:g}" * (recipe.temperature != 1)
    beside += f", an ID loss of weight {recipe.classifier:g} beside it" * bool(recipe.classifier)
    return template.format(
        name=folder.name,
        beside=beside,
        recipe=recipe,
        manifest=runs.read_json(folder / "manifest.json"),
        metrics=metrics,
        head=head,
        keys=f"{keys}.",
        scaled=scaled.get(recipe.normalise, f", less {mean}, over {std}"),
        pooling="its own\npooling" if of_timm else pooling,
        source="timm" if of_timm else "torchvision",
        file=PUBLISHED if hub else "weights.safetensors",
        place=f"hf-hub:OWNER/{folder.name}" if hub else folder.name,
        index=_model_index(folder.name, metrics),
        stride=",\nits last stride 1 instead of 2" if recipe.last_stride == 1 else "",
        trained_on=bare(recipe.dataset),
        weights=bare(recipe.weights),
        flips="averaged" if metrics["flip"] else "not averaged",
        table=_score_table(metrics),
    )


def _model_index(name: str, metrics: dict[str, Any]) -> str:
    """Return the scores as the Hub's `model-index`, in one line of JSON, which is YAML, too."""
    data, task = metrics["evaluated_on"], {"type": "image-retrieval", "name": "Re-identification"}
    values = [{"type": key, "name": key, "value": metrics[key]} for key in metrics["intervals"]]
    result = {"task": task, "dataset": {"type": data, "name": data, "split": "test"}}
    return json.dumps([{"name": name, "results": [result | {"metrics": values}]}])


def _score_table(metrics: dict[str, Any]) -> str:
    """Return a Markdown table of scores and intervals in per cent."""
    lines = ["| | per cent | interval |", "|---|---|---|"]
    for name, (low, high) in metrics["intervals"].items():
        interval = f"{100 * low:.2f} to {100 * high:.2f}"
        lines.append(f"| {name} | {100 * metrics[name]:.2f} | {interval} |")
    if flipped := metrics.get("with_flips"):  # the first released runs have none
        ends = [" with flips averaged |", "---|"]
        ends += [f" {100 * flipped[name]:.2f} |" for name in metrics["intervals"]]
        lines = [line + end for line, end in zip(lines, ends, strict=True)]
    return "\n".join(lines)
