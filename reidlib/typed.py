"""A parameter or a setting as its annotation wants it, also where a shell gave it as text."""

import ast
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {NoneType: "none", list: "a list", tuple: "a tuple", dict: "a dictionary"}


def typed(value: Any, annotation: Any) -> Any:
    """Return a value as an annotation wants it: text is read, and whole floats become integers.

    Where text is allowed, "none" stays text: it is a value of its own, as in `weights="none"`. Of
    kinds that fit, the first is taken, so `str` stands last. `Any` takes all.

    Raises:
        ValueError: the value does not fit; says what would.

    >>> [typed("0.2", float | str), typed("soft", float | str), typed("1e3", int), typed(7, str)]
    [0.2, 'soft', 1000, '7']
    >>> [typed("true", bool), typed("none", int | None), typed("[0, 1]", list), typed("2", Any)]
    [True, None, [0, 1], 2]
    """
    if annotation is Any:  # text that looks like a number is one
        annotation = int | float | bool | None | Any
    kinds = alternatives(annotation)
    adapter = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    with suppress(ValidationError):
        if not isinstance(value, str):
            return adapter.validate_python(value, strict=True)
        if NoneType in kinds and str not in kinds and value.lower() in ("none", "null"):
            return None
        return adapter.validate_strings(value)
    if str in kinds and type(value) is int and not {int, float} & {*kinds}:
        return str(value)  # what looks like a number in a shell, as the tag 7
    with suppress(ValueError, SyntaxError):  # "1e3" and 2.0 are whole; "[0, 1]"; the 2 of a Literal
        read = ast.literal_eval(value) if isinstance(value, str) else value
        whole = int in kinds and isinstance(read, float) and read.is_integer()
        return adapter.validate_python(int(read) if whole else read, strict=True)
    raise ValueError(f"{value!r} should be {in_words(annotation)}.")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return what a union allows, or the annotation alone.

    >>> alternatives(float | Literal["soft"])
    (<class 'float'>, typing.Literal['soft'])
    """
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def in_words(annotation: Any, words: dict = _WORDS, between: str = " or ", say=repr) -> str:
    """Say what an annotation wants: kinds by their `words`, literals as `say` has them.

    >>> in_words(float | Literal["soft"])
    "a number or 'soft'"
    """
    said = []
    for kind in alternatives(annotation):
        literal = get_origin(kind) is Literal
        said += map(say, get_args(kind)) if literal else [words.get(kind, str(kind))]
    return between.join(said)
