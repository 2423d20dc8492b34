"""How a report shows the findings: a section with the controls, a table, a terminal summary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bs_jax.records.results import DONE, Results, Run
from bs_jax.report.numbers import Units, count, fraction, p_value
from bs_jax.report.page import Html, Section, bullets, html, table, tag
from bs_jax.statistics.analysis import Analysis, analyse
from bs_jax.statistics.contrasts import Estimate
from bs_jax.statistics.exponent import learning_rate_exponent
from bs_jax.statistics.groups import Group
from bs_jax.studies.imagenette import findings as study
from bs_jax.studies.imagenette.findings import (
    CONTRADICTED,
    SUPPORTED,
    UNDECIDED,
    Answer,
    Effect,
)

if TYPE_CHECKING:
    from rich.table import Table

_BADGES = {  # class on the page, sign, colour in a terminal
    SUPPORTED: ("good", "✓", "green"),
    CONTRADICTED: ("bad", "✗", "red"),
    UNDECIDED: ("open", "?", "yellow"),
}
# Beside the findings: what tells the causes apart, and what rules that measure noise do.
_BESIDE = {
    "no": "neither",
    "lr_lin": "lr alone",
    "not_moms_lin": "lr and decay",
    "wd_lin": "decay alone",
    "noise_aware": "noise_aware",
    "invariant": "invariant",
}


def smoothed_analysis(results: Results) -> Analysis | None:
    """The same analysis by the smoothed metric, where the sweep names one and the runs have it."""
    name = results.sweep.smoothed_metric
    if not any(name in run.metrics for run in results.runs.values()):
        return None
    return analyse(replace(results, sweep=replace(results.sweep, accuracy_metric=name)))


def section(results: Results, analysis: Analysis, smoothed: Analysis | None) -> Section:
    """A verdict a finding with its effects, then the controls.

    Args:
      results: of `load_results`.
      analysis: of `analyse`, of a sweep that has answers.
      smoothed: of `smoothed_analysis`.
    """
    answers = study.answer(analysis)
    seconds: Sequence[Answer | None] = [None] * len(answers)
    if smoothed is not None:
        seconds = study.answer(smoothed)
    pairs = list(zip(answers, seconds, strict=True))
    cards = [_card(found, second, analysis, smoothed) for found, second in pairs]
    return Section(
        "The published findings",
        tag(
            "p",
            "The study that this sweep repeats trained once a point and published no numbers. Each "
            "of its findings is a claim about one hyperparameter's effect: accuracy with it scaled "
            "minus without, at batch sizes below and above the base's.",
        ),
        tag("ul", *(_line(*both, analysis) for both in pairs), class_="verdicts"),
        tag("details", tag("summary", "Every contrast and its tests"), *cards),
        _method(analysis),
        _controls(results, analysis),
    )


def rows(answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """The findings as a table, a row a contrast and metric.

    Args:
      answers: metric -> what the sweep says of each finding by it.
    """
    return [
        {
            "finding": found.finding.name,
            "metric": metric,
            "verdict": found.verdict,
            "batch_sizes": " ".join(map(str, effect.batch_sizes)),
            "claimed": effect.contrast.expected,
            "rival": effect.contrast.rival[0],
            "effect": effect.estimate.value if effect.estimate else None,
            "low_95": effect.low,
            "high_95": effect.high,
            "rival_effect": effect.rival.value if effect.rival else None,
            "pairs": effect.pairs,
            "seeds": effect.seeds,
            "diverged": effect.diverged,
            "p_as_claimed": effect.p_supported,
            "p_opposite": effect.p_contradicted,
            "p_supported_adjusted": found.p_supported,
            "p_contradicted_adjusted": found.p_contradicted,
        }
        for metric, given in answers.items()
        for found in given
        for effect in found.effects
    ]


def _line(found: Answer, second: Answer | None, analysis: Analysis) -> Html:
    """A finding in the list: verdict, claim, and the effects it rests on, a side said once."""
    kind, sign, _ = _BADGES[found.verdict]
    sides = {effect.contrast.side: effect for effect in reversed(found.effects)}
    notes = [_in_words(effect, found, analysis) for effect in reversed(sides.values())]
    seeds = count(min(e.seeds for e in found.effects if e.pairs), "seed")
    waits = f"; it waits for {count(found.waits_for, 'run')}" if found.waits_for else ""
    notes.append(f"{seeds} a point{waits}.")
    if second is not None:
        notes.append(f"By the smoothed accuracy: {second.verdict}.")
    return tag(
        "li",
        tag("b", found.finding.name),
        tag("span", f"{sign} {found.verdict}", class_=f"badge {kind}"),
        tag("p", found.finding.claim, tag("span", f" {' '.join(notes)}", class_="note")),
    )


def _in_words(effect: Effect, found: Answer, analysis: Analysis) -> str:
    """The effect on one side of the base, and what its rivals do there."""
    if not effect.pairs:
        return f"No runs at {effect.contrast.side}."
    rivals = [
        f"{other.contrast.rival[0]} {_value(other.rival, analysis)}"
        for other in found.effects
        if other.contrast.side == effect.contrast.side and other.rival is not None
    ]
    beside = f" ({', '.join(rivals)})" if rivals else ""
    return f"At {_sizes(effect)}: {_text(effect, analysis)}{beside}."


def _value(estimate: Estimate | None, analysis: Analysis) -> str:
    return "–" if estimate is None else Units(analysis.sweep.accuracy_metric).signed(estimate.value)


def _text(effect: Effect, analysis: Analysis) -> str:
    shown = _value(effect.estimate, analysis)
    if math.isfinite(effect.low):
        units = Units(analysis.sweep.accuracy_metric)
        shown += f" [{units.signed(effect.low)}, {units.signed(effect.high)}]"
    return shown


def _card(
    found: Answer, second: Answer | None, analysis: Analysis, smoothed: Analysis | None
) -> Html:
    kind, sign, _ = _BADGES[found.verdict]
    heading = tag(
        "header",
        tag("h3", found.finding.name),
        tag("span", f"{sign} {found.verdict}", class_=f"badge {kind}"),
    )
    notes = [found.finding.claim]
    notes += _gaps(found)
    if found.finding.name == study.SLOWER:
        notes.append(_exponent(analysis))
    header = ["at", "effect [95 %]"]
    rows = []
    for index, effect in enumerate(found.effects):
        cells = [_sizes(effect), _shown(effect, analysis)]
        if second is not None and smoothed is not None:
            cells.append(_shown(second.effects[index], smoothed))
        rows.append(
            [
                *cells,
                _claimed(effect, analysis),
                f"{effect.pairs} × {effect.seeds}",
                p_value(effect.p_supported),
                p_value(effect.p_contradicted),
            ]
        )
    if second is not None and smoothed is not None:
        header.append(Units(smoothed.sweep.accuracy_metric).name)
    header += ["claimed", "pairs × seeds", "p (as claimed)", "p (opposite)"]
    return tag("article", heading, tag("p", " ".join(notes)), table(header, rows), class_="arm")


def _exponent(analysis: Analysis) -> str:
    found = learning_rate_exponent(analysis, arm="lr_lin", control="no")
    if found is None:
        return (
            "How fast the best learning rate grows cannot be told: too few learning rates, or no "
            "best one among them."
        )
    return (
        f"The best learning rate grows as k^a with a = {found.value:.2f} [{found.low:.2f}, "
        f"{found.high:.2f}] (1 is linear, 1/2 the square-root rule), by a parabola over log2 of "
        f"the learning rate at {found.points} points of {found.batch_sizes} batch sizes."
    )


def _gaps(found: Answer) -> list[str]:
    """What keeps a contrast from being tested."""
    gaps = []
    if any(not effect.pairs for effect in found.effects):
        gaps.append("The sweep lacks arms or batch sizes for part of the claim.")
    diverged = max(effect.diverged for effect in found.effects)
    if diverged:
        gaps.append(
            f"Up to {diverged} of a contrast's runs diverged; there the numbers of diverged runs "
            "are compared (Fisher's exact test), not the means."
        )
    if any(e.pairs and not e.diverged and math.isnan(e.low) for e in found.effects):
        gaps.append("A point without two finished seeds to know the noise by leaves this open.")
    return gaps


def _sizes(effect: Effect) -> str:
    return ", ".join(map(str, effect.batch_sizes)) or effect.contrast.side


def _claimed(effect: Effect, analysis: Analysis) -> str:
    units, margin = Units(analysis.sweep.accuracy_metric), analysis.sweep.margin
    if effect.contrast.expected == study.LARGER_EFFECT:
        rival = effect.contrast.rival[0]
        if effect.rival is None:
            return f"larger than {rival}'s"
        return f"larger than {rival}'s {units.signed(effect.rival.value)}"
    return {
        study.HIGHER: "above 0",
        study.NOT_HIGHER: f"below {units.signed(margin)}",
        study.SAME: f"within ±{units.signed(margin).lstrip('+')}",
        study.SLIGHTLY_LOWER: f"{units.signed(-study.SLIGHT_MARGINS * margin)} to 0",
    }[effect.contrast.expected]


def _shown(effect: Effect, analysis: Analysis) -> Html:
    value, *interval = _text(effect, analysis).split(" ", 1)
    return html(value, tag("small", f" {interval[0]}") if interval else "")


def _method(analysis: Analysis) -> Html:
    units = Units(analysis.sweep.accuracy_metric)
    margin = units.spread(analysis.sweep.margin)
    slight = units.spread(study.SLIGHT_MARGINS * analysis.sweep.margin)
    return tag(
        "details",
        tag("summary", "How the findings are judged"),
        bullets(
            [
                "An effect is the mean, over the batch sizes named and all pairs of arms that "
                "differ in that one thing, of the difference of final accuracies.",
                "Directions are tested by one-sided t tests, seed by seed where the arms have the "
                "same seeds, with the noise pooled over the "
                f"sweep; “no visible effect” by two one-sided tests against ±{margin} (TOST); "
                f"“does not help” against +{margin}; “slightly” ends at {slight}.",
                "A finding is supported if every line of it is (the largest p counts), and "
                "contradicted if the opposite of one line is shown (Bonferroni); both kinds of p "
                "are then adjusted over all findings (Holm): at most 5 % for any wrong verdict in "
                "the table. The p-values beside the lines are as tested, not adjusted.",
                "The verdict is by accuracy. The smoothed accuracy, softmax(3 × logits) at the "
                "true class, scatters less between seeds and has no say in it.",
            ]
        ),
    )


def _controls(results: Results, analysis: Analysis) -> Html:
    """Final accuracies of the controls and the measuring rules beside what is left of a weight."""
    units = Units(analysis.sweep.accuracy_metric)
    groups = {(g.arm, g.batch_size, g.offset): g for g in analysis.groups}
    sizes = sorted({size for _, size, offset in groups if offset == 1})
    arms = [arm for arm in _BESIDE if any((arm, size, 1.0) in groups for size in sizes)]
    kept = _kept(results)
    base = analysis.sweep.base_batch_size
    header = ["scaled"]
    header += [str(size) if size != base else f"{size} (base)" for size in sorted({*sizes, base})]
    rows = []
    for arm in arms:
        cells = []
        for size in sorted({*sizes, base}):
            group = analysis.base if size == base else groups.get((arm, size, 1.0))
            source = "no" if size == base else arm  # the base is one run, whatever arm names it
            cells.append(_cell(group, kept.get((source, size, 1.0)), units))
        rows.append([_BESIDE[arm], *cells])
    factors = {o: g for (arm, size, o), g in groups.items() if (arm, size) == ("wd_lin", base)}
    if factors and analysis.base is not None:
        factors[1.0] = analysis.base
    alone = [
        [
            fraction(factor),
            _cell(group, kept.get(("no" if factor == 1 else "wd_lin", base, factor)), units),
        ]
        for factor, group in sorted(factors.items())
    ]
    parts = [
        tag("h3", "Controls, and rules that measure the noise"),
        tag(
            "p",
            f"Final {units.name}, difference from the base with its 95 % interval, and in "
            "brackets the share that weight decay alone leaves of a weight by the end, "
            "exp(−Σ lr · wd).",
        ),
        table(header, rows),
    ]
    if alone:
        parts.append(tag("p", f"Weight decay alone at the base batch size {base}, by its factor:"))
        parts.append(table(["weight decay ×", f"final {units.name}"], alone))
    return html(*parts)


def _cell(group: Group | None, kept: float | None, units: Units) -> Html:
    if group is None or not group.planned:
        return html("–")
    if group.diverged:
        return html(f"{group.diverged} of {group.planned} diverged")
    if not group.values:
        return html("–")
    comparison = group.comparison
    parts = [units.value(group.interval.mean)]
    if comparison is not None:
        text = f" {units.signed(comparison.difference)}"
        if math.isfinite(comparison.low):
            text += f" [{units.signed(comparison.low)}, {units.signed(comparison.high)}]"
        parts.append(tag("small", text))
    if kept is not None:
        parts.append(tag("small", f" ({kept:.3f})"))
    return html(*parts)


def _kept(results: Results) -> dict[tuple[str, int, float], float]:
    """(arm, batch size, offset) -> what weight decay alone leaves of a weight, from the records."""
    found = {}
    for row in results.rows:
        key = (row.arm, row.batch_size, row.offset)
        if key not in found and row.status == DONE:
            share = weight_left(results.runs[row.run_id], row.batch_size)
            if share is not None:
                found[key] = share
    return found


def weight_left(run: Run, batch_size: int) -> float | None:
    """exp(-sum over updates of learning rate x weight decay), both as recorded while training."""
    rate = run.curves.get("optim/learning_rate")
    if rate is None or not len(rate.examples):
        return None
    decay = run.curves.get("optim/weight_decay")
    constant = run.scaled.get("weight_decay")
    if decay is not None and len(decay.values) == len(rate.values):
        values = decay.values
    elif constant is not None:
        values = np.full(len(rate.values), constant)
    else:
        return None
    updates = np.diff(rate.examples, prepend=0) / batch_size
    return math.exp(-float(np.sum(updates * rate.values * values)))


def terminal(analysis: Analysis) -> "Table":
    """A line a contrast: the claim, the effect with its interval, the verdict of its finding.

    Args:
      analysis: of `analyse`.

    Returns:
      A rich table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    units = Units(analysis.sweep.accuracy_metric)
    result = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title=f"The published findings: effect on {units.name}",
        caption="verdicts at 5 % over the whole table (Holm); effects with their 95 % interval",
    )
    for title in ("finding, at batch sizes", "effect [95 %]", "claimed"):
        result.add_column(title)
    for found in study.answer(analysis):
        _, sign, colour = _BADGES[found.verdict]
        result.add_row(
            Text(found.finding.name, style="bold"),
            Text(f"{sign} {found.verdict}", style=colour),
        )
        for effect in found.effects:
            result.add_row(
                Text(f"  {_sizes(effect)}"),
                Text(_text(effect, analysis)),
                Text(_claimed(effect, analysis)),
            )
    return result
