"""The sweep's rows as files for other tools: results.csv and results.parquet."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_jax.records import stores
from bs_jax.records.results import Results


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Writes the rows as `results.csv` and, where pyarrow is installed, `results.parquet`.

    Args:
      results: what to write.
      folder: an existing folder.

    Returns:
      The files written.
    """
    columns = _columns(results)
    written = [folder / "results.csv"]
    stores.write_bytes(written[0], _csv(list(columns), zip(*columns.values(), strict=True)))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return written
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    stores.write_bytes(folder / "results.parquet", buffer.getvalue())
    return [*written, folder / "results.parquet"]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    r"""Rows with the same keys as CSV under their names; None and NaN, which is unknown, are empty.

    >>> to_csv([{"a": 1, "b": None}, {"a": float("nan"), "b": "x"}])
    b'a,b\n1,\n,x\n'
    """
    return _csv(
        list(rows[0]),
        ([None if value != value else value for value in row.values()] for row in rows),
    )


def _csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _columns(results: Results) -> dict[str, list[Any]]:
    """Column name -> one value a point; None where a run has no such number."""
    rows = results.rows
    columns: dict[str, list[Any]] = {
        "arm": [_encodable(row.arm) for row in rows],
        "batch_size": [row.batch_size for row in rows],
        "base_batch_size": [results.sweep.base_batch_size for row in rows],
        "k": [row.k for row in rows],
        "offset": [row.offset for row in rows],
        "seed": [row.seed if abs(row.seed) < 1 << 63 else None for row in rows],
        "run_id": [_encodable(row.run_id) for row in rows],
        "status": [row.status for row in rows],
    }
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        columns.setdefault(_encodable(name), [row.metrics.get(name) for row in rows])
    for name in dict.fromkeys(name for row in rows for name in row.scaled):
        columns[_encodable(f"hparams/{name}")] = [row.scaled.get(name) for row in rows]
    return columns


def _encodable(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which no file and no table can."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
