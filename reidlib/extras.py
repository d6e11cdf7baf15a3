"""What optional packages know, those of the extra `timm`: backbones by name, and the Hub of models."""

from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from reidlib.words import did_you_mean

# Mean and deviation by which pixels in [0, 1] are normalised: one of these for all of timm's weights.
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    "satellite": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),
}


def need(package: str, what: str, extra: str = "timm") -> ModuleType:
    """Import a package of an extra, or raise a RuntimeError that says how to install it."""
    try:
        return import_module(package)
    except ImportError:
        raise RuntimeError(
            f"{what} needs the package {package}. In the folder of this workbook: "
            f'python -m pip install -c constraints.txt -e ".[{extra}]"'
        ) from None


def timm_entry(backbone: str) -> Any:
    """Return what timm says of a backbone `timm:NAME`: its normalisation, input size and classifier.

    Raises:
        RuntimeError: timm is not installed.
        ValueError: it has no such model, or no such weights of it (`NAME.TAG`).
    """
    timm, name = need("timm", backbone), backbone.removeprefix("timm:")
    entry = None
    with suppress(RuntimeError):  # of a tag that it does not know
        entry = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if not entry:
        near = did_you_mean(name, [*timm.list_models(), *timm.list_pretrained()], most=3)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{near}")
    return entry


def own_normalisation(backbone: str) -> str:
    """Return which of `NORMALISATIONS` a backbone's pretrained weights expect.

    >>> own_normalisation("resnet50")
    'imagenet'
    """
    if not backbone.startswith("timm:"):
        return "imagenet"
    entry = timm_entry(backbone)
    for name, values in NORMALISATIONS.items():
        if values == (entry.mean, entry.std):
            return name
    raise ValueError(
        f"{backbone} wants mean {entry.mean} and deviation {entry.std}: say normalise."
    )
