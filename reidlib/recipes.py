"""The named training recipes: validated, immutable, each setting open to change by name."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reidlib.words import some

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """All that decides what a training run computes; the defaults are TriNet's.

    Immutable; unknown names and values of the wrong type are errors. `make_recipe` is the door.

    >>> Recipe(margin=0.3).variant
    'batchhard'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str = Field(
        "market1501", description="market1501, synthetic, or a path (see reidlib.load)"
    )
    hold_out: Annotated[int, Field(ge=0)] | str = Field(
        0,
        description="identities held out of training: how many, or their file; "
        '"market1501" is this repository\'s own, to choose settings on',
    )
    unreadable: Literal["fail", "skip"] = Field("fail", description="broken images: fail or skip")

    backbone: str = Field(
        "resnet50", description="resnet8 to resnet101, mobilenet_v2 or mobilenet_v3_small"
    )
    weights: str = Field("imagenet", description='"imagenet", the path of a file, or "none"')
    dim: Count = Field(128, description="length of an embedding")
    hidden: Count = Field(1024, description="width of the head's hidden layer")
    last_stride: Literal[1, 2] = Field(2, description="the backbone's last stride: 1 or 2")
    head: bool = Field(True, description="False: the embedding is the pooled features")

    height: int = Field(256, ge=32, description="height of the network's input, in pixels")
    width: int = Field(128, ge=16, description="width of the network's input, in pixels")
    enlarge: float = Field(
        1.125,
        ge=1,
        le=2,
        description="resize to this times the input, then crop at random; 1: no crop",
    )
    flip: bool = Field(True, description="flip half the images from left to right")
    erasing: Share = Field(0.0, description="share of images with a random rectangle erased")
    normalise: Literal["imagenet", "unit"] = Field(
        "imagenet", description="imagenet: ImageNet's mean and deviation; unit: pixels in [0, 1]"
    )

    loss: Literal["batch_hard", "batch_all", "random"] = Field(
        "batch_hard", description="which triplets: batch_hard, batch_all or random"
    )
    margin: Annotated[float, Field(ge=0)] | Literal["soft"] = Field(
        "soft", description='a number m: max(0, m + d+ - d-); "soft": softplus(d+ - d-)'
    )
    squared: bool = Field(False, description="squared Euclidean distances")
    mean: Literal["active", "valid"] = Field(
        "active",
        description="batch_all: mean over active triplets (above zero), or over all valid ones",
    )
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="of the loss over triplets: mean or sum"
    )

    p: int = Field(18, ge=2, description="identities in a batch")
    k: int = Field(4, ge=2, description="images of each identity in a batch")
    epoch: Literal["identities", "images"] = Field(
        "identities", description="what an epoch shows: identities or images"
    )
    steps: Count | None = Field(25_000, description="training steps; or give epochs")
    epochs: Count | None = Field(None, description="training epochs, instead of steps")
    lr: Positive = Field(3e-4, description="Adam's learning rate")
    decay_start: Share = Field(
        0.6, description="share of the steps after which the learning rate decays; 1: never"
    )
    decay_to: Annotated[float, Field(gt=0, le=1)] = Field(
        0.001, description="what the learning rate is multiplied by at the last step"
    )
    seed: int = Field(0, ge=0, description="of weights, batches and augmentation")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="float32, bfloat16, or auto: bfloat16 where the device is fast at it"
    )

    log_every: Count = Field(20, description="steps between two rows of history.csv")
    checkpoint_every: Count = Field(200, description="steps between two checkpoints")
    evaluate_every: Count = Field(500, description="steps between two held-out scores")

    @field_validator("weights", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and set the other to None")
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


RECIPES = {
    # What the field's small repositories do: native size, flips only, a constant small rate. Their
    # epoch has as many batches as the images fill, not the identities: github.com/jainpulkit54's
    # person_reid_batchhard, whose scores are published, makes 50 · (12,936 // 72) = 8,950 steps.
    "plain": Recipe(
        height=128,
        width=64,
        enlarge=1.0,
        normalise="unit",
        margin=0.2,
        epoch="images",
        steps=None,
        epochs=50,
        lr=3e-5,
        decay_start=1.0,
    ),
    # arXiv 1703.07737, sections 4.3 and 4.4: every default above.
    "trinet": Recipe(),
    # Small enough to learn the built-in data from random weights on one CPU core in a minute.
    "demo": Recipe(
        dataset="synthetic",
        backbone="resnet8",
        weights="none",
        height=64,
        width=32,
        steps=400,
        lr=1e-3,
        decay_to=0.01,
        checkpoint_every=100,
        evaluate_every=100,
        hold_out=20,
    ),
}


# Settings of older versions that were taken out, and the value at which each changed nothing.
RETIRED = {"small": 0.0}


# What only watches a training: two runs that differ in these alone learn the same.
WATCHING = ("log_every", "checkpoint_every", "evaluate_every")


def make_recipe(name: str = "trinet", **changes: Any) -> Recipe:
    """Return a named recipe with some settings changed.

    A change to None means "as the recipe says", so that a notebook can pass all its parameters.
    Setting `epochs` replaces the recipe's `steps`, and the other way round.

    Raises:
        ValueError: unknown recipe, unknown setting, or a value of the wrong type; names all of them.

    >>> make_recipe("plain", loss="batch_all", margin="soft").variant
    'batchall_softplus'
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    changes = {key: value for key, value in changes.items() if value is not None}
    base = RECIPES[name].model_dump()
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in changes:
            base[other] = None
    try:
        return Recipe(**(base | changes))
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def stored_recipe(settings: dict[str, Any]) -> Recipe:
    """Return the recipe that a run of this or an older version wrote down.

    Raises:
        ValueError: a setting that this version no longer has, at a value that changed something.
    """
    retired = {name: settings[name] for name in RETIRED.keys() & settings.keys()}
    used = {name: value for name, value in retired.items() if value != RETIRED[name]}
    if used:
        raise ValueError(
            f"It was made by an older version with {some(f'{n} = {v!r}' for n, v in used.items())}, "
            "which this version no longer has. The commit in its manifest.json still does."
        )
    try:
        return Recipe(**{name: settings[name] for name in settings if name not in retired})
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """Return one plain line for each wrong setting."""
    lines = []
    problems = {}
    for e in error.errors():
        problems.setdefault(str(e["loc"][0]) if e["loc"] else "", []).append(e)
    for name, found in problems.items():
        if not name:
            lines.append(found[0]["msg"].removeprefix("Value error, "))
        elif found[0]["type"] == "extra_forbidden":
            lines.append(f"Unknown setting {name!r}: there are {', '.join(Recipe.model_fields)}.")
        else:
            value = found[0]["input"]
            wanted = " or ".join(
                dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in found)
            )
            line = f"{name} = {value!r}: should be {wanted}."
            if isinstance(value, str) and _is_number(value):
                line += f" It came as text; write the number as {float(value)!r}."
            lines.append(line)
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
