"""Where records lie: a disk, or an object store (``gs://``, ``s3://``) by fsspec's drivers.

A path is a `pathlib.Path`, or for a URL an `etils.epath.Path`: names are joined alike. Whatever
reads or writes goes through this module, which knows what a disk can (append, rename, fsync) and
what an object store can (put a whole object, list a prefix; no folders, no appending).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import importlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from bs_jax.errors import UserError

_DRIVERS = {  # scheme: package, its class, extra of bs_jax
    "gs": ("gcsfs", "GCSFileSystem", "gcs"),
    "s3": ("s3fs", "S3FileSystem", "s3"),
}
_REQUESTS_AT_ONCE = 32
_HAND_OVER_SECONDS = 5.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class StoreError(OSError):
    """An object store refused, or cannot be reached; ``strerror`` says why in one line."""


def to_path(text: str, flag: str = "--workdir") -> Path:
    """The path that a flag names.

    Args:
        text: a folder, or the URL of one in an object store.
        flag: for the error.

    Returns:
        A `pathlib.Path`; for a URL an `etils.epath.Path`, which joins names in the same way.

    Raises:
        UserError: a URL of another kind, without a bucket, or whose driver is not installed.

    >>> to_path("runs/one")
    PosixPath('runs/one')
    >>> to_path("http://host/x")
    Traceback (most recent call last):
    ...
    bs_jax.errors.UserError: --workdir=http://host/x: give a folder, gs://BUCKET/PATH or s3://...
    """
    if not re.match(r"\w+:/", text):
        return _expanded(text, flag)
    found = re.fullmatch(r"(\w+)://([^/]+)(/.*)?", text)
    if found is None or found[1] not in _DRIVERS:
        raise UserError(f"{flag}={text}: give a folder, gs://BUCKET/PATH or s3://BUCKET/PATH")
    _store(found[1])  # says what is not installed
    from etils import epath

    return cast(Path, epath.Path(text))


def local_path(text: str, name: str) -> Path:
    """The path of what must lie on a disk.

    Args:
        text: a folder or a file.
        name: of the setting, for the error.

    Raises:
        UserError: it is a URL.

    >>> local_path("gs://images", "folder:")
    Traceback (most recent call last):
    ...
    bs_jax.errors.UserError: folder: gs://images is no path of a disk; copy it to one, or mount it
    """
    if "://" in text:
        raise UserError(f"{name} {text} is no path of a disk; copy it to one, or mount it")
    return _expanded(text, name)


def _expanded(text: str, name: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~ without a home, or ~USER of nobody
        raise UserError(f"{name} {text}: {error} Write the folder out") from error


def is_remote(path: Path) -> bool:
    """Whether a path is of an object store.

    >>> is_remote(Path("runs/one"))
    False
    """
    return "://" in str(path)


def text_of(path: Path) -> str:
    """What `to_path` makes the same path of, in any working directory."""
    return str(path if is_remote(path) else path.absolute())


@functools.cache
def _store(scheme: str) -> Any:
    package, name, extra = _DRIVERS[scheme]
    # gcsfs has a second driver, for zonal buckets, that asks by another API what a bucket is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        driver = getattr(importlib.import_module(f"{package}.core"), name)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs {package} ({error}); install it: pip install {package}, or "
            f"'bs_jax[{extra}]'"
        ) from error
    # It would tell in a traceback what is raised as well.
    logging.getLogger(package).setLevel("CRITICAL")
    with _errors(f"{scheme}://"):
        return driver(use_listings_cache=False)  # others write there as well


def _store_of(path: Path) -> Any:
    return _store(str(path).split("://")[0])


@contextlib.contextmanager
def _errors(path: object, *, missing: bool = False) -> Iterator[None]:
    """Raise as `StoreError` whatever a driver raises, but FileNotFoundError where it may be."""
    try:
        yield
    except (UserError, FileExistsError, StoreError):
        raise
    except Exception as error:  # of aiohttp, botocore, google.auth, ...
        if missing and isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such bucket"  # objects are made by writing them
        raise StoreError(errno.EIO, reason[:200], str(path)) from error


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Raise a `StoreError` as a `UserError` that says what to do. A decorator as well."""
    try:
        yield
    except StoreError as error:
        raise UserError(
            f"cannot use {error.filename}: {error.strerror}; check the bucket's name, your "
            "credentials and the network, then give the same command again"
        ) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    if is_remote(path):
        with _errors(path, missing=True):
            return _store_of(path).cat_file(str(path))
    # A pipe would be waited for until somebody writes in it.
    with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is no ordinary file", str(path))
        return file.read()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or leave the old one: a reader never sees half of it.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(path):
        with _errors(path):
            _store_of(path).pipe_file(str(path), content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def create(path: Path, content: bytes) -> None:
    """Write an object that is not there yet: of many who try, one succeeds.

    Raises:
        FileExistsError: there is one already.
        StoreError: it cannot be written.
    """
    with _errors(path):
        _store_of(path).pipe_file(str(path), content, mode="create")


def exists(path: Path) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return path.exists()
    with _errors(path):
        return _store_of(path).exists(str(path))


def unlink(path: Path) -> None:
    """Delete a file, if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), _errors(path, missing=True):
        _store_of(path).rm_file(str(path))


def rename(path: Path, target: Path) -> None:
    """Rename a file; of an object store: copy it, then delete it."""
    if not is_remote(path):
        path.rename(target)
        return
    with _errors(path):
        _store_of(path).cp_file(str(path), str(target))
        _store_of(path).rm_file(str(path))


def make_folder(path: Path) -> None:
    """Make a folder where there is none; an object store has no folders to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def names(folder: Path) -> set[str]:
    """What is in a folder; nothing if there is none."""
    if not is_remote(folder):
        try:
            return set(os.listdir(folder))
        except (OSError, ValueError):
            return set()
    try:
        with _errors(folder, missing=True):
            found = _store_of(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return set()
    return {name for item in found if (name := item.rstrip("/").rsplit("/", 1)[-1])}


def stamps(folder: Path) -> dict[str, list[Any]]:
    """All objects below a folder of an object store -> what changes when one does.

    Args:
        folder: where to look.

    Returns:
        Paths relative to the folder, each with its size and its generation, tag or time.
    """
    try:
        with _errors(folder, missing=True):
            found = _store_of(folder).find(str(folder), detail=True)
    except FileNotFoundError:
        return {}
    start = len(str(folder).split("://")[1].rstrip("/")) + 1
    return {
        path[start:]: [
            info.get("size"),
            str(info.get("generation") or info.get("ETag") or info.get("mtime")),
        ]
        for path, info in found.items()
        if len(path) > start
    }


def upload(files: Mapping[Path, Path]) -> None:
    """Copy files of this disk to an object store, many at once; each is there whole or not."""
    if files:
        first = next(iter(files.values()))
        with _errors(first):
            _store_of(first).put([str(file) for file in files], [str(p) for p in files.values()])


def download(path: Path, target: Path) -> None:
    """Copy an object to a file of this disk.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it cannot be read.
    """
    with _errors(path, missing=True):
        _store_of(path).get_file(str(path), str(target))


def each(path: Path, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]``; of an object store, many items at once.

    Args:
        path: where the function reads or writes.
        function: of an item.
        items: to call it with.
    """
    if not is_remote(path):
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


class Appender:
    """A text file that grows. An object store cannot append: there the whole is put again.

    Args:
        path: the file.
        text: what it holds.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._file = path, None
        self._content, self._put, self._at = text.encode(), len(text.encode()), time.monotonic()
        if not is_remote(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, text: str) -> None:
        """Add text: to a disk at once; to an object store every few seconds, or by `flush`."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._content += text.encode()
        if time.monotonic() > self._at + _HAND_OVER_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Return when all that was added can be read."""
        if self._file is None and len(self._content) > self._put:
            write_bytes(self._path, self._content)
            self._put, self._at = len(self._content), time.monotonic()

    def close(self) -> None:
        """Close the file. What was not flushed is lost to an object store."""
        if self._file is not None:
            self._file.close()


class Outbox:
    """A folder for what can write to a disk alone: a temporary one where its path is remote.

    Args:
        path: where the files belong.

    Attributes:
        folder: to write in.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._sent = path, {}
        self.folder = Path(tempfile.mkdtemp(prefix="bs_jax-")) if is_remote(path) else path

    def send(self) -> None:
        """Copy what is new to where it belongs.

        Raises:
            StoreError: it cannot be written there.
        """
        if not is_remote(self._path):
            return
        found = {
            file: file.stat().st_size for file in sorted(self.folder.rglob("*")) if file.is_file()
        }
        new = [file for file, size in found.items() if self._sent.get(file) != size]
        upload({file: self._path / file.relative_to(self.folder).as_posix() for file in new})
        self._sent = found

    def close(self) -> None:
        """Send what is new; an object store that cannot be reached now costs these files alone."""
        if is_remote(self._path):
            with contextlib.suppress(StoreError):
                self.send()
            shutil.rmtree(self.folder, ignore_errors=True)
