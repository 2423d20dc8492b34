"""Images in class folders under train/ and val/, on disk or in a tar archive: Imagenette's layout.

    ROOT/train/CLASS/*.jpg          ROOT may also be one level down, as in the official archives;
    ROOT/val/CLASS/*.jpg            val/ may be called valid/, validation/ or test/ as well.

Classes are numbered in the order of their names. Images may lie deeper inside their class's folder.
Hidden files, pipes, sockets and devices are passed over. So are files that do not end like an
image, which are counted in a warning. On a disk links are followed; an archive is read in place,
and its links lead to its own members alone. An image that cannot be read, or is too large, is
named.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import lzma
import os
import pathlib
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator

from bs_jax.data import cache
from bs_jax.data.decode import MAX_BYTES, SUFFIXES
from bs_jax.data.image_data import ImageData
from bs_jax.errors import UserError

_TRAIN = "train"
_EVAL_NAMES = ("val", "valid", "validation", "test")
_ARCHIVE_SUFFIXES = (".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
_NAMES_SHOWN = 5
# What tarfile and the decompressors meet damaged or hostile bytes with.
_DAMAGE = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Image files by split ("train", "eval"), then class, each sorted; paths relative to ROOT."""

    eval_name: str
    files: dict[str, dict[str, list[str]]]


def load_folder(
    name: str,
    path: pathlib.Path,
    image_size: int,
    storage: cache.Storage,
    cache_dir: pathlib.Path,
) -> ImageData:
    """Load images from class folders, decoding them once into the cache.

    A file that changes without changing its size or time of modification goes unnoticed; so does a
    missing class in an archive that was cached whole before.

    Args:
      name: what the result is to be called.
      path: a folder or a tar archive.
      image_size: height and width that the model sees, pixels.
      storage: how the images are kept.
      cache_dir: where.

    Raises:
      UserError: there is no such folder or archive, it has another layout, the splits differ in
        their classes, the archive is damaged, or images are unreadable.
    """
    try:
        is_file = path.is_file()
    except OSError as error:  # a name too long, no permission
        raise UserError(f"cannot look at {str(path)!r}: {error}; check the path") from error
    source = _ArchiveSource(path) if is_file else _FolderSource(path)
    train, evaluation = (
        cache.open_or_build(
            cache_dir,
            f"{source.fingerprint} {split}",
            size,
            storage.fit,
            functools.partial(source.encoded, split),
        )
        for split, size in (("train", storage.train_size), ("eval", storage.eval_size))
    )
    if source.passed_over:
        counts = ", ".join(f"{count:,} {end}" for end, count in source.passed_over.most_common())
        logging.getLogger(__name__).warning(
            "%s: passed over files that do not end like an image: %s; read are %s",
            path, counts, " ".join(sorted(SUFFIXES)),
        )  # fmt: skip
    return cache.image_data(name, path.name, train, evaluation, image_size, storage)


class _FolderSource:
    """Class folders on disk."""

    def __init__(self, path: pathlib.Path) -> None:
        self.passed_over: collections.Counter[str] = collections.Counter()  # by their ending
        if not path.is_dir():
            raise UserError(f"there is no folder or archive {str(path)!r}; check the path")
        self._root = self._find_root(path)
        self._stamps: dict[str, tuple[int, int]] = {}
        folders = []
        try:
            present = sorted(item.name for item in self._root.iterdir() if item.is_dir())
            eval_name = _eval_name(present, str(path))
            for split in (_TRAIN, eval_name):
                for item in sorted(item for item in (self._root / split).iterdir()):
                    if item.is_dir():
                        folders.append(f"{split}/{item.name}")
                        self._walk(item, folders[-1])
        except OSError as error:
            raise UserError(f"cannot list {str(path)!r}: {error}") from error
        self._listing = _arrange(list(self._stamps), folders, eval_name, str(path))
        stamps = json.dumps(sorted(self._stamps.items()))
        self.fingerprint = hashlib.sha256(stamps.encode()).hexdigest()

    @staticmethod
    def _find_root(path: pathlib.Path) -> pathlib.Path:
        if (path / _TRAIN).is_dir():
            return path
        try:
            inside = sorted(item for item in path.iterdir() if not item.name.startswith("."))
            nested = [item for item in inside if (item / _TRAIN).is_dir()]
        except OSError as error:
            raise UserError(f"cannot list {str(path)!r}: {error}") from error
        if len(nested) != 1:
            raise UserError(_no_train(str(path), [item.name for item in inside]))
        return nested[0]

    def _walk(self, class_folder: pathlib.Path, relative: str) -> None:
        # Links are followed, since people link class folders; but into no folder twice, so that
        # links in a circle, or each to all others, come to an end.
        seen: set[tuple[int, int]] = set()
        left = [] if relative.rpartition("/")[2].startswith(".") else [(class_folder, relative)]
        while left:
            folder, relative = left.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as items:
                found = sorted(items, key=lambda item: item.name, reverse=True)
            for item in found:
                inner = f"{relative}/{item.name}"
                is_folder, is_file = _kind(item)
                if is_folder and not item.name.startswith("."):
                    left.append((folder / item.name, inner))
                elif _is_image(item.name) and (is_file or item.is_symlink()):
                    # A link to nothing is kept, to be named when it cannot be read.
                    about = item.stat(follow_symlinks=is_file)
                    self._stamps[inner] = (about.st_size, about.st_mtime_ns)
                elif is_file and not item.name.startswith("."):
                    self.passed_over[_ending(item.name)] += 1

    def encoded(self, split: str) -> cache.EncodedSplit:
        """List one split for decoding."""
        names, labels, class_names = _rows(self._listing, split)

        def read() -> Iterator[tuple[int, Callable[[], bytes]]]:
            for row, name in enumerate(names):
                yield row, functools.partial(_fetch, self._root / name)

        return cache.EncodedSplit(names, labels, class_names, read)


class _ArchiveSource:
    """Class folders in a tar archive, read in place."""

    def __init__(self, path: pathlib.Path) -> None:
        if not path.name.lower().endswith(_ARCHIVE_SUFFIXES):
            raise UserError(
                f"{str(path)!r} is neither a folder nor a tar archive "
                f"({', '.join(_ARCHIVE_SUFFIXES)}); extract it and give the folder"
            )
        self._path = path
        self.passed_over: collections.Counter[str] = collections.Counter()  # by their ending
        status = path.stat()
        # Listing a compressed archive means decompressing it all, so what is cached goes by this.
        self.fingerprint = json.dumps([path.name, status.st_size, status.st_mtime_ns])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self._path) as tar:
                yield tar
        except _DAMAGE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"archive {str(self._path)!r} is damaged, cut short or not readable ({reason}); "
                "fetch it again"
            ) from error

    @functools.cached_property
    def _members(self) -> dict[str, str]:
        """Path inside ROOT (a folder's ends in "/") -> the member's name in the archive."""
        with self._opened() as tar:
            kinds = {m.name: m for m in tar if m.isdir() or m.isfile() or m.islnk() or m.issym()}
            members = {name: m.isdir() for name, m in kinds.items()}
            # tarfile takes a damaged header for the end; the real one is a block of zeros.
            stream = tar.fileobj
            assert stream is not None
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no proper end after {len(members):,} files")
            while stream.read(1 << 20):
                pass
        parts = {name: pathlib.PurePosixPath(name).parts for name in members}
        tops = {p[0] for p in parts.values() if len(p) > 1}
        if _TRAIN not in tops:
            nested = {p[0] for p in parts.values() if len(p) > 2 and p[1] == _TRAIN}
            if len(nested) != 1:
                raise UserError(_no_train(str(self._path), sorted(tops)))
            parts = {name: p[1:] for name, p in parts.items() if p[0] in nested}
        return {"/".join(p) + "/" * members[name]: name for name, p in parts.items()}

    @functools.cached_property
    def _listing(self) -> _Listing:
        inside = sorted({path.split("/")[0] for path in self._members if "/" in path})
        eval_name = _eval_name(inside, str(self._path))
        images = [path for path in self._members if path[-1:] != "/" and _is_image(path)]
        folders = [path[:-1] for path in self._members if path[-1:] == "/"]
        within = (f"{_TRAIN}/", f"{eval_name}/")
        others = [path for path in self._members if path.startswith(within) and path[-1:] != "/"]
        self.passed_over.update(
            _ending(path)
            for path in others
            if path.count("/") > 1 and not _is_image(path) and not _is_hidden(path)
        )
        return _arrange(images, folders, eval_name, str(self._path))

    def encoded(self, split: str) -> cache.EncodedSplit:
        """List one split for decoding."""
        names, labels, class_names = _rows(self._listing, split)
        rows = {self._members[name]: row for row, name in enumerate(names)}

        def read() -> Iterator[tuple[int, Callable[[], bytes]]]:
            with self._opened() as tar:
                for member in tar:
                    if member.name in rows:
                        yield rows[member.name], _fetcher(tar, member)

        return cache.EncodedSplit(names, labels, class_names, read)


def _kind(item: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is a folder, and whether a file; a link round in a circle is neither."""
    try:
        return item.is_dir(), item.is_file()
    except OSError:
        return False, False


def _fetch(path: pathlib.Path) -> bytes:
    try:
        about = path.stat()
    except OSError as error:
        raise OSError(f"a link to no file: {error.strerror or error}") from error
    if not stat.S_ISREG(about.st_mode):  # to read from a pipe would be to wait for its writer
        raise OSError("a link to no file")
    if about.st_size > MAX_BYTES:
        raise OSError(_too_large(about.st_size))
    with open(path, "rb") as file:
        return file.read(MAX_BYTES)


def _fetcher(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    """Read a member now, since an archive is read in order; what is wrong is said when asked."""
    try:
        stream = tar.extractfile(member)
    except (KeyError, RecursionError):
        return functools.partial(_refuse, "a link to no file in the archive")
    if stream is None:
        return functools.partial(_refuse, "no file")
    content = stream.read(MAX_BYTES + 1)  # of a sparse member the stated size costs nothing to have
    if len(content) > MAX_BYTES:
        return functools.partial(_refuse, _too_large(member.size))
    return functools.partial(bytes, content)


def _refuse(reason: str) -> bytes:
    raise OSError(reason)


def _too_large(size: int) -> str:
    return f"{size:,} bytes, more than the {MAX_BYTES:,} that an image may take"


def _is_image(path: str) -> bool:
    return not _is_hidden(path) and pathlib.PurePosixPath(path).suffix.lower() in SUFFIXES


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in pathlib.PurePosixPath(path).parts)


def _ending(path: str) -> str:
    return pathlib.PurePosixPath(path).suffix.lower() or "without an ending"


def _eval_name(present: list[str], where: str) -> str:
    for name in _EVAL_NAMES:
        if name in present:
            return name
    raise UserError(
        f"{where!r} has {_TRAIN}/ but none of {'/, '.join(_EVAL_NAMES)}/ beside it; "
        f"found {_some(present)}"
    )


def _arrange(images: list[str], folders: list[str], eval_name: str, where: str) -> _Listing:
    files: dict[str, dict[str, list[str]]] = {}
    for split, folder in (("train", _TRAIN), ("eval", eval_name)):
        classes = collections.defaultdict(list)
        for path in sorted(images):
            parts = path.split("/")
            if parts[0] == folder and len(parts) > 2:
                classes[parts[1]].append(path)
        files[split] = dict(sorted(classes.items()))
    train, evaluation = set(files["train"]), set(files["eval"])
    for one, other, folder in (
        (train, evaluation, eval_name),
        (evaluation, train, _TRAIN),
    ):
        if missing := one - other:
            raise UserError(
                f"{where!r}: {len(missing)} of {len(one)} classes have no images in {folder}/: "
                f"{_some(sorted(missing))}; both splits need every class"
            )
    parts = [folder.split("/") for folder in folders]
    named = {p[1] for p in parts if len(p) == 2 and p[0] in (_TRAIN, eval_name)}
    if empty := sorted(name for name in named - train if not name.startswith(".")):
        raise UserError(
            f"{where!r}: class folders without images in {_TRAIN}/ and {eval_name}/: "
            f"{_some(empty)}; fill or remove them"
        )
    if len(train) < 2:
        raise UserError(
            f"{where!r}: {len(train)} class folders with images in {_TRAIN}/, want at least 2"
        )
    return _Listing(eval_name, files)


def _rows(listing: _Listing, split: str) -> tuple[list[str], list[int], tuple[str, ...]]:
    classes = listing.files[split]
    names = [path for paths in classes.values() for path in paths]
    labels = [label for label, paths in enumerate(classes.values()) for _ in paths]
    # A name that is no UTF-8 would break every record it is written to.
    readable = (os.fsencode(name).decode("utf-8", "replace") for name in classes)
    return names, labels, tuple(readable)


def _no_train(where: str, found: list[str]) -> str:
    return (
        f"{where!r} has no {_TRAIN}/ folder with one folder a class in it; found {_some(found)}; "
        f"give the folder that holds {_TRAIN}/ and {_EVAL_NAMES[0]}/"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return f"{shown}{', ...' if len(names) > _NAMES_SHOWN else ''}" if names else "nothing"
