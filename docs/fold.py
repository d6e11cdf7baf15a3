"""Fold the notebooks' cells that are there for what they show: `make format` does it.

The book hides such a cell behind a button (tag `hide-input`), JupyterLab shows a line of dots in its
place (`jupyter.source_hidden`). Open stay: what defines a function, calls the public face, or
shows nothing.
"""

import ast
import json
import sys
from pathlib import Path

import reidlib

LOOKS = {"say", "show", "show_growth", "display", "print", "result", "check_parameters"}
TEACHES = {*reidlib.__all__, "prepare", "complete"} - {"confidence_interval"}
LONG = 30  # lines of parameters that nobody reads in one go


def folds(source: str, tags: list[str]) -> bool:
    """Whether a code cell is to be folded."""
    if "parameters" in tags:
        return len(source.splitlines()) > LONG
    tree = ast.parse(source)
    nodes = [*ast.walk(tree)]
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {call.id for call in called if isinstance(call, ast.Name)}
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
    shows = LOOKS & (names | {call.attr for call in called if isinstance(call, ast.Attribute)})
    return (
        not defines and not names & TEACHES and bool(shows or isinstance(tree.body[-1], ast.Expr))
    )


def fold(notebook: dict) -> dict:
    """Return the notebook, its cells marked as the rule says."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            meta = cell["metadata"]
            tags = [tag for tag in meta.pop("tags", []) if tag != "hide-input"]
            meta.pop("jupyter", None)
            if folds("".join(cell["source"]), tags):
                tags.append("hide-input")
                meta["jupyter"] = {"source_hidden": True}
            if tags:
                meta["tags"] = tags
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        old = path.read_text(encoding="utf-8")
        new = json.dumps(fold(json.loads(old)), indent=1, ensure_ascii=False) + "\n"
        if new != old:
            path.write_text(new, encoding="utf-8")
