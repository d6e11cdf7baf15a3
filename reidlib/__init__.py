"""reidlib: person re-identification with triplet losses, the library behind the notebooks.

    >>> import reidlib
    >>> recipe = reidlib.make_recipe("demo", margin=0.2)
    >>> recipe.variant
    'batchhard'

    run = reidlib.train(recipe)
    print(reidlib.score_run(run))

Every name below is imported when you first ask for it, since torch takes a second or two.
"""

from importlib import import_module

_HOME = {
    "recipes": ("Recipe", "make_recipe"),
    "data.tables": ("Dataset", "hold_out", "image_list", "load"),
    "data.check": ("check",),
    "data.pixels": ("load_images",),
    "data.augment": ("Augmentation",),
    "data.sampler": ("PKSampler",),
    "model.network": ("EmbeddingNet",),
    "model.weights": ("build_model", "load_model"),
    "model.embed": ("embed",),
    "model.stored": ("read_embeddings", "write_embeddings"),
    "evaluation.retrieval": ("Retrieval", "evaluate"),
    "evaluation.intervals": ("confidence_interval",),
    "evaluation.scoring": ("open_run", "score_run"),
    "look.search": ("search",),
    "look.browser": ("Browser", "ranked_list_page"),
    "training.losses": ("batch_all", "batch_hard"),
    "training.loop": ("train",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    """Import a name from its home."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value  # from now on without this detour
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
