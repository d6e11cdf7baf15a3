"""`python -m reidlib`: a thin door to the library, for a shell.

Standard output carries results alone; all else goes to standard error. Status 0: done, 1: an error
that is told in a line or two (REID_DEBUG=1 shows where), 2: a wrong command line, 130: Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Each command imports what it needs: torch takes seconds, and --help does without.

COMMANDS: dict[str, tuple[Callable, tuple]] = {}  # by name: the function, and its options


def command(*options: tuple[tuple, dict], name: str = "") -> Callable:
    """Make a function a command of this name, its own by default; its docstring is the help."""

    def register(function: Callable) -> Callable:
        COMMANDS[name or function.__name__] = (function, options)
        return function

    return register


def option(*names: str, **settings: Any) -> tuple[tuple, dict]:
    """Return an option, or an argument without dashes, as `argparse` takes it."""
    return names, settings


def say(text: str) -> None:
    """Print for the person, not for the next program."""
    print(text, file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


DEVICE = option("--device", default="auto", help="auto, cpu, cuda, mps, …")
FLIP = option("--flip", action="store_true", help="mean of each image and its mirror image")
MODEL = option("--model", required=True, help="a run, or a weights.safetensors")
RUN = option("run", metavar="RUN", help="a run's name, or its folder")
SOURCE = (
    option("--pattern", help='names to pid and camid: a regular expression, or "market1501"'),
    option("--image-root", help="where the relative paths of CSV lists start"),
)


# --- data and training


@command(
    option("--dataset", required=True, help="market1501, synthetic, or a path"),
    option("--k", type=int, default=4, help="the K of PK batches (4)"),
    option("--no-decode", action="store_true", help="do not read the images themselves"),
    *SOURCE,
)
def data(args) -> int:
    """Check a data set and print its counts and errors."""
    from reidlib.data.check import check
    from reidlib.data.tables import load
    from reidlib.progress import progress

    bar = partial(progress, desc="read images", unit="img")
    dataset = load(args.dataset, pattern=args.pattern, image_root=args.image_root)
    report = check(dataset, args.k, decode=not args.no_decode, progress=bar)
    print(report)
    return 0 if report.ok else 1


@command(
    option("--recipe", default="trinet", help="plain, trinet (the default) or demo"),
    option("--tag", default="", help="appended to the run's name"),
    option(
        "--resume",
        default="auto",
        choices=("auto", "previous", "never", "restart"),
        help="with a run of this name: go on (auto), from the checkpoint before the last "
        "(previous), refuse (never), or delete it and start again (restart)",
    ),
    DEVICE,
)
def train(args) -> int:
    """Train one run and print its folder."""
    from reidlib.recipes import Recipe, make_recipe
    from reidlib.typed import typed

    kinds = get_type_hints(Recipe)
    given = {name: getattr(args, name) for name in Recipe.model_fields}
    changes = {name: text for name, text in given.items() if text is not None}
    for name, text in changes.items():
        with suppress(ValueError):  # make_recipe says of all settings at once what is wrong
            changes[name] = typed(text, kinds[name])
    recipe = make_recipe(args.recipe, **changes)

    from reidlib.training import loop
    from reidlib.training.health import run_text

    folder = loop.train(recipe, args.tag, args.resume, args.device)
    print(folder)
    say(run_text(folder))
    say(f"Next: python -m reidlib run 04_evaluate -p run {folder.name}")
    return 0


@command(option("runs", nargs="+", metavar="RUN", help="a run's name, or its folder"))
def health(args) -> int:
    """Print what is wrong with the training of runs, and what to try first."""
    from reidlib.runs import find_run
    from reidlib.training.health import run_text

    for folder in map(find_run, args.runs):
        print(f"{folder.name}\n{run_text(folder)}")
    return 0


# --- scores


@command(
    RUN,
    option("--dataset", help="score on another data set than the run's own"),
    option("--flip", action="store_true", help="score the mean of each image and its mirror, too"),
    option("--precision", default="float32", choices=("float32", "bfloat16"), help="(float32)"),
    option("--no-baselines", action="store_true", help="do not score what the run compares with"),
    DEVICE,
)
def score(args) -> int:
    """Score a run, write the scores into its folder, and print them as JSON."""
    from reidlib.evaluation.scoring import score_run

    options = {"flip": args.flip, "precision": args.precision, "device": args.device}
    scored = score_run(args.run, args.dataset, baselines=not args.no_baselines, **options)
    flipped = {"with_flips": scored.with_flips.scores} if scored.with_flips else {}
    print(json.dumps(scored.scores | flipped, indent=2, allow_nan=False))
    say("\n".join([str(scored), *scored.notes]))
    return 0


@command(
    option("runs", nargs="*", metavar="RUN", help="by default all under outputs/"),
    option("--baselines", action="store_true", help="show what the runs compare with, too"),
    option("--against", metavar="RUN", help="show gains over this run, with intervals"),
)
def scores(args) -> int:
    """Print a table of scores in per cent, of runs that were scored before."""
    from reidlib.workbook.scores import scores_text

    print(scores_text(args.runs, baselines=args.baselines, against=args.against))
    return 0


@command(
    option("--query", required=True, help="HDF5 file of the query embeddings"),
    option("--query-csv", help="its list of images, if it holds embeddings alone"),
    option("--gallery", required=True, help="HDF5 file of the gallery embeddings"),
    option("--gallery-csv", help="its list of images, if it holds embeddings alone"),
)
def evaluate(args) -> int:
    """Print the scores of embeddings from any toolkit as JSON."""
    from reidlib.evaluation import retrieval
    from reidlib.model.embed import read_embeddings

    query = read_embeddings(args.query, args.query_csv)
    gallery = read_embeddings(args.gallery, args.gallery_csv)
    evaluated = retrieval.evaluate(*query, *gallery)
    print(json.dumps(evaluated.scores, indent=2, allow_nan=False))
    say(evaluated.protocol)
    return 0


# --- a trained network at work


@command(
    MODEL,
    option("--images", required=True, help="a folder, or a CSV list"),
    option("--out", required=True, help="the file to write, such as gallery.h5"),
    FLIP,
    *SOURCE,
    DEVICE,
)
def embed(args) -> int:
    """Write the embeddings of images into an HDF5 file."""
    from reidlib.data.pixels import load_images
    from reidlib.data.tables import image_list
    from reidlib.model import embed
    from reidlib.model.device import pick_device
    from reidlib.model.weights import load_model

    out = Path(args.out).expanduser()
    if out.is_dir():  # said now, not after an hour
        raise ValueError(f"{out} is a folder: give the name of a file, such as gallery.h5.")
    out.parent.mkdir(parents=True, exist_ok=True)
    table = image_list(args.images, pattern=args.pattern, image_root=args.image_root)
    model = load_model(args.model, pick_device(args.device))
    pixels, table = load_images(table, model.recipe)
    emb = embed.embed(model, pixels, model.recipe, flip=args.flip)
    embed.write_embeddings(out, emb, table)
    say(f"{len(emb):,} embeddings of {emb.shape[1]} numbers: {out}")
    if (table["pid"] == -1).all():
        say(
            "No identities are known (pid -1): enough to search, not to evaluate. "
            "--pattern market1501 reads them from file names like Market-1501's."
        )
    return 0


@command(
    MODEL,
    option("--gallery", required=True, help="a folder, a CSV list, or embeddings (.h5)"),
    option("--query", required=True, help="an image, a folder, or a CSV list"),
    option("--top", type=_count, default=10, help="how many of each query (10)"),
    FLIP,
    option(
        "--unreadable",
        choices=("fail", "skip"),
        help="broken images: stop, or leave them out (as the model's recipe says)",
    ),
    option("--out", metavar="FILE.csv", help="write the CSV there (standard output)"),
    option("--picture", metavar="FILE.jpg", help="draw the ranked lists, 20 at most"),
    option("--html", metavar="FILE.html", help="a page to browse the ranked lists"),
    DEVICE,
)
def search(args) -> int:
    """Print the gallery images nearest to pictures of somebody as CSV."""
    from reidlib.look import search as searching
    from reidlib.model.device import pick_device
    from reidlib.model.weights import load_model
    from reidlib.runs import write_text

    files = [Path(f).expanduser() for f in (args.out, args.picture, args.html) if f]
    for file in files:  # said now, not after an hour
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give the name of a file.")
    if args.picture and Path(args.picture).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{args.picture} must end in .jpg or .png.")
    query, gallery = searching.picture_table(args.query), searching.read_gallery(args.gallery)
    tables = {"query": query, "gallery": gallery}
    model = load_model(args.model, pick_device(args.device))
    recipe = model.recipe
    if args.unreadable:
        recipe = recipe.model_copy(update={"unreadable": args.unreadable})
    for remark in searching.remarks(vars(args), tables, recipe):
        say(remark)
    retrieval, found = searching.search(
        model, query, gallery, recipe, topk=args.top, flip=args.flip
    )
    for remark in searching.left_out(tables, retrieval):
        say(remark)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    lists = "ranked list" if len(retrieval.query) == 1 else "ranked lists"
    if args.out:
        write_text(files[0], searching.search_csv(found))
        say(f"{len(retrieval.query):,} {lists}: {args.out}")
    else:
        print(searching.search_csv(found), end="")
    if args.picture:
        from reidlib.look import figures, photographs

        shown = min(len(retrieval.query), 20)  # 20 lists make a picture of 47 inches
        figure = photographs.search_lists(found[found["query"] < shown])
        figures.save(figure, Path(args.picture).expanduser())
        say(f"Picture of {shown} of {len(retrieval.query):,} {lists}: {args.picture}")
    if args.html:
        from reidlib.look import browser

        write_text(files[-1], browser.ranked_list_page(retrieval, topk=args.top))
        say(f"Page of the ranked lists: {args.html}")
    return 0


@command(
    MODEL,
    option("--out", required=True, help="a folder, or a file ending in .onnx"),
    option("--images", help="compare model and file on these: an image, a folder, a CSV list"),
)
def export(args) -> int:
    """Write a model as ONNX, with a JSON on how to prepare images."""
    from reidlib.data.pixels import read_image
    from reidlib.look.search import picture_table
    from reidlib.workbook import export as exporting

    images = None
    if args.images:
        table = picture_table(args.images)
        paths = table["path"][:: -(-len(table) // 32)]  # 32 at most, from all over the list
        images = [read_image(path) for path in paths]
    file, card = exporting.export(args.model, args.out, images)
    print(file)
    parity = card["parity"]
    say(
        f"Embeddings of {parity['checked_on']} agree with the model's to "
        f"{parity['max_abs_difference']:.1g}. How to prepare images: {file.name}.json"
    )
    return 0


# --- notebooks and releases


@command(
    option("notebooks", nargs="+", help="03_train, 03, or a path"),
    option(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks; repeat it",
    ),
    option("--output", help="folder of the executed copies (outputs/notebooks)"),
    option("--timeout", type=float, help="seconds that a cell may take (no limit)"),
    name="run",
)
def notebook(args) -> int:
    """Run notebooks, headless, one after another."""
    from reidlib.workbook import notebooks

    parameters = dict(args.parameters)
    notebooks.run(args.notebooks, parameters, output=args.output, timeout=args.timeout)
    return 0


@command(RUN)
def release(args) -> int:
    """Halve a run's weights, score them, write a model card, and print the files to give away."""
    from reidlib.workbook.release import release

    for file in release(args.run):
        print(file)
    return 0


# --- the command line


class Parser(argparse.ArgumentParser):
    """A wrong command line leaves two lines, not the whole usage."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        """Leave with status 2."""
        say(f"{self.prog}: {message}")
        say(f"See {self.prog} --help")
        raise SystemExit(2)


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the whole line, and those of the commands by name."""
    top = Parser(prog="python -m reidlib", description="Person re-identification, from a shell.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (function, options) in COMMANDS.items():
        text = function.__doc__
        short = (text[0].lower() + text[1:]).rstrip(".")
        parser = commands.add_parser(name, help=short, description=text)
        parser.set_defaults(function=function)
        for names, settings in options:
            parser.add_argument(*names, **settings)
    _add_settings(commands.choices["train"])
    return top, commands.choices


def _add_settings(parser: Parser) -> None:
    """Add an option for every setting of a recipe."""
    from reidlib.recipes import Recipe

    group = parser.add_argument_group("settings of the recipe (defaults are trinet's)")
    kinds = get_type_hints(Recipe)
    for name, field in Recipe.model_fields.items():
        text = f"{field.description} ({field.default})".replace("%", "%%")
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, dest=name, metavar=_values(kinds[name]), help=text)


def _values(annotation: Any) -> str:
    """Return what the help shows for a value: `batch_hard|batch_all`, `NUMBER|soft`."""
    from reidlib.typed import alternatives

    words = {bool: "true|false", str: "TEXT", int: "N", float: "NUMBER"}
    shown = []
    for kind in alternatives(annotation):
        literal = get_origin(kind) is Literal
        shown += map(str, get_args(kind)) if literal else [words.get(kind, "none")]
    return "|".join(shown)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    top, commands = _parser()
    args, unknown = top.parse_known_args(argv)
    if unknown:
        parser = commands[args.command]
        options = [o for action in parser._actions for o in action.option_strings]
        from reidlib.words import did_you_mean

        parser.error(f"unknown {unknown[0]!r}{did_you_mean(unknown[0].split('=')[0], options)}")
    try:
        return args.function(args)
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("REID_DEBUG"):
            raise
        say(str(error).strip() or type(error).__name__)
        return 1


if __name__ == "__main__":
    sys.exit(main())
