"""Reads records nobody vouches for; executes nothing."""

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from bs_jax.records.stores import storage

_MAX_BYTES = 1 << 28
_MARKED = ("config.json", "hparams.json", "metrics.jsonl", "summary.json")


class Unreadable(Exception):
    """A file that cannot be used; the message says why in a few words."""


def read_bytes(path: Path) -> bytes:
    """The content of an ordinary file of sane size.

    Raises:
      Unreadable: missing, a pipe, a device, a folder, forbidden, or larger than 256 MiB.
      StoreError: of an object store, which cannot be reached.
    """
    if storage.is_remote(path):
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            raise Unreadable("missing") from None
    try:
        # Opening a pipe would wait for ever for somebody to write in it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not an ordinary file")
            if status.st_size > _MAX_BYTES:
                raise Unreadable(f"{status.st_size:,} bytes, more than any record has")
            return file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except IsADirectoryError:
        raise Unreadable("not an ordinary file") from None
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or "cannot be opened") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      Unreadable: see `read_bytes`; or it is not one JSON object.
    """
    content = read_bytes(path)
    try:
        found = json.loads(content)
    # A hostile file can also nest too deep, or hold an integer too long to convert.
    except (ValueError, RecursionError):
        raise Unreadable("not JSON: half-written or damaged") from None
    if not isinstance(found, dict):
        raise Unreadable("not a JSON object")
    return found


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one a line, and the number of lines that are none.

    Raises:
      Unreadable: see `read_bytes`.
    """
    lines = [line for line in read_bytes(path).split(b"\n") if line.strip()]
    try:
        # One call for the whole file is several times faster than one a line.
        found = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) != len(lines):
            raise ValueError("lines that are objects only together")
    except (ValueError, RecursionError):
        found = [_object_or_none(line) for line in lines]
    objects = [item for item in found if isinstance(item, dict)]
    return objects, len(lines) - len(objects)


def _object_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_marks(folder: Path) -> None:
    """Holds a run's files against the checksums in its DONE, where that has any.

    Raises:
      Unreadable: a file has changed since.
    """
    content = read_bytes(folder / "DONE")
    if not content:
        return
    for name, digest in read_object(folder / "DONE").items():
        if name in _MARKED and hashlib.sha256(read_bytes(folder / name)).hexdigest() != digest:
            raise Unreadable(f"{name}: changed since the run was done; give the command again")


def number(value: Any) -> float | None:
    """A JSON number as float; null, which stands for a non-finite one, as NaN; else None.

    >>> number(1), number(None), number("1"), number(True), number(10**400)
    (1.0, nan, None, None, None)
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
