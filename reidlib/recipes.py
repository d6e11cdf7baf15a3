"""The named training recipes: validated, immutable, each setting open to change by name."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reidlib.extras import NORMALISATIONS, own_normalisation
from reidlib.paths import data_dir
from reidlib.words import some

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


def _setting(default: Any, description: str, **limits: float) -> Any:
    return Field(default, description=description, **limits)


class Recipe(BaseModel):
    """All that decides what a training run computes; the defaults are TriNet's.

    Immutable; unknown names and values of the wrong type are errors. `make_recipe` is the door.

    >>> Recipe(margin=0.3).variant
    'batchhard'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str = _setting(
        "market1501", "a name, a path, or several with commas (see reidlib.load)"
    )
    pattern: str = _setting("", "reads identity and camera from file names (see reidlib.load)")
    hold_out: Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)] = _setting(
        0,
        "identities held out of training: how many, or their file; "
        '"market1501" is this repository\'s own, to choose settings on',
    )
    unreadable: Literal["fail", "skip"] = _setting("fail", "broken images: fail or skip")

    backbone: str = _setting(
        "resnet50", "resnet8 to resnet101, mobilenet_v2, mobilenet_v3_small, or timm:NAME"
    )
    weights: str = _setting(
        "imagenet",
        '"imagenet", a file, a run, the mean of several (RUN,RUN), or "none"',
    )
    dim: Count = _setting(128, "length of an embedding")
    hidden: Count = _setting(1024, "width of the head's hidden layer")
    last_stride: Literal[1, 2] = _setting(2, "the backbone's last stride: 1 or 2")
    head: bool = _setting(True, "False: the embedding is the pooled features")
    pooling_power: float = _setting(
        1.0, "p of the pooling, the mean of x^p to the 1/p: 1 is the mean, 3 is GeM", ge=1, le=10
    )
    norm: bool = _setting(False, "BatchNorm of the pooled features")
    classifier: Annotated[float, Field(ge=0)] = _setting(
        0.0, "weight of an ID loss beside the triplets: not the paper's; 0: none"
    )

    height: int = _setting(256, "height of the network's input, in pixels", ge=32)
    width: int = _setting(128, "width of the network's input, in pixels", ge=16)
    enlarge: float = _setting(
        1.125, "resize to this times the input, then crop at random; 1: no crop", ge=1, le=2
    )
    flip: bool = _setting(True, "flip half the images from left to right")
    erasing: Share = _setting(0.0, "share of images with a random rectangle erased")
    normalise: Literal[*NORMALISATIONS] = _setting(
        "imagenet", "imagenet: ImageNet's mean and deviation; unit: pixels in [0, 1]"
    )

    loss: Literal["batch_hard", "batch_all", "random"] = _setting(
        "batch_hard", "which triplets: batch_hard, batch_all or random"
    )
    margin: Annotated[float, Field(ge=0)] | Literal["soft"] = _setting(
        "soft", 'a number m: max(0, m + d+ - d-); "soft": softplus(d+ - d-)'
    )
    temperature: Positive = _setting(
        1.0, "divides the embeddings in the loss: above 1, easier triplets teach too"
    )
    squared: bool = _setting(False, "squared Euclidean distances")
    mean: Literal["active", "valid"] = _setting(
        "active", "batch_all: mean over active triplets (above zero), or over all valid ones"
    )
    reduction: Literal["mean", "sum"] = _setting("mean", "of the loss over triplets: mean or sum")

    p: int = _setting(18, "identities in a batch", ge=2)
    k: int = _setting(4, "images of each identity in a batch", ge=2)
    epoch: Literal["identities", "images"] = _setting(
        "identities", "what an epoch shows: identities or images"
    )
    steps: Count | None = _setting(25_000, "training steps; or give epochs")
    epochs: Count | None = _setting(None, "training epochs, instead of steps")
    lr: Positive = _setting(3e-4, "Adam's learning rate")
    decay_start: Share = _setting(
        0.6, "share of the steps after which the learning rate decays; 1: never"
    )
    decay_to: Annotated[float, Field(gt=0, le=1)] = _setting(
        0.001, "what the learning rate is multiplied by at the last step"
    )
    seed: int = _setting(0, "of weights, batches and augmentation", ge=0, lt=2**63)
    chunk: Annotated[int, Field(ge=2)] | None = _setting(
        None, "images embedded at once: a big batch in little memory, for half as much time again"
    )
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "float32, bfloat16, or auto: bfloat16 where the device is fast at it"
    )

    log_every: Count = _setting(20, "steps between two rows of history.csv")
    checkpoint_every: Count = _setting(200, "steps between two checkpoints")
    evaluate_every: Count = _setting(500, "steps between two held-out scores")

    @field_validator("weights", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and set the other to None")
        return self

    @model_validator(mode="after")
    def _classifier_sees_normed_features(self) -> "Recipe":
        if self.classifier and (self.head or not self.norm or self.reduction != "mean"):
            raise ValueError('a classifier needs norm = True, head = False and reduction = "mean"')
        return self

    @property
    def variant(self) -> str:
        """The variant as its users know it: `batchhard_softplus`, `batchall`, …"""
        return self.loss.replace("_", "") + ("_softplus" if self.margin == "soft" else "")

    @property
    def collapsed_loss(self) -> float:
        """The loss of a network that maps every image to one point: the margin, or ln 2 for soft."""
        return math.log(2) if self.margin == "soft" else self.margin

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the rate of a step (from 0) of a run of so many: constant, then exponential.

        After t0 = decay_start · steps: lr · decay_to^((step − t0) / (steps − t0)), section 4.3 of
        arXiv 1703.07737, there with t0 = 15,000 of 25,000.

        >>> recipe = Recipe()
        >>> [round(recipe.learning_rate(t, 25_000), 7) for t in (0, 15_000, 20_000, 25_000)]
        [0.0003, 0.0003, 9.5e-06, 3e-07]
        """
        start = self.decay_start * steps
        if step <= start:
            return self.lr
        return self.lr * self.decay_to ** ((step - start) / (steps - start))


STRONG = {"last_stride": 1, "head": False, "pooling_power": 3.0, "norm": True}
STRONG |= {"erasing": 0.5, "epoch": "images", "temperature": 4.0}

RECIPES = {
    # What the field's small repositories do: native size, flips only, a constant small rate. Their
    # epoch has as many batches as the images fill, not the identities: github.com/jainpulkit54's
    # person_reid_batchhard, whose scores are published, makes 50 · (12,936 // 72) = 8,950 steps.
    "plain": {"height": 128, "width": 64, "enlarge": 1.0, "normalise": "unit", "margin": 0.2}
    | {"epoch": "images", "epochs": 50, "steps": None, "lr": 3e-5, "decay_start": 1.0},
    # arXiv 1703.07737, sections 4.3 and 4.4: every default above.
    "trinet": {},
    # TriNet with what held-out people showed to be worth it, in short runs (docs/results.md).
    "strong": STRONG,
    # The same with an ID loss, outside the paper, to see what triplets alone cannot do.
    "id": STRONG | {"classifier": 1.0},
    # Small enough to learn the built-in data from random weights on one CPU core in a minute.
    "demo": {"dataset": "synthetic", "backbone": "resnet8", "weights": "none", "hold_out": 20}
    | {"height": 64, "width": 32, "steps": 400, "lr": 1e-3, "decay_to": 0.01}
    | {"checkpoint_every": 100, "evaluate_every": 100},
}

# Data sets that are asked for by name: `data/layouts.toml` has their places, and what they hold.
DATA_SETS = ("synthetic", "market1501", "market1501+500k", "msmt17", "msmt17_v1", "msmt17_v2")
DATA_SETS += ("dukemtmcreid", "occluded_duke", "cuhk03", "cuhk03_labeled", "veri776")

# What is no path, whatever lies in the working directory.
NAMES = (*DATA_SETS, "imagenet", "none")

# Settings of older versions that were taken out, and the value at which each changed nothing.
RETIRED = {"small": 0.0}

# What only watches a training: two runs that differ in these alone learn the same.
WATCHING = ("log_every", "checkpoint_every", "evaluate_every")


def make_recipe(name: str = "trinet", **changes: Any) -> Recipe:
    """Return a named recipe with some settings changed; None leaves one as the recipe says.

    Setting `epochs` replaces the recipe's `steps`, and the other way round. A backbone of timm brings
    its own `normalise`, where neither the recipe nor you say another.

    Raises:
        ValueError: unknown recipe, unknown setting, or a value of the wrong type; names all of them.
        RuntimeError: a backbone of timm, which is not installed.

    >>> make_recipe("plain", loss="batch_all", margin="soft").variant
    'batchall_softplus'
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    changes = {key: value for key, value in changes.items() if value is not None}
    settings = RECIPES[name] | changes
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in changes and other not in changes:
            settings[other] = None
    if str(backbone := settings.get("backbone")).startswith("timm:"):
        settings = {"normalise": own_normalisation(backbone)} | settings
    return _checked(settings)


def listed(names: str) -> list[str]:
    """Return what a setting names, data sets or weights: one, or several with commas between them.

    >>> listed("market1501, msmt17")
    ['market1501', 'msmt17']
    """
    places = (os.path.expanduser(names), data_dir() / names)
    whole = any(map(os.path.exists, places))  # a path may have a comma
    return [names] if whole else [name.strip() for name in names.split(",")]


def bare(names: str) -> str:
    """Return what a setting names, data sets or weights, without where they lie.

    >>> bare("/data/market1501,/data/msmt17")
    'market1501+msmt17'
    """
    return "+".join(Path(name).name for name in listed(names))


def located(recipe: Recipe) -> Recipe:
    """Return a recipe whose paths, seen from the working directory, are whole ones.

    It will be read again from other places, and another folder may have the name there. Names, and
    what lies in the data folder, stay as they are.
    """

    def whole(value: Any) -> Any:
        named = not isinstance(value, str) or not value.strip() or value in NAMES
        path = "" if named else os.path.abspath(os.path.expanduser(value))
        return path if os.path.exists(path) else value

    changed = {
        name: ",".join(map(whole, listed(getattr(recipe, name)))) for name in ("dataset", "weights")
    }
    return recipe.model_copy(update=changed | {"hold_out": whole(recipe.hold_out)})


def stored_recipe(settings: dict[str, Any]) -> Recipe:
    """Return the recipe that a run of this or an older version wrote down.

    Raises:
        ValueError: a setting that this version no longer has, at a value that changed something.
    """
    used = [f"{n} = {v!r}" for n, v in settings.items() if v != RETIRED.get(n, v)]
    if used:
        raise ValueError(
            f"It was made by an older version with {some(used)}, which this version no longer has. "
            "The commit in its manifest.json still does."
        )
    return _checked({name: value for name, value in settings.items() if name not in RETIRED})


def _checked(settings: dict[str, Any]) -> Recipe:
    """Return the recipe of these settings, or raise a ValueError: a plain line for each wrong one."""
    problems = {}
    try:
        return Recipe(**settings)
    except ValidationError as error:
        for problem in error.errors():
            name = "".join(map(str, problem["loc"][:1]))
            problems.setdefault(name, []).append(problem)
    lines = []
    for name, found in problems.items():
        value, told = found[0]["input"], [problem["msg"] for problem in found]
        wanted = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in told))
        line = f"{name} = {value!r}: should be {wanted}."
        if isinstance(value, str):
            with suppress(ValueError):
                line += f" It came as text; write the number as {float(value)!r}."
        if not name:
            line = wanted.removeprefix("Value error, ")
        elif found[0]["type"] == "extra_forbidden":
            line = f"Unknown setting {name!r}: there are {', '.join(Recipe.model_fields)}."
        lines.append(line)
    raise ValueError("\n".join(lines))
