"""Every test works on data and runs of its own, never on the user's."""

import os

import pytest

# Waiting threads sleep instead of spinning: several test processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data folder with a small embedded data set, drawn once."""
    from reidlib.data.synthetic import draw_dataset

    root = tmp_path_factory.mktemp("data")
    draw_dataset(root / "synthetic", train_ids=12, test_ids=8, images_per_camera=2)
    return root


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
