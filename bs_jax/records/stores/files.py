"""Reads and writes files on a disk, or objects in an object store by fsspec's drivers.

A disk can append, rename and fsync. An object store can put a whole object and list a prefix; it
has no folders and cannot append. Every function here gives the same result on both.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from bs_jax.errors import UserError
from bs_jax.records.stores.errors import StoreError, disk_errors, driver_errors

_DRIVERS = {  # scheme: package, its class, extra of bs_jax
    "gs": ("gcsfs", "GCSFileSystem", "gcs"),
    "s3": ("s3fs", "S3FileSystem", "s3"),
}
_REQUESTS_AT_ONCE = 32
_SECONDS_BETWEEN_PUTS = 5.0  # of a file that grows in an object store
Item = TypeVar("Item")
Result = TypeVar("Result")


def to_path(text: str, flag: str = "--workdir") -> Path:
    """The path that a flag names.

    Args:
        text: a folder, or the URL of a folder in an object store.
        flag: the flag's name, for the error.

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
    driver(found[1])  # says what is not installed
    from etils import epath

    return cast(Path, epath.Path(text))


def local_path(text: str, name: str) -> Path:
    """A path that must be on a disk.

    Args:
        text: a folder or a file.
        name: the setting's name, for the error.

    Raises:
        UserError: the text is a URL.

    >>> local_path("gs://images", "folder:")
    Traceback (most recent call last):
    ...
    bs_jax.errors.UserError: folder: gs://images is not on a disk; copy it to one, or mount it
    """
    if "://" in text:
        raise UserError(f"{name} {text} is not on a disk; copy it to one, or mount it")
    return _expanded(text, name)


def _expanded(text: str, name: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~ without a home, or ~USER of nobody
        raise UserError(f"{name} {text}: {error} Write the folder out") from error


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store.

    >>> is_remote(Path("runs/one"))
    False
    """
    return "://" in str(path)


def text_of(path: Path) -> str:
    """The text that `to_path` turns into the same path, in any working directory."""
    return str(path if is_remote(path) else path.absolute())


@functools.cache
def driver(scheme: str) -> Any:
    """The fsspec file system of a scheme, made once.

    Raises:
        UserError: its package is not installed.
    """
    package, name, extra = _DRIVERS[scheme]
    # gcsfs has a second driver, for zonal buckets, that asks by another API what a bucket is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        found = getattr(importlib.import_module(f"{package}.core"), name)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs {package} ({error}); install it: pip install {package}, or "
            f"'bs_jax[{extra}]'"
        ) from error
    # It would log a traceback for every error that it also raises.
    logging.getLogger(package).setLevel("CRITICAL")
    with driver_errors(f"{scheme}://"):
        return found(use_listings_cache=False)  # other processes write there as well


def _driver_of(path: Path) -> Any:
    return driver(str(path).split("://")[0])


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a file.

    Args:
        path: an ordinary file: opening a pipe would wait for somebody to write in it.
        limit: bytes; a larger file is refused.

    Raises:
        FileNotFoundError: there is none.
        IsADirectoryError: it is a folder, a pipe or a device.
        OSError: it cannot be read, or is larger than the limit.
    """
    if is_remote(path):
        with driver_errors(path, missing=True):
            return _driver_of(path).cat_file(str(path))
    with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Not an ordinary file", str(path))
        if limit is not None and status.st_size > limit:
            size = f"{status.st_size:,} bytes, more than any record has"
            raise OSError(errno.EFBIG, size, str(path))
        return file.read()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or leave the old one: a reader never sees half a file.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(path):
        with driver_errors(path):
            _driver_of(path).pipe_file(str(path), content)
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
    """Create an object. If several processes try at once, one succeeds.

    Raises:
        FileExistsError: there is one already.
        StoreError: it cannot be written.
    """
    with driver_errors(path):
        _driver_of(path).pipe_file(str(path), content, mode="create")


def exists(path: Path) -> bool:
    """Whether the file exists."""
    if not is_remote(path):
        return path.exists()
    with driver_errors(path):
        return _driver_of(path).exists(str(path))


def unlink(path: Path) -> None:
    """Delete a file if it exists."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), driver_errors(path, missing=True):
        _driver_of(path).rm_file(str(path))


def rename(path: Path, target: Path) -> None:
    """Rename a file; an object is copied, then deleted."""
    if not is_remote(path):
        path.rename(target)
        return
    with driver_errors(path):
        _driver_of(path).cp_file(str(path), str(target))
        _driver_of(path).rm_file(str(path))


def make_folder(path: Path) -> None:
    """Make a folder if it does not exist; an object store has no folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def names(folder: Path) -> set[str]:
    """Names in a folder; none if the folder does not exist."""
    if not is_remote(folder):
        try:
            return set(os.listdir(folder))
        except (OSError, ValueError):
            return set()
    try:
        with driver_errors(folder, missing=True):
            found = _driver_of(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return set()
    return {name for item in found if (name := item.rstrip("/").rsplit("/", 1)[-1])}


def stamps(folder: Path) -> dict[str, list[Any]]:
    """Every object below a folder of an object store, with values that change when it does.

    Args:
        folder: where to look.

    Returns:
        Path relative to the folder -> size, and generation, tag or time.
    """
    try:
        with driver_errors(folder, missing=True):
            found = _driver_of(folder).find(str(folder), detail=True)
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
    """Copy files of this disk to an object store, many at once; each arrives whole or not at all.

    Args:
        files: file on this disk -> where it goes.
    """
    if files:
        first = next(iter(files.values()))
        with driver_errors(first):
            _driver_of(first).put([str(file) for file in files], [str(p) for p in files.values()])


def download(path: Path, target: Path) -> None:
    """Copy an object to a file of this disk.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it cannot be read.
    """
    with driver_errors(path, missing=True):
        _driver_of(path).get_file(str(path), str(target))


def each(path: Path, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return ``[function(item) for item in items]``; in an object store many calls run at once.

    Args:
        path: where the function reads or writes.
        function: reads or writes one item.
        items: its arguments.
    """
    if not is_remote(path):
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


class GrowingFile:
    """A text file that grows. An object store cannot append, so the whole file is put again.

    Args:
        path: the file.
        text: what it holds now.
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
        if time.monotonic() > self._at + _SECONDS_BETWEEN_PUTS:
            self.flush()

    def flush(self) -> None:
        """Return when everything added can be read."""
        if self._file is None and len(self._content) > self._put:
            write_bytes(self._path, self._content)
            self._put, self._at = len(self._content), time.monotonic()

    def close(self) -> None:
        """Close the file. An object store loses what was not flushed."""
        if self._file is not None:
            self._file.close()


class Outbox:
    """A folder on a disk for libraries that can write nowhere else, such as TensorBoard's.

    Args:
        path: where the files belong.

    Attributes:
        folder: where to write: `path`, or a temporary folder if `path` is in an object store.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._sent = path, {}
        self.folder = Path(tempfile.mkdtemp(prefix="bs_jax-")) if is_remote(path) else path

    def send(self) -> None:
        """Copy new and changed files to where they belong.

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
        """Send new files. If the object store cannot be reached now, only these are lost."""
        if is_remote(self._path):
            with contextlib.suppress(StoreError):
                self.send()
            shutil.rmtree(self.folder, ignore_errors=True)


def check_writable(workdir: Path) -> None:
    """Raise a `UserError` at once if the work folder cannot take files."""
    with disk_errors(workdir):
        make_folder(workdir)
        probe = workdir / f".probe-{os.getpid()}"
        if is_remote(probe):
            write_bytes(probe, b"x")
        else:
            probe.write_bytes(b"x" * 4096)
        unlink(probe)
