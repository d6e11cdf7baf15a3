"""Notebooks from a shell, headless: which there are, their parameters, and chains of them.

Papermill passes parameters that no notebook knows; `run` and `check_parameters` refuse them.
`check_parameters` and `result` are called in notebooks.
"""

import ast
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from IPython import get_ipython

from reidlib.paths import ROOT, outputs_dir
from reidlib.progress import in_notebook
from reidlib.typed import in_words, typed
from reidlib.words import did_you_mean
from reidlib.workbook.headless import RESULT, execute

INJECTED = "# Parameters"  # the first line of the cell that papermill injects


# --- called in a notebook


def check_parameters(history: Sequence[str]) -> None:
    """Refuse parameters that the notebook does not have; papermill would pass them in silence.

    A notebook calls `check_parameters(In)` after its imports. Among the sources of the cells that
    ran, papermill's injected cell comes right after the notebook's own parameters. Without one, as
    in JupyterLab, there is nothing to check.

    Raises:
        ValueError: a name is assigned in the injected cell and not in the one before it.

    >>> check_parameters(["", "margin = 0.2", "# Parameters\\nmarign = 0.5"])
    Traceback (most recent call last):
    ValueError: There is no parameter 'marign'; did you mean 'margin'? There are: margin.
    """
    for before, source in zip(history, history[1:], strict=False):
        known = _assigned(before)
        if known and source.split("\n", 1)[0].strip() == INJECTED:
            unknown = [name for name in _assigned(source) if name not in known]
            if unknown:
                raise ValueError(_unknown(unknown, list(known)))
            return  # cells that are run again come later


def given(names: Iterable[str]) -> dict[str, Any]:
    """Return those of a notebook's own variables, by name: `make_recipe(recipe, **given(SETTINGS))`.

    So the parameters cell of a notebook is the one place where a setting is typed.
    """
    variables = get_ipython().user_ns
    return {name: variables[name] for name in names if name in variables}


def result(**values: str | float | bool | None) -> None:
    """Say at a notebook's end what it made, for the notebooks after it in a chain.

    `result(run="market1501_batchhard")` shows one line, and `run` passes it to every later notebook
    that has a parameter `run`, unless that is given by hand. Elsewhere it only shows.

    >>> result(run="demo")
    run = 'demo'
    """
    values = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()}
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    if in_notebook():
        from IPython.display import display

        display({RESULT: values, "text/plain": text}, raw=True)
    else:
        print(text)


# --- what a notebook declares


class Parameter(NamedTuple):
    """One name of a parameters cell: the type that it is given, and its default."""

    annotation: Any
    default: Any


def read_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Return what the cell tagged `parameters` of a notebook assigns, by name.

    The type is that of the annotation (`margin: float | str = "soft"`), else that of the default.
    Read by `ast`: papermill's own reader loses a line with a second "=", as in its comment.

    Raises:
        ValueError: not a notebook, or a parameters cell that is not Python.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a Jupyter notebook (format 4): {error!r}.") from error
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"The parameters cell of {notebook} is not Python: {error}.") from error
    return {name: _parameter(*found) for name, found in _assigned(source).items()}


def _assigned(source: str) -> dict[str, tuple[ast.expr | None, ast.expr | None]]:
    """Return what a cell assigns at its top level: name -> (annotation, value)."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell with something of IPython in it
        return {}
    found = {}
    for node in body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = (node.annotation, node.value)
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                found |= dict.fromkeys(names, (None, node.value))
    return found


def _parameter(annotation: ast.expr | None, value: ast.expr | None) -> Parameter:
    default = None
    if value is not None:
        with suppress(ValueError):
            default = ast.literal_eval(value)
    try:
        kind = _annotation(annotation)
    except (KeyError, ValueError, TypeError):  # none, or something imported
        # A bare `steps = None` does not say what it takes.
        return Parameter(Any if default is None else type(default), default)
    return Parameter(kind | None if default is None else kind, default)


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}


def _annotation(node: ast.expr | None) -> Any:
    """Return the type that an annotation names; nothing of a notebook is run for it.

    Raises:
        KeyError: it is made of something else than plain types, `Literal`, None and `|`.
    """
    match node:
        case ast.Name(id=name):
            return _TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _annotation(left) | _annotation(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return Literal[ast.literal_eval(values)]
        case ast.Subscript(value=outer):  # list[int]
            return _annotation(outer)
    raise KeyError(node)


def _fitting(name: str, value: Any, parameter: Parameter, notebook: str) -> Any:
    """Return a value as the parameter's type, or refuse it."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    try:
        return typed(value, parameter.annotation)
    except ValueError:
        raise ValueError(
            f"{name} = {value!r}: {notebook} wants {in_words(parameter.annotation)} "
            f"(its default is {parameter.default!r})."
        ) from None


def _unknown(names: list[str], known: list[str]) -> str:
    """Say which names are no parameters, and which there are."""
    said = [f"There is no parameter {name!r}{did_you_mean(name, known)}" for name in names]
    return " ".join([*said, f"There are: {', '.join(known)}."])


# --- running


def find_notebook(name: str | Path) -> Path:
    """Return the path of a notebook: `"03_train"`, `"03"`, or a path.

    Raises:
        FileNotFoundError: none such; names those that there are.
        ValueError: a number that two notebooks begin with.
    """
    folder = ROOT / "notebooks"
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    stem = Path(name).name.removesuffix(".ipynb")
    found = [folder / f"{stem}.ipynb"]
    if not found[0].is_file():
        found = sorted(folder.glob(f"{stem}_*.ipynb")) if stem.isdigit() else []
    if len(found) > 1:
        raise ValueError(f"{name} could be {' or '.join(path.stem for path in found)}.")
    if not found:
        known = [path.stem for path in sorted(folder.glob("*.ipynb"))]
        raise FileNotFoundError(
            f"There is no notebook {str(name)!r}{did_you_mean(stem, known)} "
            f"In {folder} there are: {', '.join(known) or 'none'}."
        )
    return found[0]


def run(
    names: str | Path | Sequence[str | Path],
    parameters: dict[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    timeout: float | None = None,
    show_progress: bool = True,
) -> list[Path]:
    """Run notebooks one after another, each in a kernel of its own, and return the executed copies.

    Each gets the parameters that its parameters cell declares, and what the notebooks before it
    gave by `result`, where it declares that and it is not given by hand. The kernel is always this
    interpreter's. Ctrl-C and SIGTERM interrupt the running cell, so that a training writes its
    checkpoint; a second one ends the kernel at once.

    Args:
        names: `"03_train"`, `"03"` or paths.
        parameters: by name. Text is read as the type that the notebook declares, as from a shell.
        output: folder of the executed copies, or for one notebook a file; by default
            `outputs/notebooks`. A copy appears when its notebook has run to the end; what a failed
            one left is `<name>.failed.ipynb` beside it, and an earlier good copy stays.
        timeout: seconds that a cell may take; None for no limit.
        show_progress: say on standard error when a notebook starts and ends.

    Raises:
        ValueError, FileNotFoundError: before anything runs: no such notebook, a parameter that none
            of them declares, or one of the wrong type.
        NotebookFailed: an error in a cell, a cell over `timeout`, a dead kernel, or cells that were
            never run.
        KeyboardInterrupt, SystemExit: it was stopped.
    """
    paths = [find_notebook(n) for n in ([names] if isinstance(names, str | Path) else names)]
    if not paths:
        raise ValueError("There are no notebooks to run: name one or more, such as 03_train.")
    declared = [read_parameters(path) for path in paths]
    parameters = parameters or {}
    known = list(dict.fromkeys(name for notebook in declared for name in notebook))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        where = "its cell" if len(paths) == 1 else "their cells"
        raise ValueError(
            f"{_unknown(unknown, known)} See {where} tagged 'parameters': "
            f"{', '.join(path.stem for path in paths)}."
        )

    def chosen(values: dict, path: Path, own: dict[str, Parameter]) -> dict:
        return {n: _fitting(n, v, own[n], path.stem) for n, v in values.items() if n in own}

    given = [chosen(parameters, *pair) for pair in zip(paths, declared, strict=True)]
    copies = _copies(paths, output)
    results = {}
    for path, own, values, copy in zip(paths, declared, given, copies, strict=True):
        values = chosen(results, path, own) | values
        results |= execute(path, values, copy, timeout, show_progress)
    return copies


def _copies(paths: list[Path], output: str | Path | None) -> list[Path]:
    """Return where the executed copies go."""
    place = Path(output).expanduser() if output else outputs_dir() / "notebooks"
    if place.suffix != ".ipynb":
        copies = [place / path.name for path in paths]
    elif len(paths) == 1:
        copies = [place]
    else:
        raise ValueError(f"{place} is one file for {len(paths)} notebooks: give a folder.")
    for path, copy in zip(paths, copies, strict=True):
        if path.resolve() == copy.resolve():
            raise ValueError(f"The executed copy would overwrite {path}: give another place.")
    return copies
