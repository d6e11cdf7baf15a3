"""One notebook in a kernel of its own: papermill, and what it lacks.

Papermill takes the first kernel that is called python3, calls cells that never ran complete, kills the
kernel at Ctrl-C, and overwrites a good executed copy by a broken one. `execute` does none of that.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

RESULT = "application/vnd.reidlib.result+json"  # what `notebooks.result` shows


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; says which cell and keeps the partial copy."""


def execute(
    path: Path, parameters: dict, copy: Path, timeout: float | None, show_progress: bool
) -> dict[str, Any]:
    """Run one notebook into `copy` and return what it gave by `result`.

    The arguments and what is raised are those of `notebooks.run`.
    """

    def say(text: str) -> None:
        if show_progress:
            print(f"{path.stem}: {text}", file=sys.stderr, flush=True)

    def took() -> str:
        return _duration(time.monotonic() - begun)

    copy.parent.mkdir(parents=True, exist_ok=True)
    running = copy.with_name(f"{copy.stem}.running-{os.getpid()}.ipynb")
    failed = copy.with_name(f"{copy.stem}.failed.ipynb")
    bar = {"desc": path.stem, "leave": False, "disable": not sys.stderr.isatty()}
    options = {"progress_bar": show_progress and bar, "execution_timeout": timeout}
    begun, stop = time.monotonic(), _Stop()
    say("started")
    try:
        with stop.heard():
            notebook = _run(path, running, parameters, stop, **options)
        notebook.metadata.papermill["output_path"] = str(copy)
        nbformat.write(notebook, running)
        running.replace(copy)
        failed.unlink(missing_ok=True)
        say(f"done in {took()}, {copy}")
    except BaseException:
        partial = ""
        if running.exists():
            running.replace(failed)
            partial = f" What ran is in {failed}."
        say(f"{'failed' if stop.signal is None else 'stopped'} after {took()}.{partial}")
        if stop.signal is None:
            raise
    if stop.signal is not None:
        raise KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + stop.signal)
    return _results(notebook)


def _run(
    path: Path, running: Path, parameters: dict, stop: "_Stop", **options: Any
) -> nbformat.NotebookNode:
    """Run a notebook into `running` and return it.

    Raises:
        NotebookFailed: it did not come to its end; says at which cell, and why.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logger = logging.getLogger("papermill")
    if not logger.handlers:  # else Python prints its warnings, and they are errors of `run` already
        logger.addHandler(logging.NullHandler())
    source = ""

    def unless_stopped(cell, **_):
        nonlocal source
        source = cell.source
        if stop.signal is not None:  # a kernel between two cells ignores an interrupt
            raise NotebookFailed("stopped")

    try:
        notebook = papermill.execute_notebook(
            _literal(path),
            _literal(running),
            parameters,
            kernel_name="python3",
            language="python",
            start_timeout=120,
            iopub_timeout=60,  # by default 4 s, which a busy machine exceeds
            kernel_manager_class=stop.kernel_manager(),
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it shares our stderr
            on_cell_start=unless_stopped,
            **options,
        )
    except PapermillExecutionError as error:
        place, what = _place(error.source, error.exec_count), f"{error.ename}: {error.evalue}"
        raise NotebookFailed(f"{path.stem}{place}:\n{what}".rstrip(": ")) from None
    except DeadKernelError as error:
        what = "The kernel died. Out of memory?"
        raise NotebookFailed(f"{path.stem}{_place(source)}:\n{what}") from error
    except Exception as error:  # nbclient's timeout, and what goes wrong before any cell
        what = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise NotebookFailed(f"{path.stem}{_place(source)}:\n{what}") from error
    if problem := _never_run(notebook):
        raise NotebookFailed(f"{path.stem}{problem}")
    return notebook


class _Stop:
    """The first signal to stop interrupts the kernel, and the next one raises here.

    Attributes:
        signal: the number of the first one, or None.
        kernel: the manager of what is interrupted.
    """

    def __init__(self):
        self.signal: int | None = None
        self.kernel: AsyncKernelManager | None = None
        self._before: dict[int, Any] = {}

    def kernel_manager(self) -> type[AsyncKernelManager]:
        """Return a kernel manager that makes itself known here: nbclient makes the instance.

        Its kernel is this interpreter's, also where Jupyter would find another `python3` first: with
        no folders to look into, the specification comes from the installed ipykernel itself.
        """
        stop = self

        class Kernel(AsyncKernelManager):
            def __init__(self, **options):
                options["kernel_spec_manager"] = KernelSpecManager(kernel_dirs=[])
                super().__init__(**options)
                stop.kernel = self

        return Kernel

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen to the signals, until the end of a `with`."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:  # as nohup asks
                    signal.signal(number, self._asked)
                    self._before[number] = handler
        except ValueError:
            pass  # not the main thread, where Python takes no handlers
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, _frame) -> None:
        if self.signal is not None:
            for other in self._before:  # let the kernel be cleaned up in peace
                signal.signal(other, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"Stopping; once more to stop at once.\n")  # print may be under way
        # Nothing but a signal can be sent from within a signal handler: to the kernel, its children.
        process = self.kernel.provisioner if self.kernel is not None else None
        if process is not None and process.has_process:
            with suppress(ProcessLookupError):
                os.killpg(process.pgid, signal.SIGINT)


# --- what became of it


def _place(source: str, count: int | None = None) -> str:
    """Say which cell: by its number, where it has one, and by its first line of code."""
    lines = [s for line in source.splitlines() if (s := line.strip()) and not s.startswith("#")]
    number = "" if count is None else f" In [{count}]"
    return f", cell{number} {lines[0]!r}" if lines else ""


def _never_run(notebook: nbformat.NotebookNode) -> str:
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
            return f"{_place(cell.source, cell.execution_count)}: {what}"
    return ""


def _results(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return what a notebook gave by `notebooks.result`."""
    found = {}
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            found |= out.get("data", {}).get(RESULT, {})
    return found


def _literal(path: Path) -> str:
    """Return a path for papermill, which formats braces in it."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _duration(seconds: float) -> str:
    """Return a time for people.

    >>> _duration(8.13), _duration(3725)
    ('8 s', '1 h 2 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
