"""Files for other tools: a row a run (results.csv, results.parquet), a row a point (points.csv)."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_jax.records import stores
from bs_jax.records.results import Results
from bs_jax.statistics.analysis import Analysis
from bs_jax.statistics.contrasts import Comparison
from bs_jax.statistics.curves import Deviation


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


def points(analysis: Analysis) -> list[dict[str, Any]]:
    """What the page says of each point, a row each, the base first; unknown numbers are NaN.

    Args:
      analysis: of `analyse`.
    """
    everyone = [*([analysis.base] if analysis.base else []), *analysis.groups]
    return [
        {
            "arm": "" if group is analysis.base else _encodable(group.arm),
            "batch_size": group.batch_size,
            "offset": group.offset,
            "seeds": len(group.values),
            "diverged": group.diverged,
            "mean": group.interval.mean,
            "sd": group.interval.sd,
            **_comparison(group.comparison),
            "verdict": group.verdict,
            **_deviation(group.deviation),
            "share_to_base_loss": group.share_to_base_loss,
            "updates": group.price.updates,
            "seconds": group.price.seconds,
            "examples_per_second": group.price.examples_per_second,
            "inside_noise_scale": group.inside.share if group.inside else None,
            "inside_noise_scale_low": group.inside.low if group.inside else None,
            "inside_noise_scale_high": group.inside.high if group.inside else None,
        }
        for group in everyone
    ]


def _comparison(found: Comparison | None) -> dict[str, float | None]:
    names = ("difference", "low", "high", "p_equivalent", "p_beyond")
    shown = ("difference", "low_95", "high_95", "p_equivalent", "p_different")
    return {
        new: getattr(found, name) if found else None for name, new in zip(names, shown, strict=True)
    }


def _deviation(found: Deviation | None) -> dict[str, float | None]:
    return {
        "curve_rms": found.rms if found else None,
        "curve_in_noise": found.in_noise if found else None,
        "curve_p_chance": found.p_chance if found else None,
    }


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
