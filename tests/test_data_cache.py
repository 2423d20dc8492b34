"""The cache of decoded images: used again, never half-written, rebuilt if damaged."""

import functools
import io
import os
import threading

import numpy as np
import pytest
from PIL import Image

from bs_jax.data import cache
from bs_jax.errors import UserError


def red(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def split() -> cache.EncodedSplit:
    def read():
        # Any order will do.
        for row in (4, 0, 5, 1, 3, 2):
            yield row, functools.partial(red, 10 * row)

    names = [f"{row}.png" for row in range(6)]
    return cache.EncodedSplit(names, [0, 0, 0, 1, 1, 1], ("cat", "dog"), read)


def unwanted() -> cache.EncodedSplit:
    raise AssertionError("the source was asked for, though the entry was there")


def opened(folder, source=split, fingerprint="one", size=8, fit="squash") -> cache.CachedSplit:
    return cache.open_or_build(folder, fingerprint, size, fit, source)


def test_rows_come_in_order(tmp_path):
    found = opened(tmp_path)
    images = found.split.read(np.arange(6))
    assert images[:, 4, 4, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert found.split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.class_names == ("cat", "dog")
    assert type(images) is np.ndarray


def test_entry_is_used_again(tmp_path):
    first = opened(tmp_path)
    again = opened(tmp_path, unwanted)
    assert again.checksum == first.checksum
    np.testing.assert_array_equal(again.split.images, first.split.images)


def test_what_makes_an_entry_its_own(tmp_path):
    opened(tmp_path)
    for change in ({"fingerprint": "two"}, {"size": 9}, {"fit": "crop"}):
        with pytest.raises(AssertionError, match="was asked for"):
            opened(tmp_path, unwanted, **change)
    # The checksum tells content and form, not where or when it was read.
    assert opened(tmp_path, fingerprint="two").checksum == opened(tmp_path).checksum
    assert opened(tmp_path, size=9).checksum != opened(tmp_path).checksum


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_build_are_not_used(tmp_path, monkeypatch):
    # A kill leaves what an interrupt would have removed.
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *args, **options: None)
    monkeypatch.setattr(cache.pathlib.Path, "rename", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path)
    monkeypatch.undo()
    (remains,) = tmp_path.iterdir()
    assert (remains / "images.u8").exists()
    with pytest.raises(AssertionError, match="was asked for"):
        opened(tmp_path, unwanted)
    assert len(opened(tmp_path).split) == 6


@pytest.mark.parametrize("name", ["images.u8", "labels.npy", "aspects.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "missing"])
def test_damaged_entry_is_rebuilt(tmp_path, name, damage):
    first = opened(tmp_path)
    expected = first.split.read(np.arange(6))
    (path,) = tmp_path.glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-7] if damage == "cut" else content + b"}")
    again = opened(tmp_path)
    np.testing.assert_array_equal(again.split.read(np.arange(6)), expected)
    assert again.checksum == first.checksum
    np.testing.assert_array_equal(again.split.aspects, first.split.aspects)


def test_stale_remains_are_swept(tmp_path):
    old, new = (tmp_path / f".building-{age}" for age in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    opened(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_builders_at_once_agree(tmp_path):
    checksums = []
    threads = [
        threading.Thread(target=lambda: checksums.append(opened(tmp_path).checksum))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checksums) == 4
    assert len(set(checksums)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_loser_of_a_race_uses_the_winners_entry(tmp_path):
    def overtaken() -> cache.EncodedSplit:
        opened(tmp_path)
        return split()

    assert len(opened(tmp_path, overtaken).split) == 6
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write decoded images.*XDG_CACHE_HOME"):
        opened(tmp_path / "file" / "cache")


def test_too_little_space(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="6 images to 8x8 needs"):
        opened(tmp_path)


def test_disk_that_fills_up(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    # Every write to it fails as on a disk without space.
    full = lambda path, mode: open("/dev/full", mode)  # noqa: E731, SIM115
    monkeypatch.setattr(cache, "open", full, raising=False)
    with pytest.raises(UserError, match="No space left"):
        opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
