"""Counts so far of a long evaluation, kept on disk, so that one which was killed goes on."""

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from time import monotonic
from zipfile import BadZipFile

import numpy as np

from reidlib.runs import write_atomically

SECONDS = 5  # of work, at most, that a kill costs, and a tile


class Partial:
    """A few arrays that grow with the work.

    Args:
        file: where they are kept; None keeps nothing.
        about: arrays that say of what work they are. `match_ranks` gives matches, their distances,
            the rows that are ranked, and how far the first row of each tile is from a query. It does
            not read a gallery twice to compare all of it.
        state: what they are before the work.

    Attributes:
        state: what the file has kept, if it is of this work, else as given.
    """

    def __init__(
        self, file: Path | None, about: Sequence[np.ndarray], state: dict[str, np.ndarray]
    ):
        self.file, self.state, self.saved = file, state, monotonic()
        if file:
            self.about = sha256(b"".join(map(bytes, about))).hexdigest()
            with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(file) as kept:
                if str(kept["about"]) == self.about:
                    self.state = {key: kept[key] for key in state}

    def keep(self, **state) -> None:
        """Put arrays in the place of others; write all of them, if the last time is a while ago."""
        self.state |= state
        if self.file and monotonic() - self.saved >= SECONDS:

            def write(fresh: Path) -> None:
                with open(fresh, "wb") as file:
                    np.savez(file, about=self.about, **self.state)

            write_atomically(self.file, write)
            self.saved = monotonic()
