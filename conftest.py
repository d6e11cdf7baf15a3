"""Every test works on data and runs of its own, never on the user's."""

import os
import shutil
import time

import pytest

# Waiting threads sleep instead of spinning: several test processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data folder with a small built-in data set, drawn once."""
    from reidlib.data.synthetic import draw_dataset

    root = tmp_path_factory.mktemp("data")
    draw_dataset(root / "synthetic", train_ids=12, test_ids=8, images_per_camera=2)
    return root


def table(pids, camids=None, paths=None):
    """Whose the images are, and where from, as far as it is known."""
    import pandas as pd

    columns = {"pid": pids, "camid": camids, "path": paths}
    return pd.DataFrame({name: [*column] for name, column in columns.items() if column is not None})


def problem(seed, *, ties=False, cameras=True, queries=14, size=60, people=6, dim=3):
    """A random problem with junk, distractors, a query without match and queries in the gallery."""
    import numpy as np

    rng = np.random.default_rng(seed)
    query_pids = np.append(rng.integers(1, people, queries - 1), 99)
    gallery_pids = np.append(rng.integers(-1, people, size - 1), query_pids[0])
    centres = rng.normal(size=(100, dim))
    query_emb = centres[query_pids] + rng.normal(size=(queries, dim))
    gallery_emb = centres[gallery_pids] + rng.normal(size=(size, dim))
    if ties:  # many different images at the same distance
        query_emb, gallery_emb = query_emb.round(), gallery_emb.round()
    query_camids, gallery_camids = rng.integers(1, 4, queries), rng.integers(1, 4, size)
    gallery_camids[-1] = 1 + query_camids[0] % 3
    gallery_paths = [f"g{i}" for i in range(size - 1)] + ["q0"]  # the query, whatever its camera
    for i in range(1, queries, 2):  # and every other query, by its own camera
        itself = (gallery_pids == query_pids[i]) & (gallery_camids == query_camids[i])
        for row in np.flatnonzero(itself)[:1]:
            gallery_paths[row] = f"q{i}"
    query = table(query_pids, query_camids, [f"q{i}" for i in range(queries)])
    gallery = table(gallery_pids, gallery_camids, gallery_paths)
    if not cameras:
        query["camid"] = gallery["camid"] = -1
    return query_emb, query, gallery_emb, gallery


@pytest.fixture(autouse=True)
def seeded():
    """Make every test's random tensors the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def places(data_root, tmp_path, monkeypatch):
    """Point data, cache and outputs into temporary folders."""
    monkeypatch.setenv("REID_DATA", str(data_root))
    monkeypatch.setenv("REID_CACHE", str(data_root / ".cache"))
    monkeypatch.setenv("REID_OUTPUTS", str(tmp_path / "outputs"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    place = tmp_path / "data"
    place.mkdir()
    monkeypatch.setenv("REID_DATA", str(place))
    return place


# --- a real browser


def pytest_collection_modifyitems(items):
    """Whatever needs a browser is slow: `make quick` leaves it out. The longest file goes first."""
    items.sort(key=lambda item: item.path.stem != "test_notebooks")
    for item in items:
        if "driver" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Chromium, driven: one for all tests of a process. Tests skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser, service = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if not (browser and service):
        pytest.skip("no Chromium with its chromedriver on this machine: no browser is driven")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"]
    arguments += ["window-size=1300,1000", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]
    for argument in arguments:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield opened
    opened.quit()


@pytest.fixture
def chromium(driver):
    """Chromium with an empty page and an empty console."""
    driver.get("about:blank")
    complaints(driver)
    return driver


def complaints(driver):
    """What has been written to JavaScript's console since it was asked last."""
    return [entry["message"] for entry in driver.get_log("browser")]


def until(found, seconds=30):
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
