"""How Sphinx makes the book from these pages and from the notebooks that `docs/book.py` made ready."""

import os
import re
from base64 import b64decode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from PIL import Image
from sphinx.errors import ExtensionError

project = html_title = "The triplet re-ID workbook"
author, copyright = "the workbook's authors", "MIT licence"
extensions, exclude_patterns = ["myst_nb", "sphinx_design"], ["colab.ipynb"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
nb_execution_mode = "off"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
html_theme = "sphinx_book_theme"
html_static_path, html_css_files = ["book.css"], ["book.css"]
html_extra_path = ["notebooks/pages"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "use_download_button": False,
}
# The one place that says where the repository is: GitHub tells its workflows, owner/name.
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")
if REPOSITORY:
    html_theme_options |= {
        "repository_url": f"https://github.com/{REPOSITORY}",
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }

TERM = re.compile(r"^- \*\*(.+?)\*\*: (.+(?:\n  .+)*)", re.M)
GLOSSARY = {
    term.lower(): re.sub(r"\s+", " ", told).replace("*", "")
    for term, told in TERM.findall(Path(__file__).with_name("glossary.md").read_text("utf-8"))
}
WORD = re.compile(
    rf"\b({'|'.join(sorted(map(re.escape, GLOSSARY), key=len, reverse=True))})(?=s?\b)", re.I
)


def anchor(term: str) -> str:
    """Return where the glossary has a term."""
    return "term-" + re.sub(r"\W+", "-", term.lower())


def read(app, name: str, source: list[str]) -> None:
    """Make a page that GitHub shows too one of the book: its links, and the glossary's anchors."""
    if name == "glossary":
        source[0] = TERM.sub(lambda m: f"- []{{#{anchor(m[1])}}}**{m[1]}**: {m[2]}", source[0])
    if not name.startswith("notebooks/"):
        text = source[0].replace("](../notebooks/", "](notebooks/")
        lines = text.splitlines()
        known = [line for line in lines if REPOSITORY or "OWNER/NAME" not in line]
        text = "\n".join(known).replace("OWNER/NAME", REPOSITORY or "")
        outside = rf"[\1](https://github.com/{REPOSITORY}/blob/main/\2)" if REPOSITORY else r"\1"
        source[0] = re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", outside, text)


def in_a_sentence(text: nodes.Text) -> bool:
    """Whether words stand in running text, and not in code, a link or a table."""
    above, node = [], text
    while node := node.parent:
        above.append(type(node))
    return nodes.paragraph in above and not {nodes.literal, nodes.reference, nodes.table} & {*above}


def explain(app, doctree: nodes.document, name: str) -> None:
    """Link a word of the glossary to it, where a page first has it in a sentence."""
    known = {*GLOSSARY} if name in ("glossary", "index") else set()
    page = app.builder.get_relative_uri(name, "glossary")
    for text in filter(in_a_sentence, [*doctree.findall(nodes.Text)]):
        parts, last = [], 0
        for found in WORD.finditer(text):
            term = found[1].lower()
            if term not in known:
                known.add(term)
                link = nodes.reference("", found[1], refuri=f"{page}#{anchor(term)}")
                link["classes"], link["reftitle"] = ["term"], GLOSSARY[term]
                parts += [nodes.Text(text[last : found.start()]), link]
                last = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[last:])])


def lead(app, doctree: nodes.document, name: str) -> None:
    """Link the name of a notebook to its page."""
    for literal in [*doctree.findall(nodes.literal)]:
        page = f"notebooks/{literal.astext()}"
        if (
            page in app.env.found_docs
            and page != name
            and isinstance(literal.parent, nodes.paragraph)
        ):
            link = nodes.reference("", "", refuri=app.builder.get_relative_uri(name, page))
            literal.parent.replace(literal, link)
            link += literal


def write_math(translator, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw with no script and no font of ours."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(
        f'<div class="formula" tabindex="0">{formula}</div>' if block else formula
    )
    raise nodes.SkipNode


MENDED = {  # what the theme writes, and what a screen reader or a slow line needs
    r"<th\b[^>]*>(?:<p>)?(?:\s|&nbsp;)*(?:</p>)?</th>": "<td></td>",
    r'<summary aria-label="Toggle hidden content">': "<summary>",
    r'(search-button__button[^>]*) aria-label="Search"': r"\1",
    r'<div (?=class="sidebar-primary-items__start)': '<div role="region" aria-label="The book" ',
    r'<table (?=id="T_)': '<table class="dataframe" ',  # made by a Styler
    r"<img (?=[^>]*src=.data:)": '<img loading="lazy" ',
}
FAULTS = {
    r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//': "loads from elsewhere",
    r"<img\b(?![^>]*\balt=.[^\"'])": "has an image without alt text",
}


DATA = re.compile(r'(?<=\s)(src="data:image/(\w+);base64,([^"]+)")')


def picture(out: Path, kind: str, data: str) -> str:
    """Write a figure to a file, half as large as within its page, and return where."""
    content = b64decode(data)
    name = f"_images/{sha256(content).hexdigest()[:16]}.webp"
    Image.open(BytesIO(content)).save(out / name, quality=80, lossless=kind == "png")
    return name


def mend(app, exception) -> None:
    """Repair what the theme writes, and refuse what no page of the book may have."""
    out = Path(app.outdir)
    if exception:
        return
    unused = [
        *out.rglob("*.map"),
        *out.glob("_static/*webpack*"),
        *out.glob("_static/locales/**/*.*"),
    ]
    for path in unused:  # by a reader: they are of the theme's workshop
        path.unlink()
    for path in out.rglob("*.html"):
        text = path.read_text("utf-8")
        if "pydata-sphinx-theme" in text:  # not the pages that the library made
            for wrong, right in MENDED.items():
                text = re.sub(wrong, right, text)
            up = "../" * (len(path.relative_to(out).parts) - 1)
            for whole, kind, data in DATA.findall(text):
                text = text.replace(whole, f'src="{up}{picture(out, kind, data)}"')
            path.write_text(text, "utf-8")
            for fault, what in FAULTS.items():
                if found := re.search(fault, text):
                    raise ExtensionError(f"{path} {what}: {text[found.start() :][:200]}")


def setup(app) -> None:
    """Tell Sphinx of what stands above."""
    app.connect("source-read", read)
    app.connect("doctree-resolved", explain)
    app.connect("doctree-resolved", lead)
    app.connect("build-finished", mend)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
