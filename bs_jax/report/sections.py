"""The sections of the report, each from the analysis to escaped HTML."""

import math
from collections.abc import Mapping, Sequence

from bs_jax.records.results import DIVERGED, DONE, Results
from bs_jax.report import plots, style, words
from bs_jax.report.numbers import Units, count, fraction, hyperparameter, p_value
from bs_jax.report.page import Html, Section, bullets, html, table, tag
from bs_jax.statistics.analysis import Analysis, widest_pass
from bs_jax.statistics.contrasts import Comparison, Verdict
from bs_jax.statistics.groups import Group

# Past these a page is no longer read but searched, and the CSV is there for that.
_MAX_TABLE_ROWS = 400
_MAX_PANELS = 24
_MAX_NAMED = 50

_KINDS = {Verdict.EQUIVALENT: "good", Verdict.DIFFERENT: "bad", Verdict.UNDECIDED: "open"}


def badge(verdict: Verdict) -> Html:
    """A verdict as a coloured word with its sign."""
    return tag("span", f"{style.SIGNS[verdict]} {verdict}", class_=f"badge {_KINDS[verdict]}")


def _scatter(analysis: Analysis, units: Units) -> str:
    noise = analysis.noise
    if noise is None:
        return "unknown"
    paired = f", {units.spread(noise.sd)} paired" if noise.paired else ""
    return units.spread(noise.seed_sd) + paired


def opening(results: Results, analysis: Analysis) -> Html:
    """Title, outcome in a sentence, the facts a reader needs first, one line a rule, warnings."""
    sweep = results.sweep
    units = Units(sweep.accuracy_metric)
    done = sum(run.status in (DONE, DIVERGED) for run in results.runs.values())
    seeds = sorted({group.planned for group in (*analysis.groups, analysis.base) if group})
    facts = {
        "base batch size": f"{sweep.base_batch_size}",
        "margin": f"±{units.spread(sweep.margin)}",
        "seeds a point": "–".join(dict.fromkeys([str(seeds[0]), str(seeds[-1])])),
        "seed-to-seed sd": _scatter(analysis, units),
        "runs finished": f"{done} of {len(results.runs)}",
    }
    boxes = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    lines = [
        tag(
            "li",
            tag("b", arm.arm),
            badge(arm.verdict),
            tag("p", words.verdict_sentence(arm, analysis)),
        )
        for arm in analysis.arms
    ]
    subject = " · ".join(text for text in (sweep.config_name, sweep.model, sweep.data) if text)
    caveats = words.caveats(results, analysis)
    warning = html()
    if caveats:
        warning = tag("div", tag("b", "Caveats"), bullets(caveats), class_="warning")
    return html(
        tag("p", subject, class_="eyebrow"),
        tag("h1", sweep.title or f"Sweep {sweep.name}"),
        tag("p", words.headline(analysis), class_="lead"),
        tag("dl", *boxes, class_="facts"),
        tag("ul", *lines, class_="verdicts"),
        warning,
    )


def overview(analysis: Analysis) -> Section | None:
    """The figure: final metric against batch size for every rule."""
    units = Units(analysis.sweep.accuracy_metric)
    what = f"Final {units.name} against batch size, one line a rule"
    if not any(group.values for group in analysis.groups):
        return None
    caption = "The sweep has no finished base point, so there is no band to lie in."
    if analysis.base is not None and analysis.base.values:
        caption = (
            "Every rule starts from the same recipe at the black point. The shaded band is the "
            f"base ± {units.spread(analysis.sweep.margin)}. A bar is the 90 % interval of the "
            "difference from the base: a bar wholly inside the band passes the equivalence test. "
            "A cross marks a batch size at which runs diverged."
        )
    wide = Html(style.to_svg(plots.metric_figure(analysis, 8.7, 4.4), what, "w-"))
    narrow = Html(style.to_svg(plots.metric_figure(analysis, 3.7, 3.6), what, "n-"))
    return Section(
        f"Final {units.name} against batch size",
        tag(
            "figure",
            tag("div", wide, class_="wide"),
            tag("div", narrow, class_="narrow"),
            tag("figcaption", caption),
        ),
    )


def arm_panels(analysis: Analysis) -> Section | None:
    """A pair of figures a rule: where it ends, and how it gets there."""
    if not any(group.values for group in analysis.groups):
        return None
    sweep = analysis.sweep
    sizes = [group.batch_size for group in analysis.groups if group.offset == 1]
    colours = style.size_colours(sizes, sweep.base_batch_size)
    roles = {light: role for role, (light, _) in style.ROLES.items()}
    key = [
        tag(
            "li",
            tag("i", style=f"background:var(--{roles[colours[size]]})"),
            f"{size} (base)" if size == sweep.base_batch_size else str(size),
        )
        for size in sorted(colours)
    ]
    cards = []
    for index, arm in enumerate(analysis.arms[:_MAX_PANELS]):
        metric = plots.metric_figure(analysis, 4.1, 2.7, arm=arm.arm)
        curve = plots.curve_figure(analysis, arm.arm, 4.1, 2.7)
        pair = tag(
            "div",
            Html(style.to_svg(metric, f"{arm.arm}: final metric", f"m{index}-")),
            Html(style.to_svg(curve, f"{arm.arm}: training curves", f"c{index}-")),
            class_="pair",
        )
        heading = tag("header", tag("h3", arm.arm), badge(arm.verdict))
        cards.append(tag("article", heading, pair, class_="arm"))
    if len(analysis.arms) > _MAX_PANELS:
        cards.append(tag("p", f"The first {_MAX_PANELS} of {len(analysis.arms)} rules are drawn."))
    return Section(
        "Rule by rule",
        tag(
            "p",
            "Left: where each batch size ends (dots are seeds; the other rules are the faint "
            f"lines). Right: {sweep.curve_metric} on the way there, mean over seeds, against "
            "examples seen. If the batch size does not matter, the curves lie on each other.",
        ),
        tag("ul", tag("li", "batch size"), *key, class_="key"),
        *cards,
    )


def deviation(analysis: Analysis) -> Section | None:
    """How far the whole training curve strays from the base's."""
    if not any(group.deviation for group in analysis.groups):
        return None
    what = "Deviation of the training curve from the base's, in units of seed noise"
    caption = (
        f"Root mean square over {max(len(analysis.edges) - 1, 0)} windows of examples seen of the "
        f"mean {analysis.sweep.curve_metric} minus the base's. The unit is what two groups of "
        "seeds of these sizes show when only the seed differs: about 1 is no deviation, and up "
        "to about 2 can still be chance. Runs of one seed see the same examples in the same "
        "order at every batch size, so a good rule can come out below 1."
    )
    wide = Html(style.to_svg(plots.deviation_figure(analysis, 8.7, 3.6), what, "dw-"))
    narrow = Html(style.to_svg(plots.deviation_figure(analysis, 3.7, 3.2), what, "dn-"))
    return Section(
        "Does the whole training curve follow?",
        tag(
            "figure",
            tag("div", wide, class_="wide"),
            tag("div", narrow, class_="narrow"),
            tag("figcaption", caption),
        ),
    )


def numbers(analysis: Analysis) -> Section:
    """The table: a line a group."""
    sweep = analysis.sweep
    units, loss = Units(sweep.accuracy_metric), Units(sweep.loss_metric)
    with_offset = any(group.offset != 1 for group in analysis.groups)
    header = ["rule", "batch size", "k", *(["offset"] if with_offset else [])]
    header += [f"{units.name} ± sd", "difference [95 %]", "verdict", "seeds"]
    header += ["p (same)", "p (differs)"]
    header += [f"{loss.name} difference [95 %]", "curve deviation", "× seed noise"]
    groups = [*([analysis.base] if analysis.base else []), *analysis.groups]
    rows = []
    for group in groups[:_MAX_TABLE_ROWS]:
        comparison = group.comparison
        spread = f" ± {group.interval.sd * units.factor:.2f}" if group.interval.n > 1 else ""
        if not units.percent and group.interval.n > 1:
            spread = f" ± {group.interval.sd:.4f}"
        name = "base" if group is analysis.base else group.arm
        rows.append(
            [
                name,
                str(group.batch_size),
                fraction(group.k),
                *([fraction(group.offset)] if with_offset else []),
                units.value(group.interval.mean) + spread,
                _difference(comparison, units),
                badge(group.verdict) if group.verdict else "",
                _seeds(group),
                p_value(comparison.p_equivalent) if comparison else "–",
                p_value(comparison.p_beyond) if comparison else "–",
                _difference(group.loss_comparison, loss),
                f"{group.deviation.rms:.4f}" if group.deviation else "–",
                _times(group.deviation.in_noise) if group.deviation else "–",
            ]
        )
    cut = html()
    if len(groups) > _MAX_TABLE_ROWS:
        cut = tag(
            "p", f"The first {_MAX_TABLE_ROWS} of {len(groups)} lines; all rows are in the CSV."
        )
    return Section("The numbers", table(header, rows), cut, _how_to_read(analysis))


def _times(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _seeds(group: Group) -> str:
    parts = [str(len(group.values))]
    if group.diverged:
        parts.append(f"+ {group.diverged} diverged")
    if group.unfinished:
        parts.append(f"of {group.planned}")
    return " ".join(parts)


def _difference(comparison: Comparison | None, units: Units) -> Html:
    if comparison is None:
        return html("–")
    interval = html()
    if math.isfinite(comparison.low):
        ends = f" [{units.signed(comparison.low)}, {units.signed(comparison.high)}]"
        interval = tag("small", ends)
    return html(units.signed(comparison.difference), interval)


def _how_to_read(analysis: Analysis) -> Html:
    units = Units(analysis.sweep.accuracy_metric)
    margin = units.spread(analysis.sweep.margin)
    method = [
        html(
            tag("b", "k"),
            f" is the batch size over the base batch size {analysis.sweep.base_batch_size}; all "
            "runs see the same number of examples.",
        ),
        html(
            tag("b", "p (same)"),
            f" is from two one-sided tests (TOST): at most 0.05 shows that the difference is "
            f"smaller than ±{margin}, which makes the point ",
            tag("i", "equivalent"),
            ". A small difference alone shows nothing if the seeds scatter.",
        ),
        html(
            tag("b", "p (differs)"),
            f" at most 0.05, after counting the rule's points (Bonferroni), shows that the "
            f"difference is larger than ±{margin}: ",
            tag("i", "different"),
            ". So does any diverged run. In between, more seeds are needed.",
        ),
        "A rule is equivalent to the base if all its points are, different if any point is, and "
        "undecided otherwise.",
        "The loss is a second witness; it has no margin and no say in the verdict.",
    ]
    noise = analysis.noise
    if noise is not None:
        if noise.paired:
            method.append(
                "A seed decides the initial weights and the order of the examples at every point, "
                "so a point is compared with the base seed by seed, over the seeds that both have, "
                "and what a seed does everywhere drops out: the scatter over seeds "
                f"is {units.spread(noise.seed_sd)}, what is left of it {units.spread(noise.sd)}."
            )
        else:
            method.append(
                "The points do not have the same seeds, so means are compared, not pairs of runs."
            )
        pooled = (
            f"Seed noise: sd {units.spread(noise.sd)}, pooled within {count(noise.groups, 'group')}"
            f" near the base ({noise.df} degrees of freedom; Bartlett's test that they share it: "
            f"p = {p_value(noise.p_equal)})."
        )
        own = "its own differences (paired t)" if noise.paired else "its own scatter (Welch)"
        used = (
            " Groups more than 5 margins away stay out of that pool; one of them whose seeds "
            f"scatter more (F test) is compared by {own}."
            if noise.shared
            else f" They do not share it, so every point is compared by {own}."
        )
        method.append(pooled + used)
        passing = widest_pass(analysis.groups, noise, analysis.sweep.margin)
        if noise.shared and passing > 0:
            method.append(
                "With the seeds at hand, a point passes as equivalent if the difference seen is "
                f"at most ±{units.spread(passing)}."
            )
    return tag("details", tag("summary", "How to read this, and the method"), bullets(method))


def hyperparameters(results: Results, analysis: Analysis) -> Section | None:
    """What each rule made of the recipe at each batch size."""
    chosen = {}
    for row in results.rows:
        if row.scaled:
            chosen.setdefault((row.arm, row.batch_size, row.offset), row)
    if not chosen:
        return None
    names = list(dict.fromkeys(name for row in chosen.values() for name in row.scaled))
    recipe = next((run.base for run in results.runs.values() if run.base), {})
    at_base = [
        (arm, size, offset)
        for arm, size, offset in chosen
        if (size, offset) == (results.sweep.base_batch_size, 1)
    ]
    rows = [["recipe", str(results.sweep.base_batch_size), "1", *_cells(recipe, names)]]
    for key in sorted(
        (key for key in chosen if key not in at_base),
        key=lambda key: ([arm.arm for arm in analysis.arms].index(key[0]), key[1], key[2]),
    ):
        arm, size, offset = key
        k = fraction(size / results.sweep.base_batch_size)
        rows.append(
            [
                arm,
                str(size) if offset == 1 else f"{size} (offset {fraction(offset)})",
                k,
                *_cells(chosen[key].scaled, names),
            ]
        )
    content = table(["rule", "batch size", "k", *names], rows[:_MAX_TABLE_ROWS])
    if len(rows) > 40:
        content = tag("details", tag("summary", count(len(rows), "line")), content)
    cautions: dict[str, list[str]] = {}
    for row in chosen.values():
        for text in results.runs[row.run_id].warnings:
            cautions.setdefault(text, []).append(f"{row.arm} at {row.batch_size}")
    notes = html()
    if cautions:
        items = [
            html(text, tag("span", f" ({_some(where)})", class_="note"))
            for text, where in list(cautions.items())[:_MAX_NAMED]
        ]
        summary = tag("summary", f"{count(len(items), 'caution')} about single points")
        notes = tag("details", summary, bullets(items))
    varies = "“varies” marks what the rule measures while it trains." if _varies(rows) else ""
    return Section("Scaled hyperparameters", content, tag("p", varies, class_="note"), notes)


def _cells(values: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    return [hyperparameter(values[name]) if name in values else "–" for name in names]


def _varies(rows: Sequence[Sequence[str]]) -> bool:
    return any("varies" in row[3:] for row in rows)


def _some(items: Sequence[str], limit: int = 6) -> str:
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
