"""Writes the report of a sweep: a page that opens anywhere, figures, tables for other tools."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.records.results import Results
from bs_jax.report import origin, plots, sections, style, tables
from bs_jax.report.page import Section, page
from bs_jax.statistics.analysis import Analysis

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Extra:
    """What a study adds to the report of its sweep.

    Attributes:
      section: on the page, after the opening.
      tables: name of a CSV file, without its ending -> its rows, all with the same columns.
      terminal: printed after the summary.
    """

    section: Section
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    terminal: "Table"


@stores.store_errors()
def write_report(results: Results, analysis: Analysis, extras: Sequence[Extra] = ()) -> Path:
    """Writes `<workdir>/report/`: index.html, figures as PNG, rows as CSV and Parquet.

    Args:
      results: of `load_results`; only records are read.
      analysis: of `analyse` on these.
      extras: what studies add.

    Returns:
      The path of the page, which needs no other file and no network.

    Raises:
      UserError: the report cannot be written there.
    """
    folder = results.workdir / "report"
    try:
        stores.make_folder(folder)
        files = tables.write_tables(results, folder)
        wanted = [("points", tables.points(analysis))]
        wanted += [(name, rows) for extra in extras for name, rows in extra.tables.items()]
        for name, rows in wanted:
            if not rows:
                continue
            files.append(folder / f"{name}.csv")
            stores.write_bytes(files[-1], tables.to_csv(rows))
        for name, figure in (
            ("metric", plots.metric_figure(analysis)),
            ("curves", plots.curves_figure(analysis)),
            ("deviation", plots.deviation_figure(analysis)),
        ):
            files.append(folder / f"{name}.png")
            stores.write_bytes(files[-1], style.to_png(figure))
        found = [
            *(extra.section for extra in extras),
            sections.overview(analysis),
            sections.arm_panels(results, analysis),
            sections.deviation(analysis),
            sections.price(analysis),
            sections.numbers(analysis),
            sections.hyperparameters(results, analysis),
            origin.reproduce(results, files),
            origin.without_result(results),
        ]
        content = page(
            sections.title(results),
            sections.opening(results, analysis),
            [section for section in found if section is not None],
        )
        path = folder / "index.html"
        stores.write_bytes(path, content.encode("utf-8", "backslashreplace"))
    except stores.StoreError:
        raise
    except OSError as error:
        flag = shlex.join([f"--workdir={stores.text_of(results.workdir)}"])
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; make room or make "
            f"{folder} writable, then run `python main.py --mode=report {flag}`"
        ) from error
    return path
