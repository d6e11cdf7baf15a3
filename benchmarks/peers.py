"""Single modules of torchreid and fast-reid, loaded from where `make bench` has laid the packages.

Not imported as packages: their `__init__` wants versions of torch and NumPy that are long gone.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

FOLDER = Path(os.environ.get("REID_PEERS", Path(sys.prefix) / "peers"))
COMPILE = """
import sys; sys.path.insert(0, {peers!r})
import setuptools, numpy
from Cython.Build import cythonize
modules = [setuptools.Extension("rank_cy", ["rank_cy.pyx"], include_dirs=[numpy.get_include()])]
modules = cythonize(modules, quiet=True)
setuptools.setup(name="rank_cy", script_args=["build_ext", "--inplace"], ext_modules=modules)
"""


def load(name: str, path: Path) -> ModuleType | None:
    """A module from its file; None if it is not there."""
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def torchreid(path: str) -> ModuleType | None:
    """A module of torchreid, such as `metrics/rank.py`."""
    return load(Path(path).stem, FOLDER / "torchreid" / "reid" / path)


@cache
def fastreid_cython() -> ModuleType | None:
    """fast-reid's compiled evaluation, compiled when first asked for; None without it or a compiler."""
    source = FOLDER / "fastreid" / "evaluation" / "rank_cylib" / "rank_cy.pyx"
    built = FOLDER / "built"
    if source.is_file() and not list(built.glob("rank_cy*.so")):
        built.mkdir(exist_ok=True)
        shutil.copy(source, built)
        command = [sys.executable, "-c", COMPILE.format(peers=str(FOLDER))]
        done = subprocess.run(command, cwd=built, capture_output=True, text=True)
        if done.returncode:
            print(f"fast-reid's Cython does not compile: {done.stderr.strip().splitlines()[-1]}")
    found = [*built.glob("rank_cy*.so")]
    return load("rank_cy", found[0]) if found else None
