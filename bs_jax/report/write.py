"""The report of a sweep: a page that opens anywhere, figures, tables, a terminal summary."""

from pathlib import Path
from typing import TYPE_CHECKING

from bs_jax.errors import UserError
from bs_jax.records.results import Results, load_results
from bs_jax.records.stores import storage
from bs_jax.report import origin, plots, sections, style
from bs_jax.report.numbers import Units
from bs_jax.report.page import page
from bs_jax.report.tables import write_findings, write_tables
from bs_jax.statistics.analysis import (
    INVARIANT,
    NOT_INVARIANT,
    UNDECIDED,
    Analysis,
    Group,
    analyse,
)
from bs_jax.studies.imagenette import answer
from bs_jax.studies.imagenette_section import findings, smoothed_analysis, terminal_findings

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["terminal_findings", "terminal_table", "write_report"]

_SIGNS = {INVARIANT: ("✓", "green"), NOT_INVARIANT: ("✗", "red"), UNDECIDED: ("?", "yellow")}


@storage.plainly()
def write_report(
    workdir: str | Path, results: Results | None = None, analysis: Analysis | None = None
) -> Path:
    """Writes `<workdir>/report/`: index.html, figures as PNG, rows and findings as CSV, Parquet.

    Args:
      workdir: a sweep's work folder; only its records are read.
      results: of `load_results` on it, where they are there already.
      analysis: of `analyse` on those.

    Returns:
      The path of the page, which needs no other file and no network.

    Raises:
      UserError: there is no sweep in the folder, or the report cannot be written there.
    """
    results = results or load_results(workdir)
    analysis = analysis or analyse(results)
    folder = results.workdir / "report"
    try:
        storage.make_folder(folder)
        files = write_tables(results, folder)
        smoothed = smoothed_analysis(results)
        answers = {a.sweep.accuracy_metric: answer(a) for a in (analysis, smoothed) if a}
        files += write_findings(answers, folder)
        for name, figure in (
            ("metric", plots.metric_figure(analysis)),
            ("curves", plots.curves_figure(analysis)),
            ("deviation", plots.deviation_figure(analysis)),
        ):
            files.append(folder / f"{name}.png")
            storage.write_bytes(files[-1], style.to_png(figure))
        content = page(
            results.sweep.title or f"Sweep {results.sweep.name}",
            sections.opening(results, analysis),
            findings(results, analysis, smoothed),
            sections.overview(analysis),
            sections.arm_panels(analysis),
            sections.deviation(analysis),
            sections.numbers(analysis),
            sections.hyperparameters(results, analysis),
            origin.reproduce(results, files),
            origin.without_result(results),
        )
        path = folder / "index.html"
        storage.write_bytes(path, content.encode("utf-8", "backslashreplace"))
    except storage.StoreError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; make room or make "
            f"{folder} writable, then run `python main.py --mode=report --workdir={workdir}`"
        ) from error
    return path


def terminal_table(analysis: Analysis) -> "Table":
    """A line a rule: the final metric at every batch size, marked, and the verdict.

    Args:
      analysis: of `analyse`.

    Returns:
      A rich table, to be printed by a rich console.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sweep = analysis.sweep
    units = Units(sweep.accuracy_metric)
    sizes = {group.batch_size for group in analysis.groups if group.offset == 1}
    sizes = sorted({*sizes, sweep.base_batch_size})
    result = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,  # five batch sizes and the verdict fit 80 columns
        title=f"Final {units.name}{' (%)' if units.percent else ''} by batch size",
        caption=f"✓ within ±{units.spread(sweep.margin)} of the base (5 % test)   "
        "✗ beyond it   ? needs more seeds",
    )
    result.add_column("rule", no_wrap=True)
    for size in sizes:
        title = f"{size} (base)" if size == sweep.base_batch_size else str(size)
        result.add_column(title, justify="right", no_wrap=True)
    few = len(sizes) <= 5  # with more there is room for the verdict's sign alone
    result.add_column("verdict" if few else "", no_wrap=True)
    cells = {
        (group.arm, group.batch_size): _cell(group, units)
        for group in analysis.groups
        if group.offset == 1
    }
    base = _cell(analysis.base, units) if analysis.base else Text("–")
    for arm in analysis.arms:
        sign, colour = _SIGNS[arm.verdict]
        result.add_row(
            Text(style.label(arm.arm)),
            *(
                base if size == sweep.base_batch_size else cells.get((arm.arm, size), Text("–"))
                for size in sizes
            ),
            Text(f"{sign} {arm.verdict}" if few else sign, style=colour),
        )
    return result


def _cell(group: Group, units: Units) -> "Text":
    from rich.text import Text

    if group.diverged:
        text = "diverged"
    elif group.values:
        digits = 2 if units.percent else 4
        text = f"{group.interval.mean * units.factor:.{digits}f}"
    else:
        return Text("–")
    sign, colour = _SIGNS[group.verdict] if group.verdict else ("", "")
    return Text(f"{text} {sign}".strip(), style=colour)
