"""JSON files: written whole, read without trust. Nothing that is read is executed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bs_jax.records import stores

_MAX_BYTES = 1 << 28


class Unreadable(Exception):
    """A file that cannot be used; the message says why in a few words."""


def write_json(path: Path, content: Any) -> str:
    """Write a JSON file whole or not at all; a non-finite number is written as null.

    Args:
        path: the file.
        content: what JSON can hold.

    Returns:
        The sha256 of the file.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(finite(content), indent=1, sort_keys=True, allow_nan=False) + "\n"
    with stores.disk_errors(path):
        stores.write_bytes(path, text.encode())
    return sha256(text.encode())


def sha256(content: bytes) -> str:
    """The SHA-256 checksum of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_bytes(path: Path) -> bytes:
    """The content of an ordinary file of sane size.

    Raises:
        Unreadable: missing, a pipe, a device, a folder, forbidden, or larger than 256 MiB.
        StoreError: the object store cannot be reached.
    """
    try:
        return stores.read_bytes(path, _MAX_BYTES)
    except stores.StoreError:
        raise
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except IsADirectoryError:
        raise Unreadable("not an ordinary file") from None
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or "cannot be opened") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        Unreadable: they are not one JSON object.

    >>> parse_object(b'{"seed": 1}')
    {'seed': 1}
    """
    try:
        found = json.loads(content)
    # A hostile file can also nest too deep, or hold an integer too long to convert.
    except (ValueError, RecursionError):
        raise Unreadable("not JSON: half-written or damaged") from None
    if not isinstance(found, dict):
        raise Unreadable("not a JSON object")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Unreadable: see `read_bytes`; or the file is not one JSON object.
    """
    return parse_object(read_bytes(path))


def parse_lines(content: bytes) -> list[Any]:
    r"""The JSON value on each line that is not empty; None for a damaged line.

    >>> parse_lines(b'{"step": 1}\n{"st')
    [{'step': 1}, None]
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    try:
        # One call for the whole file is several times faster than one a line.
        found = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines):
            return found
    except (ValueError, RecursionError):
        pass
    return [_value_or_none(line) for line in lines]


def _value_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def finite(value: Any) -> Any:
    """The value with None in place of every non-finite number, which JSON cannot hold.

    >>> finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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


def numbers(value: Any) -> dict[str, float]:
    """The numbers in a JSON object by name, see `number`; nothing if it is not an object.

    >>> numbers({"b1": 0.9, "name": "adam"})
    {'b1': 0.9}
    """
    found = {name: number(item) for name, item in value.items()} if isinstance(value, dict) else {}
    return {name: item for name, item in found.items() if item is not None}


def text(value: Any) -> str:
    """The value if it is text, else "".

    >>> text("sqrt"), text(7)
    ('sqrt', '')
    """
    return value if isinstance(value, str) else ""


def texts(value: Any) -> tuple[str, ...]:
    """The texts in a JSON list; nothing if it is not a list.

    >>> texts(["a", 7])
    ('a',)
    """
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def whole(value: Any) -> int | None:
    """A whole number that a count can have, from 0 to below 2^53; None for anything else.

    >>> whole(8), whole(-1), whole(True), whole(8.0)
    (8, None, None, None)
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and 0 <= value < 1 << 53 else None
