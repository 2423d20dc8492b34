"""--mode=report: the report of a sweep from its records, and its table in the terminal."""

from __future__ import annotations

from pathlib import Path

from bs_jax.cli import sweep

FLAG_NAMES = ("sweep", "workdir")


def define_flags() -> None:
    """Define the flags of this mode: none of its own."""


def run() -> int:
    """Write the report of the sweep in ``--workdir``."""
    write_report(sweep.workdir())
    return 0


def write_report(workdir: Path) -> None:
    """Write a report, and print its table.

    Args:
        workdir: the sweep's folder.

    Raises:
        UserError: there is no sweep in it, or the report cannot be written.
    """
    from rich.console import Console

    from bs_jax import studies
    from bs_jax.records import results
    from bs_jax.report import terminal, words
    from bs_jax.report import write as report
    from bs_jax.statistics import analysis

    found = results.load_results(workdir)
    analysed = analysis.analyse(found)
    extras = studies.extras(found, analysed)
    path = report.write_report(found, analysed, extras)
    console = Console()
    console.print(terminal.verdict_table(analysed))
    for extra in extras:
        console.print(extra.terminal)
    if open_yet := words.progress(found, analysed):
        console.print(open_yet, markup=False, highlight=False)
    print(f"Report: {path}")
