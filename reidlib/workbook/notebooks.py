"""Notebooks from a shell, headless: which there are, their parameters, and chains of them.

Papermill passes parameters that no notebook knows; `run` and `check_parameters` refuse them.
"""

import ast
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from IPython import get_ipython
from IPython.display import display

from reidlib.paths import ROOT, check_place, outputs_dir
from reidlib.progress import in_notebook
from reidlib.typed import alternatives, in_words, typed
from reidlib.words import did_you_mean
from reidlib.workbook.headless import INJECTED, RESULT, execute

# --- called in a notebook


def check_parameters(history: Sequence[str]) -> None:
    """Refuse parameters that the notebook cannot use, before its work; papermill would pass them all.

    A notebook calls `check_parameters(In)` after its imports. Among the sources of the cells that
    ran, the injected cell comes right after the notebook's own parameters. Without one, as in
    JupyterLab, the own ones came last.

    Raises:
        ValueError: a name in the injected cell that is not in the one before it, a value of another
            type, or a count below what it may be.
        RuntimeError: the notebook is not of this library's folder: see `paths.check_place`.

    >>> check_parameters(["", "margin = 0.2", "# Parameters\\nmarign = 0.5"])
    Traceback (most recent call last):
    ValueError: There is no parameter 'marign'; did you mean 'margin'? There are: margin.
    """
    check_place()
    last = [(source, source) for source in history[-2:-1]]
    for own, source in [*pairwise(history), *last]:
        if source is own or source.split("\n", 1)[0].strip() == INJECTED:
            with suppress(SyntaxError):  # something of IPython's stands before it
                if known := _assigned(own):
                    values = {name: found.default for name, found in _assigned(source).items()}
                    _refuse_unknown(values, known)
                    _mend(values, _fitting(values, known, "the notebook"))
                    return  # cells that are run again come later


def _mend(values: dict[str, Any], fitting: dict[str, Any]) -> None:
    """Give a notebook's variables the values that fit: papermill makes a number of the tag 7."""
    if shell := get_ipython():
        changed = {n: v for n, v in fitting.items() if type(v) is not type(values[n])}
        shell.user_ns.update(changed)


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
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    if in_notebook():
        display({RESULT: values, "text/plain": text}, raw=True)
    else:
        print(text)


# --- what a notebook declares


class Parameter(NamedTuple):
    """One name of a parameters cell: the type that it is given, its default, and the least it may be."""

    annotation: Any
    default: Any
    least: int | None = None


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}
_TYPES |= {"Literal": Literal, "__builtins__": {}}


def read_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Return what the cell tagged `parameters` of a notebook assigns, by name.

    The type is that of the annotation (`lr: float = 3e-4`), else of the comment (`margin = "soft"  #
    type: float|str`, for papermill's own reader knows no "|" in annotations), else of the default. An
    `int` with a comment is 1 or more, unless it is the seed or the comment says what "0:" means.

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
        return _assigned(source)
    except SyntaxError as error:
        raise ValueError(f"The parameters cell of {notebook} is not Python: {error}.") from error


def _assigned(source: str) -> dict[str, Parameter]:
    """Return what a cell assigns at its top level."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source, type_comments=True).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        default = None
        with suppress(ValueError):
            default = ast.literal_eval(node.value)
        # A bare `steps = None` does not say what it takes.
        kind = Any if default is None else type(default)
        with suppress(Exception):  # no annotation, or something that is not among the plain types
            named = getattr(node, "annotation", None)
            kind = eval(ast.unparse(named) if named else node.type_comment.split()[0], _TYPES)
            kind = kind | None if default is None else kind
        for target in getattr(node, "targets", None) or [node.target]:
            if isinstance(target, ast.Name):
                _, told, comment = lines[node.end_lineno - 1].partition("  # ")
                least = 0 if target.id == "seed" or "0:" in comment else 1
                found[target.id] = Parameter(kind, default, least if told and kind is int else None)
    return found


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raise a ValueError that says which names are no parameters, and which there are."""
    said = [f"There is no parameter {n!r}{did_you_mean(n, known)}" for n in names if n not in known]
    if said:
        raise ValueError(" ".join([*said, f"There are: {', '.join(known)}.{where}"]))


def _fitting(values: dict, declared: dict[str, Parameter], notebook: str) -> dict[str, Any]:
    """Return those values that a notebook declares, as it declares them, or refuse one."""
    fitting = {name: value for name, value in values.items() if name in declared}
    for name, value in fitting.items():
        annotation, default, least = declared[name]
        wanted = in_words(annotation)
        wanted += "" if least is None else f", {least} or more, below 2^31"
        wanted += ", which papermill's -r gives" if str in alternatives(annotation) else ""
        try:
            fitting[name] = typed(value, annotation)
            if least is not None and not least <= fitting[name] < 2**31:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{name} = {value!r}: {notebook} wants {wanted} (its default is {default!r})."
            ) from None
    return fitting


# --- running


def _check_open_files(least: int = 200) -> None:
    """Raise an OSError where a kernel would die, since a process may open too few files."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < least:
            raise OSError(
                f"This shell lets a program open {soft} files, and a notebook's kernel needs more: "
                "ulimit -n 1024."
            )


def find_notebook(name: str | Path) -> Path:
    """Return the path of a notebook: `"03_train"`, `"03"`, or a path.

    Raises:
        FileNotFoundError: none such; names those that there are.
        ValueError: a number that two notebooks begin with.
    """
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    stem = Path(name).name.removesuffix(".ipynb")
    known = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    found = [n for n in known if n == stem or (stem.isdigit() and n.startswith(f"{stem}_"))]
    if len(found) > 1:
        raise ValueError(f"{name} could be {' or '.join(found)}.")
    if not found:
        raise FileNotFoundError(
            f"There is no notebook {str(name)!r}{did_you_mean(stem, known)} "
            f"In {ROOT / 'notebooks'} there are: {', '.join(known) or 'none'}."
        )
    return known[found[0]]


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
    gave by `result`, where it declares that and it is not given by hand. Ctrl-C and SIGTERM
    interrupt the running cell, so that a training writes its checkpoint; a second one ends the
    kernel at once.

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
        NotebookFailed: an error in a cell, a cell over `timeout`, or a dead kernel.
        KeyboardInterrupt, SystemExit: it was stopped.
    """
    paths = [find_notebook(n) for n in ([names] if isinstance(names, str | Path) else names)]
    declared = [read_parameters(path) for path in paths]
    parameters = parameters or {}
    where = f" See the cells tagged 'parameters' of {', '.join(path.stem for path in paths)}."
    _refuse_unknown(parameters, {name: None for own in declared for name in own}, where)
    given = [_fitting(parameters, own, p.stem) for p, own in zip(paths, declared, strict=True)]
    place = Path(output).expanduser() if output else outputs_dir() / "notebooks"
    one = place.suffix == ".ipynb"
    if one and len(paths) > 1:
        raise ValueError(f"{place} is one file for {len(paths)} notebooks: give a folder.")
    copies = [place if one else place / path.name for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        if path.resolve() == copy.resolve():
            raise ValueError(f"The executed copy would overwrite {path}: give another place.")
    _check_open_files()
    results = {}
    for path, own, values, copy in zip(paths, declared, given, copies, strict=True):
        values = _fitting(results, own, path.stem) | values
        results |= execute(path, values, copy, timeout, show_progress)
    return copies
