"""`python -m reidlib`: a thin door to the library, for a shell.

Standard output carries results alone; all else goes to standard error. Status 0: done, 1: an error
that is told in a line or two (REID_DEBUG=1 shows where), 2: a wrong command line, 130: Ctrl-C.
"""

import argparse
import json
import os
import shlex
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import reidlib
from reidlib.progress import progress
from reidlib.recipes import Recipe, make_recipe
from reidlib.runs import find_run, run_name, write_text
from reidlib.typed import in_words, typed
from reidlib.words import did_you_mean

# Each command imports what else it needs: torch takes seconds, and --help does without.


def say(*lines: str) -> None:
    """Print for the person, not for the next program."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _output(name: str | None) -> Path | None:
    """Return the path of a file to be written; a folder or a device is refused now, not after an hour."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not name.strip() or (path.exists() and not path.is_file()):
        raise ValueError(f"{name!r} is no file: give the name of one to be written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def data(args) -> int:
    """Check a data set and print its counts and errors."""
    bar = partial(progress, desc="read images", unit="img")
    dataset = reidlib.load(args.dataset, pattern=args.pattern, image_root=args.image_root)
    report = reidlib.check(dataset, args.k, decode=not args.no_decode, progress=bar)
    print(report)
    return 0 if report.ok else 1


def train(args) -> None:
    """Train one run and print its folder."""
    from reidlib.training import distributed
    from reidlib.training.health import run_text

    recipe = _recipe(args)
    with redirect_stdout(sys.stderr):  # whatever is told on the way
        folder = reidlib.train(recipe, args.tag, args.resume, args.device)
    if distributed.rank():  # the first of several processes speaks
        return
    print(folder)
    say(run_text(folder), f"Next: python -m reidlib run 04_evaluate -p run {folder.name}")


def _recipe(args) -> Recipe:
    """Return the recipe that a command line asks for."""
    settings = {name: getattr(args, name, None) for name in Recipe.model_fields}
    for name, kind in _kinds().items():
        with suppress(ValueError):  # make_recipe says of all settings at once what is wrong
            settings[name] = typed(settings[name], kind)
    return make_recipe(args.recipe, **settings)


def compare(args) -> int:
    """Train and score the rows of a comparison, as 05_compare_margins does, and print their scores.

    What is there is taken as it is, so start it again, or several times at once. With --list, print
    a command for each row instead.
    """
    from reidlib.workbook.compare import complete
    from reidlib.workbook.scores import scores_text
    from reidlib.workbook.variants import comparison

    grids = {"margins": not args.no_margins, "ladder": not args.no_ladder}
    compared = comparison(_recipe(args), tag=args.tag, seeds=args.seeds, **grids)
    rows = {run_name("", *row): row for row in compared.rows.values()}
    if args.list:
        words = [sys.executable, "-m", "reidlib", *(w for w in args.line if w != "--list")]
        print(*(shlex.join([*words, "--row", name]) for name in rows), sep="\n")
        return 0
    if args.row and args.row not in rows:
        raise ValueError(f"There is no row {args.row!r}{did_you_mean(args.row, rows)} See --list.")
    asked = {args.row: rows[args.row]} if args.row else rows
    with redirect_stdout(sys.stderr):  # whatever is told on the way
        made = complete(asked, args.split, jobs=args.jobs, device=args.device)
    say(*(f"{name}: {row.problem}" for name, row in made.items() if not row.folder))
    print(scores_text(found := [row.folder for row in made.values() if row.folder]))
    return int(len(found) < len(made))


def health(args) -> None:
    """Print what is wrong with the training of runs, and what to try first."""
    from reidlib.training.health import run_text

    for folder in map(find_run, args.runs):
        print(f"{folder.name}\n{run_text(folder)}")


def score(args) -> None:
    """Score a run, write the scores into its folder, and print them as JSON."""
    options = {"flip": args.flip, "precision": args.precision, "device": args.device}
    options |= {"pattern": args.pattern, "baselines": not args.no_baselines}
    options |= {"unreadable": args.unreadable, "exclude_same_camera": args.exclude_same_camera}
    scored = reidlib.score_run(args.run, args.dataset, **options)
    flipped = {"with_flips": scored.with_flips.scores} if scored.with_flips else {}
    each = {"by_data_set": scored.by_data_set} if scored.by_data_set else {}
    print(json.dumps(scored.scores | flipped | each, indent=2, allow_nan=False))
    say(str(scored), *scored.run.notes, *scored.notes)


def scores(args) -> None:
    """Print a table of scores in per cent, of runs that were scored before."""
    from reidlib.workbook.scores import matrix_text, scores_text

    options = {"baselines": args.baselines, "against": args.against}
    if args.matrix and any(options.values()):
        raise ValueError("--matrix is a table of its own: leave out --baselines and --against.")
    print(matrix_text(args.runs) if args.matrix else scores_text(args.runs, **options))


def evaluate(args) -> None:
    """Print the scores of embeddings from any toolkit as JSON."""
    out = _output(args.out)
    query = reidlib.read_embeddings(args.query, args.query_csv)
    gallery = reidlib.read_embeddings(args.gallery, args.gallery_csv, in_memory=False)
    options = {"exclude_same_camera": args.exclude_same_camera}
    options["partial_file"] = out and out.with_name(f"{out.name}.partial")
    evaluated = reidlib.evaluate(*query, *gallery, **options)
    if out:
        write_text(out, evaluated.per_query.to_csv(index=False))
    print(json.dumps(evaluated.scores, indent=2, allow_nan=False))
    say(evaluated.protocol)


def embed(args) -> None:
    """Write the embeddings of images into an HDF5 file."""
    from reidlib.data.pixels import save_images
    from reidlib.data.tables import ignored_files
    from reidlib.look.search import left_out
    from reidlib.model.device import pick_device

    out = _output(args.out)
    table = reidlib.image_list(args.images, pattern=args.pattern, image_root=args.image_root)
    say(*filter(None, [ignored_files(args.images)]))
    model = reidlib.load_model(args.model, pick_device(args.device), args.unreadable)
    pixels, readable = reidlib.load_images(table, model.recipe)
    say(*left_out({"images": table}, {"images": readable}))
    if args.crops:
        save_images(readable, Path(args.crops).expanduser())
    emb = reidlib.embed(model, pixels, model.recipe, flip=args.flip)
    reidlib.write_embeddings(out, emb, readable)
    say(f"{len(emb):,} embeddings of {emb.shape[1]} numbers: {out}")
    if (readable["pid"] == -1).all():
        say(
            "No identities are known (pid -1): enough to search, not to evaluate. "
            "--pattern market1501 reads them from file names like Market-1501's."
        )


def search(args) -> None:
    """Print the gallery images nearest to pictures of somebody as CSV."""
    from reidlib.look import search as room
    from reidlib.model.device import pick_device

    if args.picture and Path(args.picture).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{args.picture} must end in .jpg or .png.")
    out, picture, page = map(_output, (args.out, args.picture, args.html))
    tables = {"query": room.picture_table(args.query), "gallery": room.read_gallery(args.gallery)}
    model = reidlib.load_model(args.model, pick_device(args.device), args.unreadable)
    say(*room.remarks(vars(args), tables, model.recipe))
    options = {"topk": args.top, "flip": args.flip, "index": args.index}
    retrieval, found = reidlib.search(model, *tables.values(), model.recipe, **options)
    say(*room.left_out(tables, {"query": retrieval.query, "gallery": retrieval.gallery}))
    count = len(retrieval.query)
    lists = f"{count:,} ranked list" + ("s" if count > 1 else "")
    if out:
        write_text(out, room.search_csv(found))
        say(f"{lists}: {args.out}")
    else:
        print(room.search_csv(found), end="")
    if page:
        write_text(page, reidlib.ranked_list_page(retrieval, topk=args.top))
        say(f"Page of the ranked lists: {args.html}")
    if picture:  # last, for it may fail; 20 lists make one of 47 inches
        from reidlib.look import figures, photographs

        figures.save(photographs.search_lists(found[found["query"] < 20]), picture)
        say(f"Picture of {min(count, 20)} of {lists}: {args.picture}")


def export(args) -> None:
    """Write a model as ONNX, with a JSON on how to prepare images."""
    from reidlib.data.pixels import read_image
    from reidlib.look.search import picture_table
    from reidlib.workbook.export import export

    images = None
    if args.images:
        paths = picture_table(args.images)["path"]
        images = [read_image(path) for path in paths[:: -(-len(paths) // 32)]]  # 32 at most
    if not args.out.strip():
        raise ValueError("--out is empty: give a folder, or a file ending in .onnx.")
    file, card = export(args.model, args.out, images, args.normalised)
    print(file)
    parity = card["parity"]
    say(
        f"Embeddings of {parity['checked_on']} agree with the model's to "
        f"{parity['max_abs_difference']:.1g}. How to prepare images: {file.name}.json"
    )


def run(args) -> None:
    """Run notebooks, headless, one after another."""
    from reidlib.workbook.notebooks import run

    run(args.notebooks, dict(args.parameters or ()), output=args.output, timeout=args.timeout)


def release(args) -> None:
    """Halve a run's weights, score them, write a model card, and print the files to give away."""
    from reidlib.workbook.release import release

    print(*release(args.run), sep="\n")


def publish(args) -> None:
    """Write a scored run as the Hub of models expects it: weights, settings, scores and a card."""
    from reidlib.workbook.release import publish

    print(*publish(args.run, args.to), sep="\n")


# Their docstrings are the help.
COMMANDS = (data, train, health, score, scores, evaluate, embed, search, export, run, release)
COMMANDS += (publish, compare)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _true_or_false(text: str) -> bool:
    with suppress(ValueError):
        return typed(text, bool)
    raise argparse.ArgumentTypeError("must be true or false")


OF_ROWS = ("loss", "margin", "seed", "checkpoint_every", "evaluate_every")  # each row sets them
# What the help shows for a value: `batch_hard|batch_all`, `NUMBER|soft`.
VALUES = {bool: "true|false", str: "TEXT", int: "N", float: "NUMBER", NoneType: "none"}
TYPES = {"int": int, "float": float, "count": _count, "truth": _true_or_false}  # in commands.toml


class Parser(argparse.ArgumentParser):
    """A wrong command line leaves two lines, not the whole usage."""

    def error(self, message: str):
        """Leave with status 2."""
        say(f"{self.prog}: {message}\nSee {self.prog} --help")
        raise SystemExit(2)


def _parser() -> Parser:
    """Return the parser of the whole line."""
    top = Parser(prog="python -m reidlib", description="Person re-identification, from a shell.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for function in COMMANDS:
        text = function.__doc__
        words = {"help": (text[0].lower() + text[1:]).rstrip("."), "description": text}
        parser = commands.add_parser(function.__name__, allow_abbrev=False, **words)
        parser.set_defaults(function=function, parser=parser)
    told = Path(__file__).with_name("commands.toml").read_text(encoding="utf-8")
    for names, option, text, *more in tomllib.loads(told)["options"]:
        more = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(*more).items()}
        more |= {"type": TYPES[more["type"]]} if "type" in more else {}
        for name in names.split():
            commands.choices[name].add_argument(option, help=text, **more)
    title = "settings of the recipe (defaults are trinet's)"
    groups = [commands.choices[name].add_argument_group(title) for name in ("train", "compare")]
    for name, kind in _kinds().items():
        field = Recipe.model_fields[name]
        text = f"{field.description} ({field.default})".replace("%", "%%")
        values = in_words(kind, VALUES, "|", str)
        for group in groups[: 1 if name in OF_ROWS else 2]:
            group.add_argument(f"--{name.replace('_', '-')}", metavar=values, help=text)
    return top


def _kinds() -> dict[str, Any]:
    """Return what each setting of a recipe may be, without its limits."""
    hints = get_type_hints(Recipe)
    return {name: hints[name] for name in Recipe.model_fields}


def _mend_streams() -> None:
    """Give closed streams a place to go to, and let no letter stop what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file would be opened as this stream
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # where it is the same, it is not inherited yet
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        elif number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = _parser().parse_known_args(argv)
    args.line = argv
    if unknown:
        options = [name for action in args.parser._actions for name in action.option_strings]
        near = did_you_mean(unknown[0].split("=")[0], options)
        args.parser.error(f"unknown {unknown[0]!r}{near}")
    try:
        status = args.function(args) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        if os.environ.get("REID_DEBUG"):
            raise
        say(str(error).strip() or type(error).__name__)
        return 1


if __name__ == "__main__":
    _mend_streams()
    sys.exit(main())
