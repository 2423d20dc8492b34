"""A cache of what was read from run folders, keyed by their stamps. Losing it costs time only."""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bs_jax.records import stores
from bs_jax.records.json_files import Unreadable, read_object

_NAME = ".index.json"
_VERSION = 2


class Index:
    """What an earlier collection found in each run folder, as JSON.

    Args:
        workdir: a sweep's work folder.
        asked: what decides, beside its files, what is read from a folder.
    """

    def __init__(self, workdir: Path, asked: str) -> None:
        self._path, self._key = workdir / _NAME, [_VERSION, asked]
        self._entries: dict[str, Any] = {}
        self._changed = False
        with contextlib.suppress(Unreadable, KeyError, TypeError):
            found = read_object(self._path)
            if found["key"] == self._key:
                self._entries = dict(found["runs"])

    def get(self, run_id: str, stamp: stores.Stamp, read: Callable[[Any], Any]) -> Any:
        """The entry of a folder whose files have not changed, or None.

        Args:
            run_id: name of the folder.
            stamp: of its files now.
            read: turns the stored JSON into what is wanted; may fail in any way.
        """
        try:
            entry = self._entries[run_id]
            return read(entry["found"]) if entry["stamp"] == stamp else None
        except Exception:  # written by another version, damaged, or by somebody else
            return None

    def put(self, run_id: str, stamp: stores.Stamp, found: Any) -> None:
        """Store what a folder held while its files had a stamp."""
        self._entries[run_id] = {"stamp": stamp, "found": found}
        self._changed = True

    def save(self, run_ids: Iterable[str]) -> None:
        """Write the index, if anything is new and the folder can be written."""
        if not self._changed:
            return
        kept = {name: self._entries[name] for name in run_ids if name in self._entries}
        with contextlib.suppress(OSError, ValueError):
            stores.write_bytes(self._path, json.dumps({"key": self._key, "runs": kept}).encode())
