"""Weights from a file into a network and back: of a backbone before training, of a whole model after it."""

import json
from pathlib import Path
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from reidlib.model.network import BACKBONES, EmbeddingNet
from reidlib.paths import data_dir
from reidlib.recipes import Recipe, stored_recipe
from reidlib.runs import find_run, write_atomically
from reidlib.words import some


def build_model(recipe: Recipe, pretrained: bool = True) -> EmbeddingNet:
    """Return a recipe's network as it is before the first step: its seed decides random weights.

    A relative path of weights is looked for in the working directory, then in the data folder. The
    caller's random state is left as it was.

    Raises:
        ValueError: a file of weights that does not fit.
        FileNotFoundError: no such file of weights.
        RuntimeError: torchvision's weights could not be downloaded.

    >>> from reidlib.recipes import make_recipe
    >>> build_model(make_recipe("demo", dim=64)).dim
    64
    """
    weights = None if recipe.weights == "none" or not pretrained else recipe.weights
    if weights not in (None, "imagenet") and not Path(weights).expanduser().is_file():
        in_data = data_dir() / weights
        weights = in_data if in_data.is_file() else weights
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = EmbeddingNet(
            recipe.backbone, recipe.dim, recipe.hidden, recipe.last_stride, recipe.head
        )
    if weights is not None:
        load_backbone_weights(model.backbone, recipe.backbone, weights)
    return model


def save_weights(path: Path, model: torch.nn.Module, recipe: Recipe, *, half: bool = False) -> None:
    """Write a model alone, with its recipe in the file, so that one file is enough to load it.

    `half`: matrices and filters as float16. The rest is little, and a small variance of a BatchNorm
    would be lost.
    """
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.dim() > 1 else v for k, v in state.items()}
    # One entry: the order of several is not fixed, and equal models shall make equal files.
    metadata = {"reidlib_recipe": recipe.model_dump_json()}
    # Not safetensors' save_file: what it makes only its owner may read.
    content = safetensors.torch.save(state, metadata)
    write_atomically(path, lambda file: file.write_bytes(content))


def weights_file(run: str | Path) -> Path:
    """Return the file of a trained model: of a run, by its name or folder, or the file itself.

    Raises:
        FileNotFoundError: no such run, or a run without weights.
    """
    path = Path(run).expanduser()
    if not (path.suffix == ".safetensors" and path.is_file()):
        path = find_run(run) / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no weights.safetensors: its training has not ended."
        )
    return path.resolve()


def load_model(run: str | Path, device: str | torch.device = "cpu") -> EmbeddingNet:
    """Return a trained network, ready to embed, from a run or from a `weights.safetensors` alone.

    Args:
        run: a run's name, its folder, or a file that `save_weights` wrote.
        device: where to put it.

    Returns:
        The network in evaluation mode; its `recipe` attribute says what input it expects.

    Raises:
        FileNotFoundError: no such run, or a run without weights.
        ValueError: the file is broken or is not one of ours.

    >>> from reidlib.recipes import make_recipe
    >>> from reidlib.training.loop import train
    >>> recipe = make_recipe("demo", hold_out=0, height=32, width=16, p=4, k=2, steps=1)
    >>> run = train(recipe, show_progress=False)
    >>> load_model(run).training
    False
    """
    path = weights_file(run)
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = stored_recipe(json.loads((file.metadata() or {})["reidlib_recipe"]))
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except KeyError as error:
        raise ValueError(
            f"{path} has no recipe inside, so it is not a model of this library. "
            f"Backbone weights from elsewhere go into training: weights=PATH."
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    model = build_model(recipe, pretrained=False)
    model.load_state_dict(
        {k: v.long() if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    )
    model.recipe = recipe
    return model.eval().to(device)


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | Path) -> None:
    """Load `"imagenet"` weights or a file of weights into a backbone, every key or none.

    A classifier in the file is passed over. Nothing is unpickled beyond tensors.

    Raises:
        ValueError: keys missing, unknown, or of another shape; a file that cannot be read.
        FileNotFoundError: no such file.
        RuntimeError: the download failed.
    """
    state = _imagenet_weights(name) if weights == "imagenet" else read_weights(weights)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    own = backbone.state_dict()
    # Files older than PyTorch 0.4.1 lack BatchNorm's counter, which nothing here reads.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    broken = [k for k in own if k in state and not state[k].isfinite().all()]
    for keys, what in (
        (missing, "lacks"),
        (unknown, "has unknown"),
        (shapes, "has other shapes in"),
        (broken, "has NaN or infinity in"),
    ):
        if keys:
            raise ValueError(
                f"The weights {str(weights)!r} do not fit {name}: the file {what} {len(keys)} of its "
                f"{len(own)} keys: {some(keys)}. It must be a state dict of torchvision's {name}."
            )
    backbone.load_state_dict(state, strict=False)


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights, or take them from its cache."""
    _, source, _ = BACKBONES[name]
    if source is None:
        raise ValueError(f'There are no ImageNet weights of {name}: choose weights="none".')
    try:
        return source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"The ImageNet weights of {name} could not be had from {source.url} ({error}). "
            f"Download that file on a machine that can, and give its path: weights=PATH. "
            f'Or train from random weights: weights="none".'
        ) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or with `weights_only=True` from any other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights, or a truncated one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no file of weights at {path}. Give a path, "imagenet", or "none".'
        )
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
