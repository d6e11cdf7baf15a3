"""A progress bar that is seen live and leaves one line in an executed notebook."""

import io
import sys

from tqdm import tqdm


class _NotebookBar(tqdm):
    """Draws into one display that each refresh replaces; tqdm's own would leave a dead widget."""

    def display(self, msg=None, pos=None) -> None:
        """Show the bar's text in its place in the notebook."""
        from IPython.display import display

        content = {"text/plain": msg if msg is not None else str(self)}
        if getattr(self, "_handle", None) is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def clear(self, *_, **__) -> None:
        """Keep the last state: there is nothing to wipe in a notebook."""


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel."""
    try:
        return get_ipython().__class__.__name__ == "ZMQInteractiveShell"
    except NameError:
        return False


def progress(iterable=None, *, show=True, **options) -> tqdm:
    """Return a tqdm bar around an iterable, for a terminal (standard error) or a notebook.

    `options` are tqdm's: `total`, `desc`, `unit`, `initial`.
    """
    if in_notebook():
        # To no file: the bar's last newline belongs nowhere.
        options |= {"file": io.StringIO(), "ncols": 90, "ascii": False, "mininterval": 0.5}
        return _NotebookBar(iterable, disable=not show, **options)
    every = 0.5 if sys.stderr.isatty() else 60  # a log file keeps every line
    return tqdm(iterable, disable=not show, mininterval=every, dynamic_ncols=True, **options)
