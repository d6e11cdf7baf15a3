"""A finished run made ready for others: weights in half precision, scored, and a model card."""

from pathlib import Path

from reidlib.data.pixels import load_images
from reidlib.data.tables import load
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.embed import embed_views, read_embeddings
from reidlib.model.weights import load_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.runs import find_run, read_json, read_recipe, update_json, write_text
from reidlib.workbook import notebooks

FILES = (  # what is released; the rest of a run is large, or shows people
    *("README.md", "config.json", "manifest.json", "metrics.json", "history.csv"),
    *("per_query.csv", "weights.safetensors"),
)


def release(run: str | Path) -> list[Path]:
    """Halve a run's weights, score these by running 04_evaluate, and write its model card.

    `with_flips` in metrics.json are the scores with the embeddings of an image and of its mirror
    image averaged.

    Returns:
        The files to give away: those of `FILES`, and TensorBoard's events. All are in the run's
        folder; nothing is removed from it.

    Raises:
        FileNotFoundError: no such run, or one whose training has not ended.
    """
    folder = find_run(run)
    model = load_model(folder)
    save_weights(folder / "weights.safetensors", model, model.recipe, half=True)
    update_json(folder / "manifest.json", weights="float16 where they are matrices or filters")
    notebooks.run(["04_evaluate"], {"run": str(folder)}, output=outputs_dir() / "notebooks")
    update_json(folder / "metrics.json", with_flips=_scores_with_flips(folder))
    write_text(folder / "README.md", model_card(folder))
    return [*(folder / name for name in FILES), *sorted(folder.glob("events.out.tfevents.*"))]


def _scores_with_flips(folder: Path) -> dict[str, float]:
    """Return the scores of an evaluated run with mirror images averaged; only those are embedded."""
    model, sides = load_model(folder), []
    data = load(model.recipe.dataset)
    for side, table in (("query", data.query), ("gallery", data.gallery)):
        pixels, table = load_images(table, model.recipe)
        plain, _ = read_embeddings(folder / f"embeddings_{side}.h5")
        mirrored = embed_views(model, pixels, model.recipe, ("mirrored",))["mirrored"]
        sides += [(plain + mirrored) / 2, table]
    return Retrieval(*sides).evaluate().scores


def model_card(folder: Path) -> str:
    """Return the model card of an evaluated run, in Markdown; every number is from its files."""
    recipe, manifest = read_recipe(folder), read_json(folder / "manifest.json")
    metrics = read_json(folder / "metrics.json")
    # The scores with flips came later than the first released runs.
    flipped = metrics.get("with_flips")
    rows = [
        f"| {name} | {100 * metrics[name]:.2f} | {100 * low:.2f} to {100 * high:.2f} |"
        + (f" {100 * flipped[name]:.2f} |" if flipped else "")
        for name, (low, high) in metrics["intervals"].items()
    ]
    head = f"> Linear {recipe.hidden} > BatchNorm > ReLU > Linear {recipe.dim}"
    scaled = (
        ", less ImageNet's mean, over its standard deviation"
        if recipe.normalise == "imagenet"
        else ""
    )
    stride = ",\nits last stride 1 instead of 2" if recipe.last_stride == 1 else ""
    flips = "averaged" if metrics["flip"] else "not averaged"
    lines = [
        f"# {folder.name}",
        "",
        f"An embedding network for person re-identification: {recipe.backbone} > global average",
        f"pooling {head if recipe.head else '(no head)'}.",
        "Two pictures are compared by the Euclidean distance of their embeddings.",
        "",
        "    >>> import reidlib",
        f'    >>> model = reidlib.load_model("{folder.name}")',
        "",
        "**Input.** RGB pictures, bilinearly resized (with antialiasing, in float32: not rounded to",
        f"whole levels) to height × width {recipe.height}×{recipe.width}, divided by 255{scaled}. In",
        f"`weights.safetensors`, `backbone.` and torchvision's own names are the backbone{stride}"
        + (";" if recipe.head else "."),
        *(["`head.` is `Sequential(Linear, BatchNorm1d, ReLU, Linear)`."] if recipe.head else []),
        "",
        f"**Data.** Trained on `{Path(recipe.dataset).name}`: {manifest['train_images']:,} images of",
        f"{manifest['train_identities']:,} people, fingerprint `{manifest['train_data'][:16]}`.",
        f"Backbone weights before training: `{Path(recipe.weights).name}`.",
        "",
        f"**Recipe.** {recipe.loss}, margin {recipe.margin}, batches of {recipe.p} people ×",
        f"{recipe.k} images, input {recipe.height}×{recipe.width}, {manifest['step']:,} steps, seed",
        f"{recipe.seed}, {recipe.precision}; all settings are in `config.json`. To train it again",
        "(packages and commit are in `manifest.json`):",
        "",
        f"    {manifest['reproduce']}",
        "",
        f"**Scores** on the test split of `{metrics['evaluated_on']}`, single query,",
        f"{metrics['queries']:,} queries, flips {flips}, {metrics['precision']}, of the weights in",
        "this folder. The intervals (95 %, bootstrap over queries) say nothing of another seed.",
        "",
        "| | per cent | interval |" + (" with flips averaged |" if flipped else ""),
        "|---|---|---|" + ("---|" if flipped else ""),
        *rows,
        "",
        metrics["protocol"],
        "",
        f"    papermill notebooks/04_evaluate.ipynb OUT.ipynb -p run {folder.name}",
        "",
        "**Intended use.** Research and teaching: to look at what triplet losses learn, and to check",
        "numbers. It recognises clothes and shapes in pictures like those it was trained on. **Not",
        "for** identifying, following or judging people: it knows no faces and no names, is often",
        "wrong, has not been tested for fairness between groups of people, and those shown in its",
        "training data were not asked.",
        "",
        "**Licence.** The code is MIT. The training data may have terms of its own, which extend to",
        "what is made of it: Market-1501 is for research only.",
    ]
    return "\n".join(lines) + "\n"
