"""`python -m reidlib`: a thin door to the library, for a shell.

Standard output carries results alone; all else goes to standard error. Status 0: done, 1: an error
that is told in a line or two (REID_DEBUG=1 shows where), 2: a wrong command line, 130: Ctrl-C.
"""

import argparse
import difflib
import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Each command imports what it needs: torch takes seconds, and --help does without.


def say(text: str) -> None:
    """Print for the person, not for the next program."""
    print(text, file=sys.stderr, flush=True)


# --- the commands


def data(args) -> int:
    """Print what is in a data set and what is wrong with it; status 1 where that is an error."""
    from reidlib.data.check import check
    from reidlib.data.tables import load
    from reidlib.progress import progress

    bar = partial(progress, desc="read images", unit="img")
    dataset = load(args.dataset, pattern=args.pattern, image_root=args.image_root)
    report = check(dataset, args.k, decode=not args.no_decode, progress=bar)
    print(report)
    return 0 if report.ok else 1


def train(args) -> int:
    """Train one run and print its folder."""
    from reidlib.recipes import Recipe, make_recipe
    from reidlib.typed import typed

    kinds = get_type_hints(Recipe)
    changes = {
        name: text for name in Recipe.model_fields if (text := getattr(args, name)) is not None
    }
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


def health(args) -> int:
    """Print what is wrong with the training of runs, and what to try first."""
    from reidlib.runs import find_run
    from reidlib.training.health import run_text

    for folder in map(find_run, args.runs):
        print(f"{folder.name}\n{run_text(folder)}")
    return 0


def embed(args) -> int:
    """Write the embeddings of a folder or list of images."""
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


def evaluate(args) -> int:
    """Print the scores as JSON."""
    from reidlib.evaluation import retrieval
    from reidlib.model.embed import read_embeddings

    query = read_embeddings(args.query, args.query_csv)
    gallery = read_embeddings(args.gallery, args.gallery_csv)
    evaluated = retrieval.evaluate(*query, *gallery)
    print(json.dumps(evaluated.scores, indent=2, allow_nan=False))
    say(evaluated.protocol)
    return 0


def search(args) -> int:
    """Print the gallery images nearest to each query, as CSV; or write them, and draw them."""
    from reidlib.data.tables import ignored_files
    from reidlib.look import search as searching
    from reidlib.model.device import pick_device
    from reidlib.model.embed import read_embeddings
    from reidlib.model.weights import load_model
    from reidlib.runs import write_text

    files = [Path(f).expanduser() for f in (args.out, args.picture, args.html) if f]
    for file in files:  # said now, not after an hour
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give the name of a file.")
    if args.picture and Path(args.picture).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{args.picture} must end in .jpg or .png.")
    query = searching.picture_table(args.query)
    if Path(args.gallery).suffix.lower() in (".h5", ".hdf5"):
        gallery = read_embeddings(args.gallery)
        asked = {"query": query}
    else:
        gallery = searching.picture_table(args.gallery)
        asked = {"query": query, "gallery": gallery}
    model = load_model(args.model, pick_device(args.device))
    recipe = model.recipe
    if args.unreadable:
        recipe = recipe.model_copy(update={"unreadable": args.unreadable})
    for source in dict.fromkeys(getattr(args, name) for name in asked):
        if note := ignored_files(source):
            say(note)
    for name, table in asked.items():
        if warning := searching.shape_warning(table, recipe):
            say(f"Warning, {name}: {warning}")
    retrieval, found = searching.search(
        model, query, gallery, recipe, topk=args.top, flip=args.flip
    )
    for name, table in asked.items():
        lost = set(table["path"]) - set(getattr(retrieval, name)["path"])
        if lost:
            say(f"Unreadable, left out of the {name}: {', '.join(map(repr, sorted(lost)))}.")
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


def export(args) -> int:
    """Write a model as ONNX and print the file's path."""
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


def run(args) -> int:
    """Run notebooks."""
    from reidlib.workbook import notebooks

    parameters = dict(args.parameters)
    notebooks.run(args.notebooks, parameters, output=args.output, timeout=args.timeout)
    return 0


def release(args) -> int:
    """Make a run ready for others and print the files to give away."""
    from reidlib.workbook.release import release

    for file in release(args.run):
        print(file)
    return 0


SCORES = ("mAP", "mAP_market", "top1", "top2", "top5", "top10", "mINP")


def scores(args) -> int:
    """Print a table of the runs' scores in per cent."""
    import pandas as pd

    from reidlib.evaluation.metrics import score_values
    from reidlib.paths import outputs_dir
    from reidlib.runs import find_run, read_json
    from reidlib.workbook.compare import TABLES

    names = args.runs or sorted(path.parent.name for path in outputs_dir().glob("*/config.json"))
    if not names:
        raise FileNotFoundError(
            f"There are no runs in {outputs_dir()} yet. Make one: "
            f"python -m reidlib run 03_train 04_evaluate"
        )
    against = find_run(args.against) if args.against else None
    labels, rows, notes, gains = [], [], [], {}
    for folder in map(find_run, names):
        file = folder / "metrics.json"
        metrics = read_json(file) if file.is_file() else {}
        labels.append(folder.name)
        rows.append(metrics)
        held_out = folder / TABLES["held_out"]
        if "mAP" in metrics:
            lost = metrics["queries_without_match"]
            notes.append(
                f"{folder.name}: {metrics['queries']} queries"
                + (f", {lost} of them without a match and left out" if lost else "")
            )
        elif not held_out.is_file():
            notes.append(
                f"{folder.name}: not evaluated yet; python -m reidlib run 04_evaluate "
                f"-p run {folder.name}"
            )
        if "with_flips" in metrics:
            labels.append("  with flips averaged")
            rows.append(metrics["with_flips"])
        if held_out.is_file():
            labels.append("  on people held out")
            rows.append(score_values(pd.read_csv(held_out)).mean().to_dict())
        baselines = metrics.get("baselines", {}) if args.baselines else {}
        labels += [f"  {name.replace('_', ' ')}" for name in baselines]
        rows += baselines.values()
        if (picture := folder / "ranked_lists.jpg").is_file():
            notes.append(f"ranked lists: {picture}")
        if against and folder != against:
            gains |= _gains(folder, against)
    table = 100 * pd.DataFrame(rows, index=labels).reindex(columns=list(SCORES)).astype(float)
    print(table.to_string(float_format="{:.2f}".format, na_rep="-"))
    print("\nPer cent; higher is better. mAP: mean average precision over all matches of a query;")
    print(
        "topk: share of queries with a match among the k nearest; mINP: how early the last comes."
    )
    if against:
        if not gains:
            raise ValueError(f"No run here was scored on the same queries as {against.name}.")
        print(
            f"\nmAP over that of {against.name}, points, paired over the people asked for. It is about"
        )
        print("these very networks: how far another seed moves them is not in the interval.\n")
        columns = ["gain", "95 % from", "to", "p"]
        shown = pd.DataFrame(gains.values(), index=list(gains), columns=columns)
        form = dict.fromkeys(columns[:3], "{:+.2f}".format) | {"p": "{:.2g}".format}
        print(shown.to_string(formatters=form))
    if notes:
        print("\n" + "\n".join(notes))
    return 0


def _gains(run: Path, against: Path) -> dict[str, list[float]]:
    """Return the gain of mAP with its interval in points, and p, on each split both were scored on."""
    import pandas as pd

    from reidlib.evaluation.intervals import difference
    from reidlib.workbook.compare import TABLES

    gains = {}
    for split, file in TABLES.items():
        if (run / file).is_file() and (against / file).is_file():
            tables = [[pd.read_csv(folder / file)] for folder in (run, against)]
            try:
                found = difference(*tables)
            except ValueError:  # of other queries: another data set, or other people held out
                continue
            label = run.name + (" (held out)" if split == "held_out" else "")
            gains[label] = [100 * v for v in (found.value, found.low, found.high)] + [found.p]
    return gains


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
    top = Parser(prog="python -m reidlib", description="Person re-identification, from a shell.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(function, text: str) -> Parser:
        parser = commands.add_parser(function.__name__, help=text, description=f"{text}.")
        parser.set_defaults(function=function)
        return parser

    def add_source(parser):
        parser.add_argument(
            "--pattern", help='names to pid and camid: a regular expression, or "market1501"'
        )
        parser.add_argument("--image-root", help="where the relative paths of CSV lists start")

    def add_device(parser):
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, …")

    a = command(data, "check a data set and print its counts")
    a.add_argument("--dataset", required=True, help="market1501, synthetic, or a path")
    a.add_argument("--k", type=int, default=4, help="the K of PK batches (4)")
    a.add_argument("--no-decode", action="store_true", help="do not read the images themselves")
    add_source(a)

    a = command(train, "train one run and print its folder")
    a.add_argument("--recipe", default="trinet", help="plain, trinet (the default) or demo")
    a.add_argument("--tag", default="", help="appended to the run's name")
    a.add_argument(
        "--resume",
        default="auto",
        choices=("auto", "previous", "never", "restart"),
        help="with a run of this name: go on (auto), from the checkpoint before the last "
        "(previous), refuse (never), or delete it and start again (restart)",
    )
    add_device(a)
    _add_settings(a)

    a = command(health, "print what is wrong with the training of runs, and what to try")
    a.add_argument("runs", nargs="+", metavar="RUN", help="a run's name, or its folder")

    a = command(embed, "write the embeddings of images into an HDF5 file")
    a.add_argument("--model", required=True, help="a run, or a weights.safetensors")
    a.add_argument("--images", required=True, help="a folder, or a CSV list")
    a.add_argument("--out", required=True, help="the file to write, such as gallery.h5")
    a.add_argument("--flip", action="store_true", help="mean of each image and its mirror image")
    add_source(a)
    add_device(a)

    a = command(evaluate, "print the scores as JSON")
    for side in ("query", "gallery"):
        a.add_argument(f"--{side}", required=True, help=f"HDF5 file of the {side} embeddings")
        a.add_argument(f"--{side}-csv", help="its list of images, if it holds embeddings alone")

    a = command(search, "print the gallery images nearest to pictures of somebody as CSV")
    a.add_argument("--model", required=True, help="a run, or a weights.safetensors")
    a.add_argument("--gallery", required=True, help="a folder, a CSV list, or embeddings (.h5)")
    a.add_argument("--query", required=True, help="an image, a folder, or a CSV list")
    a.add_argument("--top", type=_count, default=10, help="how many of each query (10)")
    a.add_argument("--flip", action="store_true", help="mean of each image and its mirror image")
    a.add_argument(
        "--unreadable",
        choices=("fail", "skip"),
        help="broken images: stop, or leave them out (as the model's recipe says)",
    )
    a.add_argument("--out", metavar="FILE.csv", help="write the CSV there (standard output)")
    a.add_argument("--picture", metavar="FILE.jpg", help="draw the ranked lists, 20 at most")
    a.add_argument("--html", metavar="FILE.html", help="a page to browse the ranked lists")
    add_device(a)

    a = command(export, "write a model as ONNX, with a JSON on how to prepare images")
    a.add_argument("--model", required=True, help="a run, or a weights.safetensors")
    a.add_argument("--out", required=True, help="a folder, or a file ending in .onnx")
    a.add_argument(
        "--images", help="compare model and file on these: an image, a folder, a CSV list"
    )

    a = command(run, "run notebooks, headless, one after another")
    a.add_argument("notebooks", nargs="+", help="03_train, 03, or a path")
    a.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks; repeat it",
    )
    a.add_argument("--output", help="folder of the executed copies (outputs/notebooks)")
    a.add_argument("--timeout", type=float, help="seconds that a cell may take (no limit)")

    a = command(release, "halve a run's weights, score them, and write a model card")
    a.add_argument("run", metavar="RUN", help="a run whose training has ended")

    a = command(scores, "print a table of scores in per cent")
    a.add_argument("runs", nargs="*", metavar="RUN", help="by default all under outputs/")
    a.add_argument("--baselines", action="store_true", help="show what the runs compare with, too")
    a.add_argument("--against", metavar="RUN", help="show gains over this run, with intervals")
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


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    top, commands = _parser()
    args, unknown = top.parse_known_args(argv)
    if unknown:
        parser = commands[args.command]
        options = [o for action in parser._actions for o in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
        parser.error(f"unknown {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
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
