"""The pixel cache and the batched augmentation, with its statistics."""

import errno
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from reidlib.data import pixels as module
from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images, read_image
from reidlib.paths import cache_dir
from reidlib.recipes import make_recipe
from reidlib.runs import write_atomically


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Six images of noise, and a cache of their own."""
    monkeypatch.setenv("REID_CACHE", str(tmp_path / "cache"))
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    noise = np.random.default_rng(0).integers(0, 256, (6, 24, 12, 3), dtype=np.uint8)
    for path, image in zip(paths, noise, strict=True):
        Image.fromarray(image).save(path)
    return pd.DataFrame({"path": paths, "pid": range(6), "camid": 1})


def load(table, size=(9, 9), unreadable="fail", **options):
    size = {"height": size[0], "width": size[1], "unreadable": unreadable}
    return load_images(table, make_recipe("demo").model_copy(update=size), False, **options)


def test_pixels_are_those_of_the_files_also_after_they_were_written_to(table):
    for _ in range(2):
        pixels, kept = load(table)
        assert isinstance(pixels, np.memmap) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, [read_image(path) for path in table["path"]])
        pd.testing.assert_frame_equal(kept, table)
        pixels[0] = 0


def test_a_broken_cache_is_made_again(table):
    before = load(table)[0].copy()
    for file in cache_dir().iterdir():
        whole, flipped = file.read_bytes(), bytearray(file.read_bytes())
        flipped[140 % len(flipped)] ^= 1
        zeroed = bytes(len(whole))
        for content in (b"", b"garbage", b"[]", None, flipped, zeroed, whole[:-4]):
            file.unlink() if content is None else file.write_bytes(content)
            again, kept = load(table)
            assert np.array_equal(again, before) and len(kept) == 6


def test_two_runs_that_decode_at_once_do_not_disturb_each_other(table, monkeypatch):
    before = load(table)[0].copy()
    (file,) = cache_dir().glob("*.pixels")
    whole, read, seen = file.read_bytes(), module.read_image, []
    file.unlink()

    def reads_while_another_run_is_ready(path):
        if not seen:
            file.write_bytes(whole)
        seen.append(load(table)[0].copy())
        return read(path)

    monkeypatch.setattr(module, "read_image", reads_while_another_run_is_ready)
    assert np.array_equal(load(table)[0], before) and np.array_equal(seen, [before] * 6)
    assert len([*cache_dir().iterdir()]) == 2, "nothing half-made"


def test_a_second_start_opens_no_image_and_sees_what_changed(table, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(path) or real(path, **how))
    for first in (True, False):
        for training in (False, True):  # in their own size: the same file
            load(table, training=training)
            assert bool(opened) == (first and not training)
            opened.clear()
    path = Path(table["path"][2])
    before = path.stat()
    Image.new("RGB", (12, 24), "white").save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))  # the file's size stays
    os.utime(path, ns=(1, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    pixels, _ = load(table)
    assert len(opened) >= 6 and (pixels[2] == 255).all()
    opened.clear()
    load(table.iloc[:3])
    assert opened  # other rows are another cache


def test_the_size_of_what_cannot_be_read_is_looked_for_again(table, monkeypatch):
    Image.new("RGB", (30, 50), "red").save(table["path"][0])
    with monkeypatch.context() as away:
        real = Image.open
        away.setattr(Image, "open", lambda path, **_: real("" if "0.png" in path else path))
        assert load(table, unreadable="skip")[0].shape == (5, 24, 12, 3)
    assert load(table)[0].shape == (6, 9, 9, 3)


def test_images_keep_the_size_that_all_have_unless_it_is_huge(table):
    for size, training, shape in (
        ((17, 1), False, (17, 1)),  # 24 × 12 are more than 16 times as many pixels
        ((17, 1), True, (24, 12)),
        ((18, 1), False, (24, 12)),
        ((17, 1), False, (17, 1)),  # and from the cache
    ):
        assert load(table, size, training=training)[0].shape == (6, *shape, 3)
    Image.new("RGB", (30, 50), "red").save(table["path"][5])
    pixels, _ = load(table, (24, 12))
    assert pixels.shape == (6, 24, 12, 3) and (pixels[5] == [255, 0, 0]).all()
    assert np.array_equal(pixels[0], read_image(table["path"][0]))
    assert load(table, (16, 8), training=True)[0].shape == (6, 18, 9, 3)  # enlarged by 1.125


def test_unreadable_images_are_named_or_skipped(table):
    for row in (1, 4):
        os.truncate(table["path"][row], 40)
    with pytest.raises(ValueError, match=r"(?s)2 of 6 images cannot be read.*1\.png.*4\.png.*skip"):
        load(table)
    assert not [*cache_dir().iterdir()], "a failed decode leaves nothing behind"
    for _ in range(2):  # decoded, then from the cache
        pixels, kept = load(table, unreadable="skip")
        assert kept["pid"].tolist() == [0, 2, 3, 5] and len(pixels) == 4
        assert np.array_equal(pixels[3], read_image(table["path"][5]))


def test_nothing_to_load_is_an_error(table):
    with pytest.raises(ValueError, match="no rows"):
        load(table[:0])
    paths = table["path"][:2].tolist()
    for path in paths:
        Image.new("RGB", (12, 24)).save(path, format="jpeg")
        os.truncate(path, os.path.getsize(path) - 9)
    with pytest.raises(ValueError, match="2 of 2 images cannot be read"):  # a header is there
        load(table[:2], unreadable="skip")
    for path in paths:
        os.truncate(path, 0)
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.png: no image format"):
        load(table[:2], unreadable="skip")


@pytest.mark.parametrize("kind", ["pipe", "link to nothing"])
def test_what_is_no_file_is_named_or_skipped(kind, table):
    path = Path(table["path"][1])
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read:\n.*1\.png: .*no"):
        load(table)
    assert load(table, unreadable="skip")[1]["pid"].tolist() == [0, 2, 3, 4, 5]


def test_a_cache_that_cannot_be_written_says_how_to_move_it(table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"(?s)kept in .*cache.*needs 0\.0 MB.*Set REID_CACHE"):
            load(table)
    assert not [*cache_dir().iterdir()]
    (tmp_path / "file").touch()
    monkeypatch.setenv("REID_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="Set REID_CACHE"):
        load(table)


def test_what_killed_processes_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, kept = platform.node(), {"notes-99999999.ipynb", ".a.b.tmp"}
    kept |= {f".x.npy.elsewhere-{gone.pid}.tmp", f".y.npy.{here}-{os.getpid()}.tmp"}
    left = {f".x.npy.{gone.pid}.tmp", f".x.npy.{here}-{gone.pid}.tmp"}
    for name in kept | left | {f"a.running-{gone.pid}.ipynb"}:
        (tmp_path / name).touch()
    (tmp_path / f".data.{here}-{gone.pid}.tmp").mkdir()
    write_atomically(tmp_path / "x.npy", lambda fresh: fresh.touch())
    assert {path.name for path in tmp_path.iterdir()} == kept | {"x.npy"}


# --- augmentation


def batch(n=3000, h=9, w=7):
    """Images whose pixel (y, x) has the colours (y, x, 0): each shows where it was cut out."""
    y, x = np.mgrid[:h, :w]
    one = np.stack([y, x, np.zeros_like(x)], axis=2).astype(np.uint8)
    return torch.from_numpy(np.repeat(one[None], n, axis=0))


def unit(images):
    """Back from [0, 1] to colours."""
    return (images * 255).round().long()


def test_crops_reach_every_place_equally_and_half_are_flipped():
    augment = Augmentation((6, 4), enlarge=1.5, normalise="unit", seed=1)
    out = unit(augment(batch(6000, 9, 6)))
    assert augment.enlarged == (9, 6) and out.shape == (6000, 3, 6, 4)
    top = out[:, 0, 0, 0]
    flipped = out[:, 1, 0, 0] > out[:, 1, 0, 1]
    left = torch.where(flipped, out[:, 1, 0, 3], out[:, 1, 0, 0])
    # 5 standard deviations of a share
    assert abs(flipped.float().mean() - 0.5) < 5 * (0.25 / 6000) ** 0.5
    for places, n in ((top, 4), (left, 3)):
        counts = places.bincount(minlength=n)
        assert len(counts) == n
        assert (counts - 6000 / n).abs().max() < 5 * (6000 / n) ** 0.5
    # and the three are independent
    table = torch.stack([top.float(), left.float(), flipped.float()])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 5 / 6000**0.5


def test_no_flip_no_crop_is_the_image_itself():
    pixels = batch(5, 6, 4)
    out = Augmentation((6, 4), flip=False, normalise="unit")(pixels)
    assert torch.equal(unit(out), pixels.permute(0, 3, 1, 2).long())


def test_the_seed_decides():
    pixels = torch.randint(0, 256, (8, 16, 8, 3), dtype=torch.uint8)
    one, two, other = (Augmentation((16, 8), 1.25, erasing=0.5, seed=seed) for seed in (3, 3, 4))
    first = one(pixels)
    assert torch.equal(first, two(pixels)) and not torch.equal(first, other(pixels))
    state = one.generator.get_state()
    second = one(pixels)
    one.generator.set_state(state)
    assert torch.equal(second, one(pixels)) and not torch.equal(first, second)


def test_erasing():
    pixels = torch.full((2000, 40, 20, 3), 200, dtype=torch.uint8)
    out = Augmentation((40, 20), erasing=0.5, normalise="unit", seed=2)(pixels)
    erased = (out == 0.5).all(dim=1)  # (B, h, w)
    assert ((out == 0.5).any(dim=1) == erased).all()
    share = erased.flatten(1).float().mean(dim=1)
    hit = share > 0
    assert abs(hit.float().mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5
    assert share[hit].min() > 0.01 and share[hit].max() <= 0.45 and 0.15 < share[hit].mean() < 0.25
    for mask in erased[hit][:50]:  # one full rectangle
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
    none = Augmentation((40, 20), erasing=0.0, normalise="unit")(pixels)
    assert (none == none[0, 0, 0, 0]).all()


def enlarged(pixels, size):
    """(B, H, W, 3) uint8 resized image by image, as Pillow does it: (B, 3, h, w)."""
    resized = [Image.fromarray(x).resize(size[::-1], Image.Resampling.BILINEAR) for x in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def test_plain_resizes_and_normalises_only():
    pixels = torch.randint(0, 256, (4, 30, 20, 3), dtype=torch.uint8)
    augment = Augmentation((15, 10), 1.2, erasing=1.0)
    out = augment.plain(pixels)
    assert torch.equal(out, augment.plain(pixels))
    floats = pixels.permute(0, 3, 1, 2).float()
    resized = interpolate(floats, size=(15, 10), mode="bilinear", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(out, (resized / 255 - mean) / std)
    # and the same as Pillow's, which rounds to whole numbers twice, once each way
    assert (resized - enlarged(pixels.numpy(), (15, 10))).abs().max() < 2.0


@pytest.mark.parametrize(("size", "enlarge"), [((40, 20), 1.25), ((16, 8), 1.25), ((26, 12), 1.0)])
def test_crops_are_those_of_the_whole_enlarged_image(size, enlarge):
    # The definition: enlarge all, then cut and mirror image by image.
    pixels = torch.randint(0, 256, (30, 26, 12, 3), dtype=torch.uint8)
    got = Augmentation(size, enlarge, normalise="unit", seed=3)(pixels)
    draw = torch.Generator().manual_seed(3)
    top, left, mirror = (torch.rand(30, generator=draw) for _ in range(3))
    high, wide = round(size[0] * enlarge), round(size[1] * enlarge)
    channels = pixels.permute(0, 3, 1, 2)
    whole = interpolate(channels, (high, wide), mode="bilinear", antialias=True)
    # The whole image has whole numbers, as Pillow has them.
    assert (whole.int() - enlarged(pixels.numpy(), (high, wide)).int()).abs().max() <= 1
    assert 5 < (mirror < 0.5).sum() < 25
    for i, image in enumerate(whole / 255):
        y, x = int(top[i] * (high - size[0] + 1)), int(left[i] * (wide - size[1] + 1))
        expected = image[:, y : y + size[0], x : x + size[1]]
        expected = expected.flip(2) if mirror[i] < 0.5 else expected
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-6)
