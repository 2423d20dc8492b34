"""Folders and archives of images: the official layout, odd images, hostile names, damage."""

import gzip
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from helpers.images import bomb, colour, encode, make_archive, make_tree
from PIL import Image

from bs_jax.data import decode, load
from bs_jax.errors import UserError

IMAGENETTE = os.environ.get("BS_JAX_TEST_IMAGENETTE")  # its archive, where one is at hand


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "pets")


@pytest.fixture
def open_data(tmp_path):
    def open_data(path, **options):
        options = {"image_size": 8, "cache_dir": tmp_path / "cache", **options}
        return load(f"folder:{path}", **options)

    return open_data


def one_line_error(open_data, path, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_data(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(pathlib.Path(path).parent.glob("cache/.building-*"))
    return message


def test_layout_and_labels(tree, open_data):
    data = open_data(tree)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.eval.labels.tolist() == [0, 0, 1, 1]
    assert data.image_shape == data.train.image_shape == (8, 8, 3)
    plain = data.train.read(np.arange(6))
    assert plain[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100]
    assert (plain == plain[:, :1, :1]).all()
    assert "6 train / 4 eval images, 2 classes" in data.description


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_names_of_the_evaluation_split(tmp_path, open_data, name):
    data = open_data(make_tree(tmp_path / "pets", val_name=name))
    assert len(data.eval) == 4


@pytest.mark.parametrize("name", ["pets.tgz", "pets.tar", "pets.tar.gz"])
@pytest.mark.parametrize("top", ["pets", ".", "./deep"])
def test_archive_equals_folder(tmp_path, tree, open_data, name, top):
    archived = open_data(make_archive(tree, tmp_path / name, top))
    extracted = open_data(tree)
    assert archived.checksum == extracted.checksum
    assert archived.class_names == extracted.class_names
    rows = np.arange(6)
    np.testing.assert_array_equal(archived.train.read(rows), extracted.train.read(rows))


def test_folder_above_the_root(tree, open_data):
    assert len(open_data(tree.parent / ".", cache_dir=tree.parent.parent / "c").train) == 6


def test_storage_sizes_and_fit(tmp_path, open_data):
    root = make_tree(tmp_path / "pets")
    half = Image.new("RGB", (40, 10), (200, 0, 0))
    half.paste((0, 0, 200), (15, 0, 25, 10))
    for path in root.glob("*/cat/0.png"):
        path.write_bytes(encode(half))
    squashed = open_data(root, train_storage_size=20, eval_storage_size=10)
    assert squashed.train.image_shape == (20, 20, 3)
    assert squashed.eval.image_shape == (10, 10, 3)
    assert squashed.image_shape == (8, 8, 3)
    assert squashed.train.read(np.array([0]))[0, :, 0].tolist() == [[200, 0, 0]] * 20
    assert squashed.train.aspects.tolist()[:2] == pytest.approx([4.0, 1.2])
    cropped = open_data(root, train_storage_size=20, eval_storage_size=10, fit="crop")
    assert (cropped.train.read(np.array([0]))[0, :, 2:-2] == [0, 0, 200]).all()
    assert set(cropped.train.aspects.tolist()) == {1.0}
    assert cropped.checksum != squashed.checksum


def test_grey_jpeg_among_colours(tree, open_data):
    grey = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    (tree / "train/cat/grey.JPEG").write_bytes(encode(grey, "JPEG"))
    image = open_data(tree).train.read(np.array([3]))[0]
    assert (image == image[..., :1]).all()
    assert image.std() > 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\n<html>not found</html>", "not an image"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
        (encode(Image.effect_noise((64, 64), 50), "PNG")[:900], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
        (bomb(60_000, 60_000), "pixels"),
        # Above Pillow's warning, below its error.
        (bomb(10_000, 9_000), "pixels"),
    ],
    ids=["empty", "html", "cut jpeg", "cut png", "hollow png", "bomb", "small bomb"],
)
@pytest.mark.parametrize("archived", [False, True])
def test_unreadable_images_are_named(tmp_path, tree, open_data, content, reason, archived):
    (tree / "train/dog/bad one.png").write_bytes(content)
    path = make_archive(tree, tmp_path / "pets.tgz") if archived else tree
    message = one_line_error(open_data, path)
    assert "1 of 7 images cannot be read" in message
    assert "'train/dog/bad one.png'" in message
    assert reason in message


def test_many_unreadable_images_are_counted(tree, open_data):
    for i in range(9):
        (tree / f"val/dog/bad{i}.jpg").write_bytes(b"")
    message = one_line_error(open_data, tree)
    assert "9 of 13 images" in message
    assert "bad4.jpg" in message
    assert "bad5.jpg" not in message
    assert "and 4 more" in message


@pytest.mark.parametrize(
    "name", ["new\nline.png", "späße 犬 🐕.png", "a'b\"c;$(x).png", "-rf.png", b"\xff\xfe.png"]
)
def test_hostile_file_names(tree, open_data, name):
    path = os.path.join(os.fsencode(tree / "train/cat"), os.fsencode(name))
    with open(path, "wb") as file:
        file.write(colour(9))
    assert len(open_data(tree).train) == 7
    with open(path, "wb") as file:
        file.write(b"broken")
    assert "1 of 7" in one_line_error(open_data, tree)


def test_class_name_that_is_no_utf8(tmp_path, open_data):
    odd = os.fsdecode(b"caf\xe9")
    data = open_data(make_tree(tmp_path / "pets", classes=("ant", odd)))
    assert data.class_names == ("ant", "caf\ufffd")


def test_what_is_no_image_is_passed_over(tree, open_data):
    (tree / "train/cat/.hidden.png").write_bytes(b"")
    (tree / "train/cat/._0.png").write_bytes(b"")
    (tree / "train/cat/notes.txt").write_bytes(b"")
    (tree / "train/.git").mkdir()
    (tree / "train/.git/x.png").write_bytes(b"")
    (tree / "train/stray.png").write_bytes(b"")
    os.mkfifo(tree / "train/cat/pipe.png")
    assert len(open_data(tree).train) == 6


@pytest.mark.parametrize("archived", [False, True])
def test_files_of_other_endings_are_counted_in_a_warning(
    tmp_path, tree, open_data, caplog, archived
):
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "dog/README", "dog/.hidden.txt"):
        (tree / "train" / name).write_bytes(b"x")
    (tree / "labels.csv").write_bytes(b"x")  # of no class
    path = make_archive(tree, tmp_path / "pets.tgz") if archived else tree
    assert len(open_data(path).train) == 6
    (record,) = [one for one in caplog.records if "passed over" in one.message]
    assert "image: 2 .heic, " in record.message
    assert "1 .txt" in record.message
    assert "1 without an ending" in record.message
    assert ".webp" in record.message


def test_every_ending_that_pillow_knows_for_the_formats_that_are_read_is_read(tree, open_data):
    """The endings are Pillow's own list; a file of each is written and counted."""
    Image.init()
    known = {end for end, name in Image.registered_extensions().items() if name in decode.FORMATS}
    assert known - {".pfm", ".mic"} == decode.SUFFIXES  # these hold floats, several images
    image, written = Image.new("RGB", (12, 10), (200, 20, 7)), 0
    for end in sorted(decode.SUFFIXES):
        kind = Image.registered_extensions()[end]
        if kind in Image.SAVE:
            (tree / f"train/cat/one{end}").write_bytes(encode(image, kind))
            written += 1
    assert written > 20
    train = open_data(tree).train
    assert len(train) == 6 + written
    found = train.read(np.arange(3, 3 + written)).astype(int)
    assert np.abs(found[:, 2:6, 2:6] - [200, 20, 7]).max() < 25


def test_links(tree, open_data):
    (tree / "train/cow").symlink_to(tree / "train/cat")
    (tree / "val/cow").symlink_to(tree / "val/cat")
    (tree / "train/cat/again").symlink_to(tree / "train")
    assert open_data(tree).class_names == ("cat", "cow", "dog")
    (tree / "train/dog/gone.png").symlink_to(tree / "nowhere.png")
    assert "gone.png" in one_line_error(open_data, tree)


def test_missing_class(tree, open_data):
    for path in (tree / "val/dog").iterdir():
        path.unlink()
    message = one_line_error(open_data, tree)
    assert "1 of 2 classes have no images in val/: 'dog'" in message
    (tree / "val/dog/0.png").write_bytes(colour(1))
    (tree / "val/emu").mkdir()
    (tree / "val/emu/0.png").write_bytes(colour(1))
    assert "no images in train/: 'emu'" in one_line_error(open_data, tree)


def test_missing_class_in_an_archive(tmp_path, tree, open_data):
    for path in (tree / "val/dog").iterdir():
        path.unlink()
    message = one_line_error(open_data, make_archive(tree, tmp_path / "pets.tar"))
    assert "no images in val/: 'dog'" in message


@pytest.mark.parametrize("archived", [False, True])
def test_a_class_that_is_empty_in_both_splits_is_not_passed_over(
    tmp_path, tree, open_data, archived
):
    for split in ("train", "val"):
        (tree / split / "emu").mkdir()
        (tree / split / ".hidden").mkdir()
    path = make_archive(tree, tmp_path / "pets.tgz") if archived else tree
    assert "without images in train/ and val/: 'emu'" in one_line_error(open_data, path)


def test_one_class_is_not_enough(tmp_path, open_data):
    message = one_line_error(open_data, make_tree(tmp_path / "pets", classes=("cat",)))
    assert "1 class folders" in message


@pytest.mark.parametrize("archived", [False, True])
def test_wrong_folder(tmp_path, tree, open_data, archived):
    def path(folder, name):
        return make_archive(folder, tmp_path / name, ".") if archived else folder

    inside = one_line_error(open_data, path(tree / "train", "a.tar"))
    assert "no train/ folder" in inside
    assert "found 'cat', 'dog'" in inside
    (tree / "val").rename(tree / "vall")
    assert "none of val/, valid/, validation/, test/" in one_line_error(
        open_data, path(tree, "b.tar")
    )


def test_missing_or_of_another_kind(tmp_path, open_data):
    assert "no folder or archive" in one_line_error(open_data, tmp_path / "nothing")
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "neither a folder nor a tar" in one_line_error(open_data, tmp_path / "data.zip")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in one_line_error(open_data, tmp_path / "empty")


@pytest.mark.parametrize("name", ["pets.tgz", "pets.tar"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_truncated_archive(tmp_path, tree, open_data, name, share):
    path = make_archive(tree, tmp_path / name)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data if name.endswith("tar") else len(content)
    path.write_bytes(content[: int(end * share)])
    assert "damaged, cut short" in one_line_error(open_data, path)


def test_archive_cut_between_two_files(tmp_path, tree, open_data):
    path = make_archive(tree, tmp_path / "pets.tar")
    with tarfile.open(path) as tar:
        border = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:border])
    assert "no proper end" in one_line_error(open_data, path)


def test_archive_with_a_damaged_header(tmp_path, tree, open_data):
    path = make_archive(tree, tmp_path / "pets.tar")
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        content[tar.getmembers()[-2].offset + 150] ^= 0xFF
    path.write_bytes(content)
    assert "no proper end" in one_line_error(open_data, path)


def test_gzip_checksum_is_checked(tmp_path, tree, open_data):
    path = make_archive(tree, tmp_path / "pets.tgz")
    plain = gzip.decompress(path.read_bytes())
    content = bytearray(gzip.compress(plain, compresslevel=0))
    content[-8] ^= 1
    path.write_bytes(content)
    assert "damaged" in one_line_error(open_data, path)


def test_archive_never_writes_outside_the_cache(tmp_path, tree, open_data):
    path = make_archive(tree, tmp_path / "pets.tar")
    with tarfile.open(path, "a") as tar:
        for name in ("../escaped.png", "/tmp/escaped-bs-jax.png", "pets/train/../../escaped.png"):
            info = tarfile.TarInfo(name)
            info.size = len(colour(1))
            tar.addfile(info, io.BytesIO(colour(1)))
    assert len(open_data(path).train) == 6
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("archived", [False, True])
def test_change_in_the_source_is_noticed(tmp_path, tree, open_data, archived):
    def path():
        return make_archive(tree, tmp_path / "pets.tgz") if archived else tree

    before = open_data(path())
    (tree / "train/cat/0.png").write_bytes(colour(12, size=(30, 30)))
    after = open_data(path())
    assert after.checksum != before.checksum
    assert after.train.read([0])[0, 0, 0, 0] == 240


def test_default_cache_folder(tmp_path, tree, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(f"folder:{tree}", image_size=8)
    assert len(list((tmp_path / "xdg/bs_jax").iterdir())) == 2


def test_a_user_without_a_home_has_a_cache_among_the_temporary_files(tmp_path, tree, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert len(load(f"folder:{tree}", image_size=8).train) == 6
    (cache,) = (tmp_path / "tmp").iterdir()
    assert len(list(cache.iterdir())) == 2
    assert cache.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: 12345678)
    cache.rename(cache.with_name("bs_jax-12345678"))  # made by somebody else before
    with pytest.raises(UserError, match="belongs to another user"):
        load(f"folder:{tree}", image_size=8)


@pytest.mark.skipif(not IMAGENETTE, reason="BS_JAX_TEST_IMAGENETTE names no archive of Imagenette")
def test_real_archive_by_its_first_images(tmp_path, open_data):
    wanted, part = {"train": 2, "val": 1}, tmp_path / "imagenette.tar"
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(IMAGENETTE) as tar, tarfile.open(part, "w") as small:
        for member in tar:
            parts = member.name.split("/")
            if len(parts) != 4 or taken.get((parts[1], parts[2]), 0) >= wanted[parts[1]]:
                continue
            taken[parts[1], parts[2]] = taken.get((parts[1], parts[2]), 0) + 1
            small.addfile(member, tar.extractfile(member))
    data = open_data(part, image_size=64, train_storage_size=80, eval_storage_size=72)
    assert data.num_classes == 10
    assert data.class_names[0] == "n01440764"
    assert np.bincount(data.train.labels).tolist() == [2] * 10
    # Photographs, not noise or blanks: neighbouring pixels agree, distant ones do not.
    images = data.train.read(np.arange(20)).astype(float)
    assert np.abs(np.diff(images, axis=1)).mean() < images.std() / 2
    assert images.std() > 30
