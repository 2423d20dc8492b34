"""Studies: published findings, and what a sweep that repeats their experiments says of them."""

from bs_jax.records.results import Results
from bs_jax.report.write import Extra
from bs_jax.statistics.analysis import Analysis
from bs_jax.studies import imagenette


def extras(results: Results, analysis: Analysis) -> list[Extra]:
    """What each study adds to the report of a sweep; empty for a sweep about something else."""
    found = imagenette.extra(results, analysis)
    return [found] if found is not None else []
