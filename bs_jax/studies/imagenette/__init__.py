"""The informal study of Imagenette's 20-epoch recipe: its findings, and a sweep's answers."""

from bs_jax.records.results import Results
from bs_jax.report.write import Extra
from bs_jax.statistics.analysis import Analysis
from bs_jax.studies.imagenette import shown
from bs_jax.studies.imagenette.findings import answer


def extra(results: Results, analysis: Analysis) -> Extra | None:
    """The findings' section, table and summary; None for a sweep that says nothing of them."""
    answers = answer(analysis)
    if not answers:
        return None
    smoothed = shown.smoothed_analysis(results)
    by_metric = {a.sweep.accuracy_metric: answer(a) for a in (analysis, smoothed) if a}
    return Extra(
        section=shown.section(results, analysis, smoothed),
        tables={"findings": shown.rows(by_metric)},
        terminal=shown.terminal(analysis),
    )
