"""Where a report's numbers come from: commands, versions, devices, files, runs without a result."""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from bs_jax.records import stores
from bs_jax.records.results import DAMAGED, DIVERGED, MISSING, UNFINISHED, Results
from bs_jax.report.numbers import duration
from bs_jax.report.page import Html, Section, bullets, html, tag

_MAX_NAMED = 50


def reproduce(results: Results, files: Sequence[Path]) -> Section:
    """The exact commands, what they ran on, and the rows for other tools."""
    sweep = results.sweep
    again = shlex.join(
        ["python", "main.py", "--mode=report", f"--workdir={stores.text_of(results.workdir)}"]
    )
    commands = [tag("pre", command) for command in (sweep.command, again) if command]
    summaries = [run.summary for run in results.runs.values() if run.summary]
    seconds = [summary.seconds for summary in summaries]
    total = sum(value for value in seconds if math.isfinite(value))
    versions: dict[str, dict[str, None]] = {}
    for summary in summaries:
        for package, version in summary.versions.items():
            versions.setdefault(package, {})[version] = None
    facts = {
        "data": sweep.data,
        "model": sweep.model,
        "training examples": f"{sweep.train_examples:,}" if sweep.train_examples else "",
        "device": _distinct(summary.device for summary in summaries),
        "code revision": _distinct(summary.git_revision for summary in summaries),
        "versions": ", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items()),
        "training time, all runs added up": duration(total) if total else "",
    }
    items = [html(tag("b", name), f": {value}") for name, value in facts.items() if value]
    links = [tag("a", path.name, href=path.name) for path in files]
    rows = html("The rows behind this page: ", html(*_joined(links)), ".") if links else html()
    return Section("Reproduce", *commands, bullets(items), tag("p", rows))


def _joined(links: Sequence[Html]) -> list[str]:
    return [part for link in links for part in (", ", link)][1:]


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join([*dict.fromkeys(filter(None, texts))][:5])


def without_result(results: Results) -> Section | None:
    """Runs that diverged, are unfinished or missing, and files that could not be used, by name."""
    parts = []
    for status, title in (
        (DIVERGED, "diverged"),
        (UNFINISHED, "unfinished"),
        (MISSING, "not started"),
        (DAMAGED, "damaged"),
    ):
        run_ids = [run_id for run_id, run in results.runs.items() if run.status == status]
        names = [_name(results, run_id) for run_id in run_ids[:_MAX_NAMED]]
        parts.append(_named(f"runs {title}", names, len(run_ids)))
    for title, names in (
        ("damaged records", results.problems),
        ("folders under runs/ that belong to no point", results.foreign),
    ):
        parts.append(_named(title, names[:_MAX_NAMED], len(names)))
    shown = [part for part in parts if part]
    return Section("Runs without a result", *shown) if shown else None


def _name(results: Results, run_id: str) -> str:
    points = dict.fromkeys(
        f"{row.arm} at batch size {row.batch_size}, seed {row.seed}"
        for row in results.rows
        if row.run_id == run_id
    )
    summary = results.runs[run_id].summary
    step = summary.diverged_at_step if summary else None
    where = f", at step {step:,}" if step is not None else ""
    return f"runs/{run_id}: {'; '.join(list(points)[:3])}{where}"


def _named(title: str, names: Sequence[str], total: int) -> Html:
    if not names:
        return html()
    more = [f"and {total - len(names):,} more"] if total > len(names) else []
    return tag("details", tag("summary", f"{total:,} {title}"), bullets([*names, *more]))
