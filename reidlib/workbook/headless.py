"""One notebook in a kernel of its own, which is always this interpreter's.

Papermill sets the parameters, and nbclient runs the cells, without papermill between: so a broken copy
never takes the place of a good one, a notebook that ends early has failed, and a signal to stop lets
the running cell end by itself.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from reidlib.paths import temporary
from reidlib.runs import write_text

INJECTED = "# Parameters"  # the first line of the cell that sets parameters, also papermill's
RESULT = "application/vnd.reidlib.result+json"  # what `notebooks.result` shows


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; says at which cell, and why."""


def execute(
    path: Path, parameters: dict, copy: Path, timeout: float | None, show_progress: bool
) -> dict[str, Any]:
    """Run one notebook into `copy` and return what it gave by `result`.

    The arguments and what is raised are those of `notebooks.run`.
    """

    def say(text: str, end: str = "") -> None:
        took = f" {timedelta(seconds=round(time.monotonic() - begun))}" if end else ""
        if show_progress:
            print(f"{path.stem}: {text}{took}{end}", file=sys.stderr, flush=True)

    copy.parent.mkdir(parents=True, exist_ok=True)
    running = temporary(copy, "{stem}.running-{mine}.ipynb")
    failed = copy.with_name(f"{copy.stem}.failed.ipynb")
    notebook, stop, begun = _with_parameters(path, parameters), _Stop(), time.monotonic()
    client = NotebookClient(
        notebook,
        km=stop.kernel,
        timeout=timeout,
        startup_timeout=120,
        iopub_timeout=60,  # by default 4 s, which a busy machine exceeds
        raise_on_iopub_timeout=True,
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it shares our stderr
    )
    write_text(running, nbformat.writes(notebook))
    hidden = not (show_progress and sys.stderr.isatty())
    say("started")
    try:
        with stop, tqdm(notebook.cells, path.stem, leave=False, disable=hidden) as cells:
            _run(client, path.stem, cells, running, stop)
        running.replace(copy)
        failed.unlink(missing_ok=True)
        say("done in", f", {copy}")
    except BaseException:
        running.replace(failed)
        how = "failed" if stop.signal is None else "stopped"
        say(f"{how} after", f". What ran is in {failed}.")
        if stop.signal is None:
            raise
    if stop.signal is not None:
        raise KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + stop.signal)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return {k: v for out in outputs for k, v in out.get("data", {}).get(RESULT, {}).items()}


def _with_parameters(path: Path, parameters: dict) -> nbformat.NotebookNode:
    """Return a notebook without outputs, the parameters set in a cell after its own."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(path))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if not parameters:
        return notebook
    return parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")


def _run(client: NotebookClient, name: str, cells: tqdm, running: Path, stop: "_Stop") -> None:
    """Run the cells one by one; after each, the notebook is written to `running`.

    Raises:
        NotebookFailed: it did not come to its end.
    """
    cell = None
    try:
        with client.setup_kernel(cleanup_kc=True):
            for index, cell in enumerate(cells):
                if stop.signal is not None:  # a kernel between two cells ignores an interrupt
                    raise NotebookFailed("stopped")
                try:
                    client.execute_cell(cell, index)
                finally:
                    write_text(running, nbformat.writes(client.nb))
    except Exception as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        if isinstance(error, CellExecutionError):
            what = f"{error.ename}: {error.evalue}".rstrip(": ")
        if isinstance(error, DeadKernelError):
            what = "The kernel died. Out of memory?"
        raise NotebookFailed(f"{name}{_place(cell)}:\n{what}") from error


def _place(cell: nbformat.NotebookNode | None) -> str:
    """Say which cell: by its number, where it has one, and by its first line of code."""
    for line in cell.source.splitlines() if cell else ():
        if line.strip() and not line.strip().startswith("#"):
            count = cell.get("execution_count")
            return f", cell{f' In [{count}]' if count else ''} {line.strip()!r}"
    return ""


class _Stop:
    """Where a signal to stop is heard: the first interrupts the kernel, the next one raises here.

    Attributes:
        kernel: the manager of the kernel. With no folders to look into, its `python3` is the
            installed ipykernel's, also where Jupyter would find another of that name first.
        signal: the number of the first signal, or None.
    """

    def __init__(self):
        self.kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self):
        with suppress(ValueError):  # not the main thread, where Python takes no handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
                    self._before[number] = signal.signal(number, self._asked)

    def __exit__(self, *_):
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
        process = self.kernel.provisioner
        if process is not None and process.has_process:
            with suppress(ProcessLookupError):
                os.killpg(process.pgid, signal.SIGINT)
