"""Weights from a file into a network and back: of a backbone before training, of a whole model after it."""

import json
from pathlib import Path
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from reidlib.model.network import EmbeddingNet
from reidlib.paths import data_dir
from reidlib.recipes import Recipe, stored_recipe
from reidlib.runs import find_run, write_atomically
from reidlib.words import some


def build_model(recipe: Recipe, pretrained: bool = True) -> EmbeddingNet:
    """Return a recipe's network as it is before the first step: its seed decides random weights.

    A relative path of weights is looked for in the working directory, then in the data folder. The
    caller's random state is left as it was.

    Raises:
        FileNotFoundError, ValueError: no such file of weights, or one that does not fit.
        RuntimeError: torchvision's weights could not be downloaded.

    >>> from reidlib.recipes import make_recipe
    >>> build_model(make_recipe("demo", dim=64)).dim
    64
    """
    sizes = recipe.model_dump(include={"backbone", "dim", "hidden", "last_stride", "head"})
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = EmbeddingNet(**sizes)
    if pretrained and recipe.weights != "none":
        _load_backbone(model.backbone, recipe.backbone, recipe.weights)
    return model


def save_weights(path: Path, model: nn.Module, recipe: Recipe, *, half: bool = False) -> None:
    """Write a model alone, with its recipe in the file, so that one file is enough to load it.

    `half`: matrices and filters as float16. The rest is little, and a small variance of a BatchNorm
    would be lost.
    """
    state = {
        key: (value.half() if half and value.dim() > 1 else value).contiguous()
        for key, value in model.state_dict().items()
    }
    # One entry: the order of several is not fixed, and equal models shall make equal files.
    # Not safetensors' save_file: what it makes only its owner may read.
    content = safetensors.torch.save(state, {"reidlib_recipe": recipe.model_dump_json()})
    write_atomically(path, lambda file: file.write_bytes(content))


def weights_file(run: str | Path) -> Path:
    """Return the file of a trained model: of a run, by its name or folder, or the file itself."""
    path = Path(run).expanduser()
    if not (path.suffix == ".safetensors" and path.is_file()):
        path = find_run(run) / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: its training has not ended.")
    return path.resolve()


def load_model(run: str | Path, device: str | torch.device = "cpu") -> EmbeddingNet:
    """Return a trained network in evaluation mode; its attribute `recipe` says what input it expects.

    Args:
        run: a run's name, its folder, or a file that `save_weights` wrote.
        device: where to put it.

    Raises:
        FileNotFoundError, ValueError: no such run, no weights in it, or a broken or foreign file.

    >>> model = load_model("outputs/synthetic_batchhard_softplus_example")
    >>> model.recipe.backbone, model.dim
    ('resnet8', 128)
    """
    path = weights_file(run)
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = stored_recipe(json.loads((file.metadata() or {})["reidlib_recipe"]))
        state = safetensors.torch.load_file(path)
    except KeyError as error:
        raise ValueError(
            f"{path} has no recipe inside, so it is not a model of this library. "
            "Backbone weights from elsewhere go into training: weights=PATH."
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    model = build_model(recipe, pretrained=False)
    model.load_state_dict(state)  # float16 becomes float32
    model.recipe = recipe
    return model.eval().to(device)


def _load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Load `"imagenet"` weights or a file of weights, every key or none, but for a classifier's."""
    state = _imagenet_weights(name) if weights == "imagenet" else _read_weights(weights)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    own = backbone.state_dict()
    both = [k for k in own if k in state]
    # Files older than PyTorch 0.4.1 lack BatchNorm's counter, which nothing here reads.
    problems = {
        "lacks": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "has unknown": [k for k in state if k not in own],
        "has other shapes in": [k for k in both if own[k].shape != state[k].shape],
        "has NaN or infinity in": [k for k in both if not state[k].isfinite().all()],
    }
    for what, keys in problems.items():
        if keys:
            raise ValueError(
                f"The weights {weights!r} do not fit {name}: the file {what} {len(keys)} of its "
                f"{len(own)} keys: {some(keys)}. It must be a state dict of torchvision's {name}."
            )
    backbone.load_state_dict(state, strict=False)


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights, or take them from its cache."""
    if name not in models.list_models():
        raise ValueError(f'There are no ImageNet weights of {name}: choose weights="none".')
    source = models.get_model_weights(name).IMAGENET1K_V1
    try:
        return source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"The ImageNet weights of {name} could not be had from {source.url} ({error}). Download "
            'that file where you can, and give its path: weights=PATH. Or train without: "none".'
        ) from error


def _read_weights(name: str) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or with `weights_only=True` from any other."""
    places = (Path(name).expanduser(), data_dir() / name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f'There is no file of weights {name!r}: give a path or "imagenet".')
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds
        cause = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a file of weights: {cause}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a dictionary of tensors by name).")
    return state
