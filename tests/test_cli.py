"""`python -m reidlib`: what a person types, and what the next program reads."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import reidlib
from reidlib.__main__ import main
from reidlib.data.tables import fingerprint, load
from reidlib.evaluation.intervals import confidence_interval, difference
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.retrieval import evaluate
from reidlib.model.stored import read_embeddings, write_embeddings
from reidlib.paths import outputs_dir
from reidlib.recipes import Recipe, make_recipe
from reidlib.training import health
from reidlib.training.journal import reproduce_command

TINY = "--recipe demo --steps 2 --hold-out 0 --p 3 --k 2 --height 32 --width 16 --dim 8 --precision float32"


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """An outputs folder with one run, made from the shell's side, and what that printed."""
    outputs, printed = tmp_path_factory.mktemp("outputs"), io.StringIO()
    places = {"DATA": data_root, "CACHE": data_root / ".cache", "OUTPUTS": outputs}
    with pytest.MonkeyPatch.context() as patch:
        for name, place in places.items():
            patch.setenv(f"REID_{name}", str(place))
        patch.setattr(sys, "stdout", printed)
        assert main(["train", *TINY.split(), "--tag", "tiny"]) == 0
    return outputs / "synthetic_batchhard_softplus_tiny", printed.getvalue()


@pytest.fixture
def model(trained, monkeypatch):
    """The name of a trained run."""
    monkeypatch.setenv("REID_OUTPUTS", str(trained[0].parent))
    return trained[0].name


# --- the command line itself


def test_help_is_quick_to_import_and_pure():
    code = "import sys, reidlib.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'pandas', 'papermill', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "search" in done.stdout


def test_load_model_is_there_when_it_is_asked_for():
    from reidlib.model.weights import load_model

    assert reidlib.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        _ = reidlib.lode_model


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("train --marign 0.2", "unknown '--marign'; did you mean '--margin'?"),
        ("train --marg 0.2", "unknown '--marg'; did you mean '--margin'?"),  # no abbreviations
        ("evaluate --query q.h5", "required: --gallery"),
        ("search --model m --gallery g --query q --top 0", "must be 1 or more"),
        ("run 03 -p lr", "expected 2 arguments"),
        ("score r --exclude-same-camera maybe", "must be true or false"),
    ],
)
def test_a_wrong_command_line_is_status_2_in_two_lines(line, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(line.split())
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == ""
    assert message in err and len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data --dataset nowhere", "nowhere"),
        ("train --recipe nothing", "Unknown recipe 'nothing'"),
        ("train --lr fast --k 1", "lr = 'fast'"),
        ("train --recipe demo --device warp", "no device 'warp'"),
        ("train --recipe demo --k 9999999999", "of memory: lower p or k"),
        ("evaluate --query q.h5 --gallery g.h5", "no embedding file q.h5"),
        ("search --model m --gallery g --query q.jpg", "no image 'q.jpg'"),
        ("export --model nobody --out x.onnx", "no run 'nobody'"),
        ("run 03_nothing", "no notebook '03_nothing'"),
        ("score nobody", "no run 'nobody'"),
        ("scores", "python -m reidlib run 03_train"),
    ],
)
def test_what_a_user_can_mend_is_status_1_without_traceback(line, message, capsys, monkeypatch):
    monkeypatch.delenv("REID_DEBUG", raising=False)
    assert main(line.split()) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) <= 2
    monkeypatch.setenv("REID_DEBUG", "1")
    with pytest.raises((ValueError, OSError)):
        main(line.split())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("Another process is writing it."), 1),
        (MemoryError("Unable to allocate 9 TiB."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_training(error, status, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(reidlib, "train", fail)
    assert main(["train"]) == status
    assert capsys.readouterr().err == (f"{error}\n" if str(error) else "Stopped.\n")
    error = KeyError("a bug is not hidden")
    with pytest.raises(KeyError):
        main(["train"])


# --- the commands


def test_data_prints_the_report(capsys, tmp_path):
    assert main(["data", "--dataset", "synthetic", "--no-decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("synthetic: ") and "OK (errors: 0" in out and "decoded" not in out
    for pid in ("a", "b"):
        (tmp_path / "mine" / pid).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 32)).save(tmp_path / "mine" / pid / f"{i}.png")
    assert main(["data", "--dataset", str(tmp_path / "mine")]) == 1
    assert "NOT OK" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch):
    """What `train` was asked for, by each command line."""
    seen = []
    monkeypatch.setattr(reidlib, "train", lambda *args: seen.append(args) or outputs_dir())
    monkeypatch.setattr(health, "run_text", lambda folder: "Health: no finding.")
    return seen


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        make_recipe("demo", seed=3),
        make_recipe("plain", margin=0.0, lr=3e-05, loss="batch_all", mean="valid"),
        make_recipe("trinet", epochs=7, head=False, flip=False, squared=True, last_stride=1),
        make_recipe("trinet", margin=1, weights="none", precision="bfloat16", decay_to=1),
    ],
)
def test_the_command_to_reproduce_a_run_gives_its_very_recipe(recipe, asked):
    words = shlex.split(reproduce_command(recipe, "seed1"))
    assert words[:3] == ["python", "-m", "reidlib"] and main(words[3:]) == 0
    assert asked == [(recipe, "seed1", "auto", "auto")]


def test_every_setting_is_an_option_and_text_stays_text(asked):
    values = Recipe().model_dump() | {"dataset": "2024", "steps": None, "epochs": 3, "margin": 0.5}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert main(["train", *words, "--resume", "never", "--device", "cpu"]) == 0
    assert asked == [(Recipe(**values), "", "never", "cpu")]


def test_train_prints_the_folder_alone(trained, model, capsys):
    folder, printed = trained
    assert printed == f"{folder}\n"
    assert main(["train", *TINY.split(), "--tag", "tiny"]) == 0  # it is there: words, elsewhere
    assert capsys.readouterr().out == printed
    recipe = json.loads((folder / "config.json").read_text())
    assert (recipe["steps"], recipe["dim"], recipe["hold_out"]) == (2, 8, 0)


@pytest.mark.slow
def test_embed_and_evaluate(model, data_root, tmp_path, capsys):
    folder = data_root / "synthetic"
    for split, images in (("query", "query"), ("gallery", "bounding_box_test")):
        line = f"embed --model {model} --images {folder / images} --out {tmp_path / split}.h5"
        assert main(f"{line} --pattern market1501 --device cpu".split()) == 0
    out, err = capsys.readouterr()
    assert out == "" and "No identities" not in err

    line = f"evaluate --query {tmp_path}/query.h5 --gallery {tmp_path}/gallery.h5"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    query, gallery = (read_embeddings(tmp_path / f"{s}.h5") for s in ("query", "gallery"))
    expected = evaluate(*query, *gallery)
    assert json.loads(out) == expected.scores
    assert set(json.loads(out)) == {*SCORES, "queries", "queries_without_match"}
    assert expected.protocol in err
    dataset = load("synthetic")
    assert list(query[1]["path"]) == list(dataset.query["path"])
    assert list(gallery[1]["camid"]) == list(dataset.gallery["camid"])


def test_score_prints_what_it_wrote(model, trained, capsys):
    line = f"score {model} --device cpu"
    assert main([*line.split(), "--no-baselines"]) == 0
    out, err = capsys.readouterr()
    scores, written = json.loads(out), json.loads((trained[0] / "metrics.json").read_text())
    assert {*SCORES, "queries", "queries_without_match"} == {*scores}
    assert scores.items() <= written.items() and written["baselines"] == {}
    assert model in err and "(per cent)" in err and "untrained" not in err
    assert main([*line.split(), "--flip"]) == 0
    out, err = capsys.readouterr()
    flipped = json.loads(out).pop("with_flips")
    assert flipped["mAP"] != scores["mAP"] and "with flips averaged" in err and "untrained" in err
    assert {name: json.loads(out)[name] for name in scores} == scores


@pytest.mark.slow
def test_other_ways_to_score_have_a_door_and_a_place_of_their_own(
    model, trained, data_root, tmp_path, capsys
):
    shutil.copytree(data_root / "synthetic", tmp_path / "mine")
    broken = min((tmp_path / "mine/query").iterdir())
    broken.write_text("no picture")
    metrics = (trained[0] / "metrics.json").read_bytes()
    line = f"score {model} --no-baselines --dataset {tmp_path / 'mine'}".split()
    assert main(line) == 1 and broken.name in capsys.readouterr().err
    assert main([*line, "--unreadable", "skip"]) == 0
    out, err = capsys.readouterr()
    queries = len(load("synthetic").query)
    assert json.loads(out)["queries"] == queries - 1 and "1 images cannot be read" in err
    assert main(["score", model, "--no-baselines", "--exclude-same-camera", "false"]) == 0
    assert "same camera stay in, as asked" in capsys.readouterr().err
    assert json.loads((trained[0] / "same_camera/metrics.json").read_text())["queries"] == queries
    assert (trained[0] / "metrics.json").read_bytes() == metrics
    line = f"embed --model {model} --images {broken.parent} --out {tmp_path / 'e.h5'}".split()
    assert main(line) == 1 and main([*line, "--unreadable", "skip"]) == 0
    assert f"left out of the images: '{broken}'" in capsys.readouterr().err


def test_embed_and_search_say_what_does_not_fit(model, data_root, tmp_path, capsys):
    images = data_root / "synthetic/query"
    assert main(f"embed --model {model} --images {images} --out {tmp_path}".split()) == 1
    assert "is no file" in capsys.readouterr().err
    out = tmp_path / "new/E.h5"
    assert main(f"embed --model {model} --images {images} --out {out} --flip".split()) == 0
    assert "No identities are known" in capsys.readouterr().err
    emb, table = read_embeddings(out)
    write_embeddings(out, np.ones((len(emb), 5)), table)
    line = f"search --model {model} --gallery {out} --query {table['path'][0]}"
    assert main(line.split()) == 1
    assert "embeddings of 5 numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_results_are_alone_wherever_the_other_streams_go(tmp_path):
    """A closed one would be the next file that is opened; in ASCII, "ü" is written as an escape."""
    run_folder(tmp_path, "ünï")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = {"shell": True, "env": environment, "capture_output": True, "text": True}
    for run, status, said in (("ünï", 0, r"\xfcn\xef"), ("nobody", 1, "")):
        line = f"exec {shlex.quote(sys.executable)} -m reidlib scores {run} <&- 2>&-"
        done = subprocess.run(line, **options)
        assert done.returncode == status and said in done.stdout and bool(said) == bool(done.stdout)


def run_folder(tmp_path, name, **files):
    """A run of nothing but settings and these files: JSON, or tables of average precisions."""
    folder = tmp_path / "outputs" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(Recipe().model_dump_json())
    for file, content in files.items():
        table = isinstance(content, pd.DataFrame)
        text = content.to_csv(index=False) if table else json.dumps(content)
        (folder / f"{file}.{'csv' if table else 'json'}").write_text(text)
    return folder


def of_queries(aps, pids=(1, 1, 2, 3)):
    table = pd.DataFrame({"query": range(4), "pid": pids, "matches": 2, "first_rank": 1})
    return table.assign(AP=aps, AP_market=aps, INP=aps)


def test_scores_is_a_table_in_per_cent(tmp_path, capsys):
    counts = {"queries": 40, "queries_without_match": 1}
    ours = {"mAP": 0.5, "mAP_market": 0.4875, "top1": 0.625, "mINP": 0.25} | counts
    base = {"untrained": {"mAP": 0.125}, "colour_histogram": {"mAP": 0.75}}  # of an older version
    picture = run_folder(tmp_path, "a_run", metrics=ours | {"baselines": base}) / "ranked_lists.jpg"
    picture.touch()
    run_folder(tmp_path, "b_run", metrics={"held_out": {}})
    run_folder(tmp_path, "c_run")
    assert main(["scores"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "mAP mAP (Market) top-1 top-2 top-5 top-10 mINP"
    assert lines[1].split() == ["a_run", "50.00", "48.75", "62.50", "-", "-", "-", "25.00"]
    assert lines[2].split() == ["b_run", *"-------"] and lines[3].split()[0] == "c_run"
    text = "\n".join(lines)
    assert "40 queries, 1 of them without a match" in text and "colour" not in text
    assert "score b_run" in text and "score c_run" in text and "score a_run" not in text
    assert str(picture) in text

    assert main(["scores", "--baselines", "a_run"]) == 0
    text = capsys.readouterr().out
    assert "b_run" not in text
    assert [line.split("  - ")[0].split() for line in text.splitlines()[1:4]] == [
        ["a_run", "50.00", "48.75", "62.50"],
        ["untrained", "12.50"],
        ["colour", "histogram", "75.00"],
    ]


def test_scores_against_another_run_on_the_same_queries(tmp_path, capsys):
    better, base = of_queries([0.9, 0.8, 0.7, 0.6]), of_queries([0.8, 0.6, 0.7, 0.3])
    others = of_queries([0.8, 0.6, 0.7, 0.3], pids=(1, 2, 2, 3))
    for name, table in (("better", better), ("base", base), ("other_people", others)):
        run_folder(tmp_path, name, per_query_held_out=table)
    run_folder(tmp_path, "on_test", per_query=base)
    assert main(["scores", "--against", "base"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held_out = [line.split() for line in lines if line.startswith("  on people held out")]
    assert [row[4] for row in held_out] == ["60.00", "75.00", "60.00"]
    assert not any("not scored" in line and "better" in line for line in lines)
    (gain,) = [line.split() for line in lines if "(held out)" in line]
    found = difference([better], [base])
    values = [f"{100 * value:+.2f}" for value in (found.value, found.low, found.high)]
    assert gain == ["better", "(held", "out)", *values, f"{found.p:.2g}"]
    assert values[0] == "+15.00"

    assert main(["scores", "on_test", "other_people", "--against", "base"]) == 1
    assert "No run here was scored on the same queries as base" in capsys.readouterr().err


def test_each_run_on_each_data_set(tmp_path, data_root, monkeypatch, capsys):
    for name in ("no pictures", "weights"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data/synthetic").symlink_to(data_root / "synthetic")
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / f"data/my people/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/my people/{name}.png").touch()
    monkeypatch.setenv("REID_DATA", str(tmp_path / "data"))
    table = of_queries([0.9, 0.8, 0.7, 0.6])
    own = {"evaluated_on": "synthetic", "test_data": fingerprint(load("synthetic"))}
    away = {"evaluated_on": "far", "test_data": "0123abcd" * 8}
    files = {"metrics": own, "per_query": table, "weights": {}}
    run_folder(tmp_path, "a_run", **files)
    run_folder(tmp_path, "a_run/on_far_0123abcd", metrics=away, per_query=table)
    run_folder(tmp_path, "a_run/on_far_0123abcd_same_camera", metrics=own, per_query=table * 0)
    run_folder(tmp_path, "b_run", **files | {"metrics": own | {"weights_sha256": "of others"}})
    run_folder(tmp_path, "b_run/on_far_0123abcd", metrics=away, per_query=table[:1])
    run_folder(tmp_path, "c_run", **files | {"per_query": table[:2], "metrics": own | {"mAP": 1}})
    run_folder(tmp_path, "d_run")
    for folder in (tmp_path / "outputs").glob("[ab]_run"):
        (folder / "weights.json").rename(folder / "weights.safetensors")
    assert main(["scores", "--matrix"]) == 0
    text = capsys.readouterr().out
    low, high = confidence_interval(table, by="pid").loc["mAP", ["low", "high"]]
    cell = f"75.00 ({100 * low:.1f} to {100 * high:.1f})"
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["synthetic", "my-people", "far"] and lines[1][2] == "0123abcd"
    assert lines[2] == ["a_run", "mAP", *f"{cell}*".split(), "–", *cell.split()]
    assert lines[3][0] == "top-1" and lines[4] == ["b_run", "mAP", "–", "–", "90.00"]
    assert "c_run: passed over" in text and "d_run" not in text
    assert f"no pictures in {tmp_path / 'data'} is no column" in text and "weights in" not in text
    score = "python -m reidlib score {} --dataset {} --no-baselines"
    wanted = ("a_run", "'my people'"), ("b_run", "synthetic"), ("b_run", "'my people'")
    assert text.splitlines()[-3:] == [score.format(*names) for names in wanted]
    assert main(["scores", "--matrix", "d_run"]) == 1
    assert "None of these runs has weights" in capsys.readouterr().err
    assert main(["scores", "--matrix", "--baselines"]) == 1
