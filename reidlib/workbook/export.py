"""A trained network as one ONNX file, for programs that have neither PyTorch nor this library.

The graph takes resized RGB pixels, float32 from 0 to 255, and holds the normalisation: there is
nothing to forget or to do twice. What stays outside is decoding and resizing, which ONNX runtimes do
differently; `FILE.onnx.json` beside the model and the model's own metadata (key `reidlib`) say how.
With NumPy, Pillow and ONNX Runtime alone, and `network_input` copied from this file:

    import json

    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps

    with open("model.onnx.json", encoding="utf-8") as file:
        card = json.load(file)
    size = card["input"]["shape"][2:]
    opened = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    batch = np.stack([network_input(np.asarray(image), *size) for image in opened])
    session = onnxruntime.InferenceSession("model.onnx")
    (emb,) = session.run([card["output"]["name"]], {card["input"]["name"]: batch})  # (B, D)
"""

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reidlib.extras import NORMALISATIONS
from reidlib.model.embed import embed
from reidlib.model.network import EmbeddingNet
from reidlib.model.weights import HUB, load_model, weights_file
from reidlib.recipes import bare
from reidlib.runs import sha256, write_atomically, write_json

TOLERANCE = 1e-4  # the largest difference of any number of an embedding …
ROUNDING = 1e-5  # … or this share of the largest one, where float32 itself is no more exact
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # what torch's exporter speaks by itself; a newer one would be converted to
BATCHES = (1, 2, 3)  # sizes that are checked beside the whole set


def export(
    run: str | Path,
    out: str | Path,
    images: Sequence[np.ndarray] | None = None,
    normalised: bool = False,
) -> tuple[Path, dict]:
    """Write a trained network as ONNX, once it is shown to compute what the network computes.

    Args:
        run: a run's name, its folder, or a `weights.safetensors`.
        out: the file, ending in `.onnx`, or a folder, where it is named after the run. `FILE.json`
            is written beside it.
        images: (H, W, 3) uint8 pictures of any sizes on which model and file are compared; by
            default random ones.
        normalised: the graph takes pixels that are normalised already, as BoxMOT and OpenCV's samples
            give them, and does not do it again.

    Returns:
        The ONNX file, and what the JSON beside it says. Both files are complete or not written; ones
        that stood there before stay when the export fails.

    Raises:
        RuntimeError: onnx, onnxscript or onnxruntime is missing (says what to install), or
            embeddings differ by more than `TOLERANCE` (`ROUNDING` where numbers exceed 10).
        FileNotFoundError, ValueError: no such run; no file can be named `out`.
    """
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise RuntimeError(
            f"To export, you need more packages: python -m pip install {' '.join(missing)}"
        )
    weights, out = weights_file(run), Path(out).expanduser()
    name = weights.parent.name if weights.stem in ("weights", "model") else weights.stem
    name = Path(run).name if str(run).startswith(HUB) else name
    out = out if out.suffix.lower() == ".onnx" else out / f"{name}.onnx"
    if out.is_dir() or (out.parent.exists() and not out.parent.is_dir()):
        raise ValueError(f"{out} cannot be written: give a folder, or a file ending in .onnx.")
    model = load_model(weights)
    card = _card(model, name, sha256(weights), normalised)
    content = _graph(model, card)
    what = "pictures that were given" if images is not None else "random pictures"
    if images is None:
        images = _random_images(model.recipe.height, model.recipe.width)
    card["parity"] = _parity(content, model, images, card) | {"checked_on": f"{len(images)} {what}"}
    card["sha256"] = hashlib.sha256(content).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_name(out.name + ".json"), card)
    write_atomically(out, lambda temporary: temporary.write_bytes(content))
    return out, card


def network_input(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 as the exported graph takes it: (3, height, width) float32.

    NumPy and Pillow alone. Bilinear with antialiasing: the very filter of
    `torch.nn.functional.interpolate(…, mode="bilinear", antialias=True)`. Each channel in 32-bit
    floating point, since 8-bit pictures would be rounded to whole levels.

    >>> network_input(np.full((128, 64, 3), 7, np.uint8), 4, 2)[0].tolist()
    [[7.0, 7.0], [7.0, 7.0], [7.0, 7.0], [7.0, 7.0]]
    """
    channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(image, 2, 0)]  # mode F
    resized = [c.resize((width, height), Image.Resampling.BILINEAR) for c in channels]
    return np.stack([np.asarray(c) for c in resized])


class _WithNormalisation(nn.Module):
    """The network from pixels in [0, 255], as `Augmentation.plain` normalises them."""

    def __init__(self, model: EmbeddingNet, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D) of pixels (B, 3, H, W)."""
        return self.model((images / 255 - self.mean) / self.std)


def _card(model: EmbeddingNet, name: str, digest: str, normalised: bool) -> dict:
    """Return what a program must know to use the graph, and where it came from."""
    recipe = model.recipe
    height, width = recipe.height, recipe.width
    mean, std = NORMALISATIONS[recipe.normalise]
    card = json.loads(Path(__file__).with_name("onnx_card.json").read_text(encoding="utf-8"))
    card["input"]["shape"] = ["batch", 3, height, width]
    card["output"]["shape"] = ["batch", model.dim]
    card["preprocessing"]["resize"] |= {"height": height, "width": width}
    card["preprocessing"]["normalisation"] |= {"mean": list(mean), "std": list(std)}
    if normalised:
        card["input"]["range"] = "normalised"
        card["preprocessing"]["normalisation"]["inside_the_graph"] = False
    origin = {"run": name, "trained_on": bare(recipe.dataset), "variant": recipe.variant}
    origin |= recipe.model_dump(
        include={"backbone", "last_stride", "pooling_power", "norm", "head"}
    )
    card["model"] = origin | {"weights_sha256": digest}
    card["made_with"] = {"torch": torch.__version__, "opset": OPSET}
    return card


def _graph(model: EmbeddingNet, card: dict) -> bytes:
    """Return the ONNX file."""
    import onnx
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    normalisation = card["preprocessing"]["normalisation"]
    network = _WithNormalisation(model, normalisation["mean"], normalisation["std"]).eval()
    network = network if normalisation["inside_the_graph"] else model
    images = torch.zeros(2, *card["input"]["shape"][1:])  # sizes 0 and 1 are taken for constants
    options = {"dynamo": True, "opset_version": OPSET, "verbose": False}
    options |= {f"{side}_names": [card[side]["name"]] for side in ("input", "output")}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1)},)
    # The exporter likes to talk; results and errors are enough.
    with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
        program = torch.onnx.export(network, (images,), **options)
    # Stack traces of the exporter: half of a small file, and paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props["reidlib"] = json.dumps(card, ensure_ascii=False)
    proto = program.model_proto
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _random_images(height: int, width: int) -> list[np.ndarray]:
    """Return pictures of the input's size and of others, smaller and larger."""
    random = np.random.default_rng(0)
    sizes = [(height, width)] * 4 + [(height // 2, width // 2), (2 * height + 1, 3 * width)]
    sizes += [(height, 2 * width), (128, 64)]
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def _parity(content: bytes, model: EmbeddingNet, images: Sequence, card: dict) -> dict[str, float]:
    """Return how far the file's embeddings of pictures are from the library's, and how far they may.

    Raises:
        RuntimeError: they are farther.
    """
    import onnxruntime

    if len(images) == 0:
        raise ValueError("There are no pictures to compare model and ONNX file on.")
    recipe = model.recipe
    expected = np.concatenate([embed(model, i[None], recipe, show_progress=False) for i in images])
    batch = np.stack([network_input(i, recipe.height, recipe.width) for i in images])
    if not card["preprocessing"]["normalisation"]["inside_the_graph"]:
        mean, std = np.float32(NORMALISATIONS[recipe.normalise])[..., None, None]
        batch = (batch / np.float32(255) - mean) / std
    allowed = max(TOLERANCE, ROUNDING * float(np.abs(expected).max()))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    # A single picture makes batches of several, too.
    rows = [np.arange(size) % len(images) for size in (*BATCHES, len(images))]
    found = np.concatenate([session.run(None, {name: batch[r]})[0] for r in rows])
    difference = float(np.abs(found - expected[np.concatenate(rows)]).max())
    if not difference <= allowed:  # NaN too
        raise RuntimeError(
            "The ONNX file does not compute what the model computes: embeddings differ by "
            f"{difference:.2g}, and {allowed:.2g} is allowed. Nothing was written."
        )
    return {"max_abs_difference": difference, "tolerance": allowed}
