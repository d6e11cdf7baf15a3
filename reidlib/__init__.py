"""reidlib: person re-identification with triplet losses, the library behind the notebooks."""

__all__ = ["load_model"]


def __getattr__(name: str):
    """Import `load_model` when it is first asked for, since torch takes a second or two."""
    if name == "load_model":
        from reidlib.model.weights import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
