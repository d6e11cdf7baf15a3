"""reidlib: person re-identification with triplet losses, the library behind the notebooks."""

from reidlib.runs import load_model

__all__ = ["load_model"]
