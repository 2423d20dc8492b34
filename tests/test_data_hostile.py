"""Folders and archives made to harm: whole images are read, others named, nothing else happens."""

import contextlib
import io
import os
import pathlib
import signal
import socket
import subprocess
import tarfile
import tempfile

import numpy as np
import pytest
from helpers.images import bomb, colour, encode, make_archive, make_tree
from helpers.process import taking_less_than
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from bs_jax.data import load
from bs_jax.data.decode import MAX_BYTES, UnreadableError, decode_square, strict_decoding
from bs_jax.errors import UserError

NOISE = Image.effect_noise((40, 30), 50)
WHOLE = {
    "png": colour(3),
    "jpeg": encode(NOISE, "JPEG"),
    "cmyk": encode(NOISE.convert("CMYK"), "JPEG"),
    "palette": encode(NOISE.convert("RGB").quantize(8)),
    "animated": encode(NOISE, "GIF", save_all=True, append_images=[Image.new("L", (40, 30))]),
    "1 x 5000": encode(Image.new("L", (1, 5000))),
}
BROKEN = {
    "empty": b"",
    "text": b"#!/bin/sh\ntouch here\n",
    "cut jpeg": WHOLE["jpeg"][:-500],
    "cut png": encode(NOISE)[:-500],
    "bomb": bomb(60_000, 60_000),
    "no width": bomb(0, 5),
    "16 bits": encode(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11))),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "pickle": b"cos\nsystem\n(S'touch here'\ntR.",
}


@contextlib.contextmanager
def a_time_limit(seconds=60):
    """Nothing may hang: an alarm ends the test."""

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def open_data(path, cache):
    with a_time_limit():
        return load(f"folder:{path}", image_size=8, cache_dir=cache)


def error_of(path, cache):
    with pytest.raises(UserError) as caught:
        open_data(path, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "pets")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def add(path, name, content=b"", **fields):
    """Put a member of any kind into an archive."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(content))


# --- a whole tree of anything

KINDS = (*WHOLE, *BROKEN, "pipe", "socket", "dangling", "circle", "outside", "folder")
STEMS = st.one_of(
    st.sampled_from(
        [
            "-rf",
            "$(reboot)",
            "`id`",
            "%s{0}",
            "a b",
            "new\nline",
            "\x1b[2J",
            "'\"",
            "x" * 240,
            "...",
        ]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1),
)
SUFFIXES = st.sampled_from([".png", ".JPG", ".jpeg", ".gif", ".tiff"])


@st.composite
def trees(draw):
    """(split, class) -> file name -> kind; two classes that differ in case alone, or in more."""
    classes = draw(st.sampled_from([("cat", "Cat"), ("a", "-b"), ("c\nd", "犬")]))
    places = [(split, name) for split in ("train", "val") for name in classes]
    names = st.builds(lambda stem, suffix: _short(stem) + suffix, STEMS, SUFFIXES)
    return {
        place: {"0.png": "png"} | draw(st.dictionaries(names, st.sampled_from(KINDS), max_size=3))
        for place in places
    }


def _short(stem):
    return stem.encode()[:240].decode(errors="ignore")


def write(root, tree):
    outside = root.parent / "outside.png"
    outside.parent.mkdir()
    outside.write_bytes(colour(5))
    for (split, class_name), files in tree.items():
        folder = root / split / class_name
        folder.mkdir(parents=True)
        for name, kind in files.items():
            path = folder / name
            if kind in WHOLE or kind in BROKEN:
                path.write_bytes((WHOLE | BROKEN)[kind])
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "socket":
                with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(folder):
                    one.bind("s")  # a long name would not fit in an address
                    os.rename("s", name)
            elif kind == "folder":
                path.mkdir()
            else:
                target = {"dangling": "nowhere", "circle": name, "outside": outside}[kind]
                path.symlink_to(target)


def pack(root, tree, path):
    """The same as an archive; of a tree on disk a socket could not be packed."""
    with tarfile.open(path, "w") as tar:
        for (split, class_name), files in tree.items():
            for name, kind in files.items():
                if kind != "socket":
                    tar.add(root / split / class_name / name, f"top/{split}/{class_name}/{name}")


def snapshot(folder):
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=trees(), archived=st.booleans())
def test_whole_images_are_read_and_the_others_named_and_counted(tree, archived):
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        root, cache = base / "work" / "pets", base / "cache"
        write(root, tree)
        path = root
        if archived:
            path = root.parent / "pets.tar"
            pack(root, tree, path)
        # On a disk links are followed; an archive never leads outside of itself. What is no file
        # at all is no image either, whatever its name.
        good = {*WHOLE} if archived else {*WHOLE, "outside"}
        bad = {*BROKEN, "dangling", "circle"} | ({"outside"} if archived else set())
        found = {
            split: {
                f"{place[0]}/{place[1]}/{name}": kind
                for place, files in tree.items()
                for name, kind in files.items()
                if place[0] == split and kind in good | bad and not name.startswith(".")
            }
            for split in ("train", "val")
        }
        failing = [split for split in found if set(found[split].values()) & bad]
        before = snapshot(base / "work")
        if failing:
            images = found[failing[0]]
            broken = [name for name, kind in images.items() if kind in bad]
            message = error_of(path, cache)
            assert f"{len(broken)} of {len(images)} images cannot be read" in message
            named = sum(f"{name!r} (" in message for name in broken)
            assert named == min(len(broken), 5)
            assert not any(f"{name!r} (" in message for name in images if name not in broken)
            assert "mend or remove them" in message
        else:
            data = open_data(path, cache)
            assert (len(data.train), len(data.eval)) == (len(found["train"]), len(found["val"]))
            assert data.class_names == tuple(sorted({name for _, name in tree}))
        assert snapshot(base / "work") == before
        assert {item.name for item in base.iterdir()} <= {"work", "cache"}


# --- images


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """A Ghostscript that leaves a mark; Pillow would start one to draw an EPS."""
    mark, script = tmp_path / "executed", tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setattr(EpsImagePlugin, "gs_windows_binary", None)
    return mark


def test_no_image_is_a_program(interpreter):
    with contextlib.suppress(Exception), Image.open(io.BytesIO(BROKEN["eps"])) as image:
        image.load()
    assert interpreter.exists()  # what would have happened
    interpreter.unlink()
    with pytest.raises(UnreadableError, match="not an image"):
        decode_square(BROKEN["eps"], 8, "squash")
    assert not interpreter.exists()


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_images_of_every_kind_are_decoded(kind):
    assert decode_square(WHOLE[kind], 8, "squash").shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["bomb", "no width"])
def test_the_stated_size_of_a_broken_image_takes_no_memory(kind):
    with taking_less_than(50), pytest.raises(UnreadableError), strict_decoding():
        decode_square(BROKEN[kind], 8, "squash")


# --- folders


def test_a_file_of_enormous_size_is_not_read(tree, cache):
    os.truncate(tree / "train/cat/0.png", 1 << 40)
    assert "'train/cat/0.png' (1,099,511,627,776 bytes, more than" in error_of(tree, cache)


def test_a_file_that_cannot_be_read_is_named(tree, cache):
    (tree / "train/cat/memory.png").symlink_to("/proc/self/mem")  # fails even for the superuser
    message = error_of(tree, cache)
    assert "1 of 7 images cannot be read: 'train/cat/memory.png' (Input/output error)" in message


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "pipe"])
def test_a_link_to_what_is_no_file_is_named_and_not_waited_for(tree, cache, target):
    os.mkfifo(tree / "train/cat/pipe")
    (tree / "train/cat/x.png").symlink_to(target)
    assert "'train/cat/x.png' (a link to no file)" in error_of(tree, cache)


def test_folders_that_all_link_to_each_other_come_to_an_end(tree, cache):
    folders = [tree / "train/cat" / str(number) for number in range(12)]
    for folder in folders:
        folder.mkdir()
        (folder / "0.png").write_bytes(colour(1))
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert len(open_data(tree, cache).train) == 6 + 12


def test_links_in_a_circle_are_named_where_they_are_images_and_else_passed_over(tree, cache):
    (tree / "train/cat/round").symlink_to("round")
    assert len(open_data(tree, cache).train) == 6
    (tree / "train/cat/round.png").symlink_to("round.png")
    assert "'train/cat/round.png' (a link to no file: Too many levels" in error_of(tree, cache)


def test_a_folder_deeper_than_python_recurses():
    base = pathlib.Path(tempfile.mkdtemp())
    try:
        deep = os.open(make_tree(base / "pets") / "train/cat", os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=deep)
            above, deep = deep, os.open("d", os.O_RDONLY, dir_fd=deep)
            os.close(above)
        with open(os.open("0.png", os.O_WRONLY | os.O_CREAT, dir_fd=deep), "wb") as file:
            file.write(colour(1))
        os.close(deep)
        assert len(open_data(base / "pets", base / "cache").train) == 7
    finally:  # neither shutil nor pytest could
        subprocess.run(["rm", "-rf", str(base)], check=True)


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-by-this-name/pets", "a\0b", "\n", ""])
def test_a_path_that_cannot_be_is_an_error(tmp_path, cache, path):
    assert error_of(path if path.startswith("~") else tmp_path / path, cache)


# --- archives


@pytest.fixture
def archive(tree, tmp_path):
    return make_archive(tree, tmp_path / "pets.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize(
    "target", ["/etc/hostname", "../../../../etc/hostname", "../dog/nothing.png", "x.png"]
)
def test_a_link_in_an_archive_leads_nowhere_outside(archive, cache, kind, target):
    add(archive, "pets/train/cat/x.png", type=kind, linkname=target)
    message = error_of(archive, cache)
    assert "1 of 7 images cannot be read: 'train/cat/x.png' (a link to no file in" in message


def test_a_link_inside_an_archive_is_followed(archive, cache):
    add(archive, "pets/train/cat/x.png", type=tarfile.SYMTYPE, linkname="../dog/0.png")
    data = open_data(archive, cache)
    np.testing.assert_array_equal(data.train.read(np.array([3])), data.train.read(np.array([4])))


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_in_an_archive_are_neither_made_nor_read(archive, cache, kind):
    add(archive, "pets/train/cat/x.png", type=kind, devmajor=1, devminor=5)
    assert len(open_data(archive, cache).train) == 6


def test_a_sparse_member_of_enormous_size_takes_no_memory(archive, cache):
    add(
        archive,
        "pets/train/cat/x.png",
        pax_headers={
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.size": str(1 << 40),
            "GNU.sparse.map": "0,0",
        },
    )
    with taking_less_than(5 * MAX_BYTES / 2**20):
        message = error_of(archive, cache)
    assert "'train/cat/x.png' (1,099,511,627,776 bytes, more than" in message


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [1 << 33, 1 << 62, 1 << 80])
def test_a_member_that_states_an_enormous_size_is_damage(archive, cache, kind, size):
    info = tarfile.TarInfo("pets/train/cat/x.png")
    info.size, info.type = size, kind
    content, end = info.tobuf(tarfile.GNU_FORMAT), bytes(2 * tarfile.BLOCKSIZE)
    archive.write_bytes(archive.read_bytes().rstrip(b"\0") + bytes(512) + content + end)
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1]
    plain = archive.read_bytes()[: last.offset_data + (last.size + 511) // 512 * 512]
    archive.write_bytes(plain + content + end)
    assert "damaged, cut short or not readable" in error_of(archive, cache)


def test_headers_of_headers_are_damage(archive, cache):
    info = tarfile.TarInfo("././@LongLink")
    info.size, info.type = 512, tarfile.GNUTYPE_LONGNAME
    piece = info.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    archive.write_bytes(piece * 3000 + archive.read_bytes())
    assert "damaged, cut short or not readable" in error_of(archive, cache)


def test_of_two_members_of_one_name_the_last_counts(archive, cache):
    add(archive, "pets/train/cat/0.png", colour(9))
    data = open_data(archive, cache)
    assert len(data.train) == 6
    assert data.train.read(np.array([0]))[0, 0, 0, 0] == 180
