"""Turns what a disk or an object store raises into one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from bs_jax.errors import UserError


class StoreError(OSError):
    """An object store refused, or cannot be reached; ``strerror`` says why in one line."""


@contextlib.contextmanager
def driver_errors(path: object, *, missing: bool = False) -> Iterator[None]:
    """Raise whatever a driver raises (of aiohttp, botocore, google.auth, ...) as a `StoreError`.

    Args:
        path: what is read or written.
        missing: let FileNotFoundError pass.
    """
    try:
        yield
    except (UserError, FileExistsError, StoreError):
        raise
    except Exception as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such bucket"  # objects are made by writing them
        raise StoreError(errno.EIO, reason[:200], str(path)) from error


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Raise a `StoreError` as a `UserError` that says what to do. A decorator as well."""
    try:
        yield
    except StoreError as error:
        raise UserError(
            f"cannot use {error.filename}: {error.strerror}; check the bucket's name, your "
            "credentials and the network, then give the same command again"
        ) from error


@contextlib.contextmanager
def disk_errors(path: Path, *, missing: bool = False) -> Iterator[None]:
    """Raise a full, read-only or forbidden disk or store as a `UserError` that says what to do.

    Args:
        path: what is written or read.
        missing: let FileNotFoundError pass.
    """
    try:
        with store_errors():
            yield
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # What belongs in a store is written to a temporary folder first; that may be full.
            full = error.filename if "://" in str(path) and error.filename else path
            raise UserError(
                f"no space left while writing {full}; free some space and give the same command "
                "again: finished runs are kept"
            ) from error
        if isinstance(error, FileExistsError | IsADirectoryError):
            path = error.filename2 or error.filename or path  # something else lies in its place
        elif not isinstance(error, FileNotFoundError | NotADirectoryError) and (
            error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
        ):
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror}; give a --workdir that can be written"
        ) from error
