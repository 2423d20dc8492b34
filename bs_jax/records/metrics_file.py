"""``metrics.jsonl``: a JSON object a line, in order of examples seen.

A line holds ``step`` (updates done), ``examples`` (seen), the means of the training metrics since
the line before, and at an evaluation its metrics. At every logging point it also says how large the
batch was, and what is known of the gradient noise:

======================  ===================================================================
batch_size              examples per update in use
noise_scale             measured gradient noise scale, in examples; null: not known
noise_scale_low, _high  its range
======================  ===================================================================

Records of versions that wrote none of these four are read all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bs_jax.records import stores
from bs_jax.records.json_files import finite, number, parse_lines, read_bytes, whole

CLOCKS = ("step", "examples")
# What a row says of the run's state, which is no result: `summary.json` does not repeat it.
CONDITIONS = ("batch_size", "noise_scale", "noise_scale_low", "noise_scale_high")


class MetricsFile:
    """The file, open for adding rows.

    Args:
        path: the file. Lines beyond `examples` (written after the checkpoint that training goes on
            from) and a torn last line are cut off.
        examples: seen in the state that training goes on from.

    Attributes:
        kept: the rows that stay.
    """

    def __init__(self, path: Path, examples: int) -> None:
        self._path = path
        with stores.disk_errors(path):
            self.kept = read_rows(path, examples)
            text = "".join(map(_line, self.kept))
            self._digest = hashlib.sha256(text.encode())
            if not stores.exists(path) or stores.read_bytes(path) != text.encode():
                stores.write_bytes(path, text.encode())
            self._file = stores.GrowingFile(path, text)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows: to a disk at once, to an object store every few seconds."""
        text = "".join(map(_line, rows))
        with stores.disk_errors(self._path):
            self._file.write(text)
        self._digest.update(text.encode())

    def flush(self) -> None:
        """Return when others can read all rows."""
        with stores.disk_errors(self._path):
            self._file.flush()

    @property
    def digest(self) -> bytes:
        """The sha256 of everything written."""
        return self._digest.digest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def metrics_digest(path: Path, examples: int) -> bytes:
    """The `MetricsFile.digest` of the rows of a file up to a count of examples."""
    text = "".join(map(_line, read_rows(path, examples)))
    return hashlib.sha256(text.encode()).digest()


def read_rows(path: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """The rows of a file as they were written, up to the first torn line; none if it is missing.

    Args:
        path: the file.
        until: examples seen; later rows are left out.

    Raises:
        OSError: the file cannot be read, or is not an ordinary file.
    """
    try:
        content = stores.read_bytes(path)
    except FileNotFoundError:
        return []
    rows = []
    for row in parse_lines(content):
        if not isinstance(row, dict) or not isinstance(row.get("examples"), int):
            break
        rows.append(row)
    return [row for row in rows if row["examples"] <= until]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over examples seen: int64 `examples`, ascending, and float64 `values`."""

    examples: np.ndarray
    values: np.ndarray


def read_curves(path: Path) -> tuple[dict[str, Curve], int]:
    """Every metric of a file, and the number of damaged lines and values that were left out.

    Raises:
        Unreadable: see `read_bytes`.
    """
    columns: dict[str, dict[int, float]] = {}
    refused = 0
    for row in parse_lines(read_bytes(path)):
        examples = whole(row.get("examples")) if isinstance(row, dict) else None
        if examples is None:
            refused += 1
            continue
        for name, value in row.items():
            if name in CLOCKS:
                continue
            # A resumed run may have written an example count twice: the later line counts.
            converted = value if type(value) is float else number(value)
            if converted is None:
                refused += 1
            else:
                columns.setdefault(name, {})[examples] = converted
    return {name: _curve(values) for name, values in columns.items()}, refused


def _curve(values: Mapping[int, float]) -> Curve:
    examples = np.fromiter(values.keys(), np.int64, len(values))
    numbers = np.fromiter(values.values(), np.float64, len(values))
    order = np.argsort(examples, kind="stable")
    return Curve(examples[order], numbers[order])
