"""Runs one notebook, or a chain of them, headless: papermill, with checks that it lacks.

Papermill passes parameters that no notebook knows, takes the first kernel that is called python3,
calls cells that never ran complete, kills the kernel at Ctrl-C, and overwrites a good executed copy
by a broken one. `run` does none of that. `check_parameters` and `result` are called in notebooks.
"""

import ast
import difflib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from reidlib.paths import ROOT, outputs_dir
from reidlib.progress import in_notebook

RESULT = "application/vnd.reidlib.result+json"  # what `result` shows and `run` reads
INJECTED = "# Parameters"  # the first line of the cell that papermill injects


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; says which cell and keeps the partial copy."""


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
    """One name of a parameters cell; no `types` means that anything goes."""

    types: frozenset[type]
    default: Any


def read_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Return what the cell tagged `parameters` of a notebook assigns, by name.

    Types are those of the annotation (`margin: float | str = "soft"`) and of the literal default.
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
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = (getattr(node, "annotation", None), node.value)
    return found


def _parameter(annotation: ast.expr | None, value: ast.expr | None) -> Parameter:
    types, default = frozenset(), None
    if annotation is not None:
        with suppress(Exception):  # an annotation of something imported says nothing here
            types = value_types(eval(ast.unparse(annotation), {"Literal": Literal}))
    if value is not None:
        with suppress(ValueError):
            default = ast.literal_eval(value)
            # A bare `steps = None` does not say what else it takes.
            types |= {type(default)} if types or default is not None else set()
    return Parameter(types, default)


def value_types(annotation: Any) -> frozenset[type]:
    """Return the plain types that an annotation allows.

    >>> sorted(t.__name__ for t in value_types(float | Literal["soft"] | None))
    ['NoneType', 'float', 'str']
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_types(args[0])
    if origin is Literal:
        return frozenset(type(value) for value in args)
    if origin in (Union, UnionType):
        return frozenset().union(*map(value_types, args))
    kind = NoneType if annotation is None else origin or annotation
    return frozenset({kind}) if isinstance(kind, type) else frozenset()


def from_text(text: str, types: frozenset[type]) -> Any:
    """Read what a shell gave as the first of these that fits: bool, int, float, None, list, text.

    Where text is allowed, "none" stays text: it is a value of its own, as in `weights="none"`.

    >>> [from_text("1e-3", {float}), from_text("1e3", {int}), from_text("7", {str})]
    [0.001, 1000, '7']
    >>> [from_text("0.2", {float, str}), from_text("soft", {float, str}), from_text("True", {bool})]
    [0.2, 'soft', True]
    """
    types = types or {bool, int, float, NoneType}
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in types or float in types:
        with suppress(ValueError):
            return int(text) if int in types else float(text)
        with suppress(ValueError):
            number = float(text)
            if float in types or number.is_integer():
                return number if float in types else int(number)
    if NoneType in types and str not in types and text.lower() in ("none", "null"):
        return None
    if types & {list, tuple, dict}:
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return text


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {NoneType: "none", list: "a list", tuple: "a tuple", dict: "a dictionary"}


def _fitting(name: str, value: Any, parameter: Parameter, notebook: str) -> Any:
    """Return a value as the parameter's type, or refuse it."""
    types = parameter.types
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str):
        value = from_text(value, types)
    if not types or type(value) in types:
        return value
    if type(value) is int and float in types:
        return float(value)
    if type(value) is float and int in types and value.is_integer():
        return int(value)
    wanted = " or ".join(word for kind, word in _WORDS.items() if kind in types)
    raise ValueError(
        f"{name} = {value!r}: {notebook} wants {wanted} (its default is {parameter.default!r})."
    )


def _unknown(names: list[str], known: list[str]) -> str:
    parts = []
    for name in names:
        close = difflib.get_close_matches(name, known, 1)
        parts.append(f"{name!r}" + (f"; did you mean {close[0]!r}" if close else ""))
    end = "?" if "did you mean" in parts[-1] else "."
    return f"There is no parameter {', no '.join(parts)}{end} There are: {', '.join(known)}."


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
        close = difflib.get_close_matches(stem, known, 1)
        raise FileNotFoundError(
            f"There is no notebook {str(name)!r}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
            + f" In {folder} there are: {', '.join(known) or 'none'}."
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
        results |= _execute(path, values, copy, timeout, show_progress)
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


class _Kernel(AsyncKernelManager):
    """The kernel of this interpreter, also where Jupyter would find another `python3` first.

    With no folders to look into, the specification comes from the installed ipykernel itself.
    """

    latest: "_Kernel | None" = None  # nbclient makes the instance, the signal handler needs it

    def __init__(self, **options):
        options["kernel_spec_manager"] = KernelSpecManager(kernel_dirs=[])
        super().__init__(**options)
        _Kernel.latest = self

    def interrupt_now(self) -> None:
        """Send SIGINT to the kernel and its children, from within a signal handler."""
        if self.provisioner is not None and self.provisioner.has_process:
            with suppress(ProcessLookupError):
                os.killpg(self.provisioner.pgid, signal.SIGINT)


@contextmanager
def _stop_signals():
    """Make the first signal to stop interrupt the kernel, and the next one raise here."""
    stop = SimpleNamespace(signal=None)
    before = {}

    def ask(number, _frame):
        if stop.signal is None:
            stop.signal = number
            os.write(2, b"Stopping; once more to stop at once.\n")  # print may be under way
            if _Kernel.latest is not None:
                _Kernel.latest.interrupt_now()
            return
        for other in before:  # let the kernel be cleaned up in peace
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    _Kernel.latest = None
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # as nohup asks
                signal.signal(number, ask)
                before[number] = handler
    except ValueError:
        pass  # not the main thread, where Python takes no handlers
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _execute(
    path: Path, parameters: dict, copy: Path, timeout: float | None, show_progress: bool
) -> dict[str, Any]:
    """Run one notebook into `copy` and return what it gave by `result`."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    def say(text: str) -> None:
        if show_progress:
            print(text, file=sys.stderr, flush=True)

    logger = logging.getLogger("papermill")
    if not logger.handlers:  # else Python prints its warnings, and they are errors of `run` already
        logger.addHandler(logging.NullHandler())
    copy.parent.mkdir(parents=True, exist_ok=True)
    running = copy.with_name(f"{copy.stem}.running-{os.getpid()}.ipynb")
    failed = copy.with_name(f"{copy.stem}.failed.ipynb")
    say(f"{path.stem}: started")
    begun, problem, notebook, source = time.monotonic(), "", None, [""]
    try:
        with _stop_signals() as stop:

            def unless_stopped(cell, **_):
                source.append(cell.source)
                if stop.signal is not None:  # a kernel between two cells ignores an interrupt
                    raise NotebookFailed("stopped")

            try:
                notebook = papermill.execute_notebook(
                    _literal(path),
                    _literal(running),
                    parameters,
                    kernel_name="python3",
                    language="python",
                    progress_bar=show_progress
                    and {"desc": path.stem, "leave": False, "disable": not sys.stderr.isatty()},
                    start_timeout=120,
                    iopub_timeout=60,  # by default 4 s, which a busy machine exceeds
                    execution_timeout=timeout,
                    kernel_manager_class=_Kernel,
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it shares our stderr
                    on_cell_start=unless_stopped,
                )
                problem = _never_run(notebook)
            except PapermillExecutionError as error:
                problem = _place(error.exec_count, error.source)
                problem += f":\n{error.ename}: {error.evalue}".rstrip(": ")
            except KeyboardInterrupt:
                stop.signal = stop.signal or signal.SIGINT
            except DeadKernelError:
                problem = f"{_place(None, source[-1])}:\nThe kernel died. Out of memory?"
            except Exception as error:  # nbclient's timeout, and what goes wrong before any cell
                message = str(error).strip().split("\n")[0]
                problem = f"{_place(None, source[-1])}:\n{type(error).__name__}: {message}"
        took = _duration(time.monotonic() - begun)
        if notebook is not None and not problem:
            notebook.metadata.papermill["output_path"] = str(copy)
            papermill.iorw.write_ipynb(notebook, str(running))
            running.replace(copy)
            failed.unlink(missing_ok=True)
            say(f"{path.stem}: done in {took}, {copy}")
    finally:
        kept = running.exists()
        if kept:
            running.replace(failed)
    partial = f" What ran is in {failed}." if kept else ""
    if stop.signal is not None:
        say(f"{path.stem}: stopped after {took}.{partial}")
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + stop.signal)
    if problem:
        say(f"{path.stem}: failed after {took}.{partial}")
        raise NotebookFailed(f"{path.stem}{problem}")
    return _results(notebook)


def _literal(path: Path) -> str:
    """Return a path for papermill, which formats braces in it."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _place(count: int | None, source: str) -> str:
    """Say which cell: by its number, where it has one, and by its first line of code."""
    lines = [s for line in source.splitlines() if (s := line.strip()) and not s.startswith("#")]
    number = "" if count is None else f" In [{count}]"
    return f", cell{number} {lines[0]!r}" if lines else ""


def _never_run(notebook) -> str:
    """Return which cell was never run: sys.exit() ends a notebook, and papermill calls it good."""
    for cell in notebook.cells:
        skipped = "skip-execution" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and cell.source.strip() and not skipped:
            if any(out.get("ename") == "SystemExit" for out in cell.outputs):
                what = "it ended the notebook by SystemExit."
            elif cell.execution_count is None:
                what = "it was never run."
            else:
                continue
            return f"{_place(cell.execution_count, cell.source)}: {what}"
    return ""


def _results(notebook) -> dict[str, Any]:
    found = {}
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            found |= out.get("data", {}).get(RESULT, {})
    return found


def _duration(seconds: float) -> str:
    """Return a time for people.

    >>> _duration(8.13), _duration(3725)
    ('8 s', '1 h 2 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
