"""Weights from a file into a network and back: of a backbone before training, of a whole model after it."""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from reidlib.extras import need, timm_entry
from reidlib.model.elsewhere import of_backbone
from reidlib.model.network import EmbeddingNet
from reidlib.paths import data_dir
from reidlib.recipes import Recipe, listed, stored_recipe
from reidlib.runs import find_run, read_json, write_atomically
from reidlib.words import some

HUB = "hf-hub:"
PUBLISHED = "model.safetensors"  # what the Hub calls the file of a model


def build_model(recipe: Recipe, pretrained: bool = True) -> EmbeddingNet:
    """Return a recipe's network as it is before the first step: its seed decides random weights.

    A relative path of weights is looked for in the working directory, then in the data folder. The
    caller's random state is left as it was.

    Raises:
        FileNotFoundError, ValueError: no such file of weights, or one that does not fit.
        RuntimeError: the weights could not be downloaded, or timm is not installed.

    >>> from reidlib.recipes import make_recipe
    >>> build_model(make_recipe("demo", dim=64)).dim
    64
    """
    sizes = recipe.model_dump(
        include={"backbone", "dim", "hidden", "last_stride", "head", "pooling_power", "norm"}
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = EmbeddingNet(**sizes, size=(recipe.height, recipe.width))
    if pretrained and recipe.weights != "none":
        _load_pretrained(model, recipe)
    return model


def save_weights(path: Path, model: nn.Module, recipe: Recipe, *, half: bool = False) -> None:
    """Write a model alone, with its recipe and a SHA-256 of all in the file: it is enough by itself.

    `half`: matrices and filters as float16. The rest is little, and a small variance of a BatchNorm
    would be lost.
    """
    state = {
        key: (value.half() if half and value.dim() > 1 else value).contiguous()
        for key, value in model.state_dict().items()
    }
    said = recipe.model_dump()
    said["sha256"] = _digest(safetensors.torch.save(state), said)
    # One entry: the order of several is not fixed, and equal models shall make equal files.
    # Not safetensors' save_file: what it makes only its owner may read.
    content = safetensors.torch.save(state, {"reidlib_recipe": json.dumps(said)})
    write_atomically(path, lambda file: file.write_bytes(content), len(content))


def weights_file(run: str | Path) -> Path:
    """Return the file of a trained model: of a run, by its name or folder, the file itself, or the Hub's.

    `hf-hub:owner/name[@revision]` is downloaded, once. A folder that `publish` made is as good as a run.
    """
    if str(run).startswith(HUB):
        return _from_hub(str(run))
    path = Path(run).expanduser()
    if (path / PUBLISHED).is_file():
        path = path / PUBLISHED
    if not (path.suffix == ".safetensors" and path.is_file()):
        path = find_run(run) / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: its training has not ended, or they were lost. "
            f"{_way_out(path)}"
        )
    return path.resolve()


def _from_hub(name: str, file: str = PUBLISHED) -> Path:
    """Download a file of a model from the Hub of Hugging Face, or take it from its cache."""
    hub = need("huggingface_hub", name)
    place, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(hub.hf_hub_download(place, file, revision=revision or None))
    except Exception as error:  # of the Hub's, of its client's, and of the file system
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise RuntimeError(
            f"{name} could not be had ({cause}). Is the name hf-hub:owner/name? Or download its {file} where "
            "you can, and give the path of that file."
        ) from error


def _way_out(path: Path) -> str:
    """Say how to have the weights of a run again."""
    if not path.with_name("checkpoint.pt").is_file():
        return "Take that file from where it came from, or train the run again."
    command = read_json(path.with_name("manifest.json"), {}).get("reproduce", "")
    return f"Train it as before, and they are written from its checkpoint.pt. {command}".rstrip()


def load_model(
    run: str | Path, device: str | torch.device = "cpu", unreadable: str | None = None
) -> EmbeddingNet:
    """Return a trained network in evaluation mode; its attribute `recipe` says what input it expects.

    Args:
        run: a run's name, its folder, a file that `save_weights` wrote, or `hf-hub:owner/name`.
        device: where to put it.
        unreadable: what its recipe shall say of broken images; None: what it says.

    Raises:
        FileNotFoundError, ValueError: no such run, no weights in it, or a broken or foreign file.
        RuntimeError: a model of the Hub that could not be had, or a package that it needs is missing.

    >>> model = load_model("outputs/synthetic_batchhard_softplus_example")
    >>> model.recipe.backbone, model.dim
    ('resnet8', 128)
    """
    path = weights_file(run)
    try:
        state, said = _read_safetensors(path)
        if not said:
            raise ValueError(
                "it has no recipe inside, so it is not a model of this library. "
                "Backbone weights from elsewhere go into training: weights=PATH."
            )
        model = build_model(stored_recipe(said), pretrained=False)
        _load(model, state, "it does not fit the network of its recipe")  # float16 becomes float32
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error} {_way_out(path)}") from error
    model.recipe = stored_recipe(said | ({"unreadable": unreadable} if unreadable else {}))
    return model.eval().to(device)


def _digest(content: bytes, recipe: dict[str, Any]) -> str:
    """Return a SHA-256 of what a safetensors file holds: its tensors, and the recipe beside them."""
    start = 8 + int.from_bytes(content[:8], "little")  # of the numbers; before it a JSON header
    tensors = json.loads(content[8:start])
    tensors.pop("__metadata__", None)
    header = json.dumps([recipe, tensors], sort_keys=True)
    return hashlib.sha256(header.encode() + content[start:]).hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and the recipe that `save_weights` put there, or {}.

    Raises:
        ValueError: cut short, or altered: a SHA-256, in the file itself or in the manifest of its run,
            is of something else. Runs of older versions have none.
    """
    content = path.read_bytes()
    try:
        state = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said = json.loads(header.get("__metadata__", {}).get("reidlib_recipe", "{}"))
        own = said.pop("sha256", None)
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"it is cut short or altered ({error}).") from error
    manifest = path.with_name("manifest.json")
    run = read_json(manifest, {}) if path.name == "weights.safetensors" else {}
    # While it trains, a manifest may be of weights that are yet to come.
    known = run.get("weights_sha256") if run.get("status") == "finished" else None
    if own not in (None, _digest(content, said)):
        raise ValueError("it is altered: its numbers are not those of the SHA-256 inside.")
    if known not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"it is altered, or of another run: {manifest} has another SHA-256.")
    return state, said


def _load(network: nn.Module, state: dict[str, Tensor], what: str, hint: str = "") -> None:
    """Load a state dict, every key or none: finite floating-point numbers of the right shapes."""
    own = network.state_dict()
    both = [k for k in own if k in state]
    numbers = [k for k in both if own[k].is_floating_point()]
    floats = [k for k in numbers if state[k].is_floating_point()]
    # Files older than PyTorch 0.4.1 lack BatchNorm's counter, which nothing here reads.
    problems = {
        "lacks": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "has unknown": [k for k in state if k not in own],
        "has other shapes in": [k for k in both if own[k].shape != state[k].shape],
        "has no floating-point numbers in": [k for k in numbers if k not in floats],
        "has NaN or infinity in": [k for k in floats if not state[k].isfinite().all()],
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"{what}: the file {problem} {len(keys)} of its {len(own)} keys: {some(keys)}.{hint}"
            )
    network.load_state_dict(state, strict=False)


def _load_pretrained(model: EmbeddingNet, recipe: Recipe) -> None:
    """Load `"imagenet"` weights, or a file's or a trained run's, every key or none, but for a classifier's.

    A trained run gives its head and last BatchNorm, too, where the sizes are the same. Of several, it
    is the mean of their weights ("Model soups", arXiv 2203.05482).
    """
    name, weights = recipe.backbone, recipe.weights
    states = []
    for one in listed(weights):
        state, learnt = (_imagenet_weights(name), {}) if one == "imagenet" else _read(one)
        _refuse_known_people(recipe, learnt)
        states.append({k.removeprefix("module."): v for k, v in state.items()})
    shapes = [{k: v.shape for k, v in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"The weights {weights!r} are of different networks: there is no mean of them."
        )
    state = {k: _mean([one[k] for one in states]) for k in states[0]}
    after = ("head.", "norm.")
    both = (state, model.state_dict())
    rest, own = ({k: v.shape for k, v in s.items() if k.startswith(after)} for s in both)
    whole = own and rest == own and any(k.startswith("backbone.") for k in state)
    network = model if whole else model.backbone
    if not whole:
        state = of_backbone(state, name, model.backbone)
    hint = (
        f" It must be a state dict of {name}, or a trained run's weights: docs/runs.md has a table."
    )
    _load(network, state, f"The weights {weights!r} do not fit {name}", hint)


def _mean(tensors: list[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, of the first one's type; in float64, as some are halved."""
    if len(tensors) == 1:
        return tensors[0]
    mean = torch.stack([tensor.double() for tensor in tensors]).mean(dim=0)
    return mean.to(tensors[0].dtype)


def _refuse_known_people(recipe: Recipe, learnt: dict[str, Any]) -> None:
    """Raise a ValueError where weights, by the recipe in them, were trained on people now held out."""
    both = {*listed(recipe.dataset)} & {*listed(learnt.get("dataset", ""))}
    if recipe.hold_out and both and learnt["hold_out"] != recipe.hold_out:
        raise ValueError(
            f"The weights {recipe.weights!r} were trained on {some(sorted(both))} with hold_out = "
            f"{learnt['hold_out']!r}, so they may know the people that are held out here, "
            f"{recipe.hold_out!r}, whose score would say nothing. Start from weights that held out the same, "
            "or hold out nobody."
        )


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights, or timm's pretrained ones, or take them from the caches."""
    entry = timm_entry(name) if name.startswith("timm:") else None
    if entry and entry.hf_hub_id:
        file = entry.hf_hub_filename or PUBLISHED
        return _read(str(_from_hub(HUB + entry.hf_hub_id, file)))[0]
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


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, and the recipe that a trained run left in it, or {}.

    From a `.safetensors` file, from any other with `weights_only=True`, or from a run.
    """
    places = (Path(name).expanduser(), data_dir() / name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        try:
            path = weights_file(name)
        except FileNotFoundError as error:
            told = f"There is no file of weights {name!r}, nor of a run of that name: give a path, a run"
            raise FileNotFoundError(f'{told} or "imagenet". {error}') from error
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state dict (a dictionary of tensors by name).")
    return state, {}


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote: tensors and plain values alone, never an object that is code.

    Raises:
        ValueError: anything else, or no such file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old protocols, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        cause = str(error).split("\n")[0] or type(error).__name__
        if "weights" in cause.lower() and "only" in cause.lower():  # torch's advice is to run it
            found = re.search(r"GLOBAL (\S+)", str(error))
            cause = (
                f"it holds {found[1] if found else 'something'} beside tensors and plain numbers. That "
                "could run code, so it is not read. Where the file was made, save the network alone: "
                "torch.save(model.state_dict(), PATH)"
            )
        raise ValueError(cause) from error
