"""The sections of the report, each from the analysis to escaped HTML."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from bs_jax.records.results import DIVERGED, DONE, MISSING, Results
from bs_jax.report import plots, style, words
from bs_jax.report.numbers import (
    Units,
    count,
    duration,
    fraction,
    hyperparameter,
    in_words,
    p_value,
    share,
    whole,
)
from bs_jax.report.page import Html, Section, bullets, html, table, tag
from bs_jax.statistics.analysis import Analysis, widest_pass
from bs_jax.statistics.contrasts import Comparison, Verdict
from bs_jax.statistics.groups import Group
from bs_jax.statistics.price import LEVEL_AT
from bs_jax.statistics.verdicts import ArmVerdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Past these a page is no longer read but searched, and the CSV is there for that.
_MAX_TABLE_ROWS = 400
_MAX_PANELS = 24
_MAX_NAMED = 50

_KINDS = {Verdict.EQUIVALENT: "good", Verdict.DIFFERENT: "bad", Verdict.UNDECIDED: "open"}


def badge(verdict: Verdict) -> Html:
    """A verdict as a coloured word with its sign."""
    return tag("span", f"{style.SIGNS[verdict]} {verdict}", class_=f"badge {_KINDS[verdict]}")


def rule(arm: str) -> Html:
    """A rule's name, set so that nobody takes it for a word of the sentence."""
    return tag("code", arm)


def title(results: Results) -> str:
    """What the page is about."""
    sweep = results.sweep
    return sweep.title or f"{sweep.config_name}: sweep {sweep.name}"


def opening(results: Results, analysis: Analysis) -> Html:
    """Title, outcome, advice, the facts a reader needs first, one line a rule, caveats."""
    sweep = results.sweep
    units = Units(sweep.accuracy_metric)
    done = sum(run.status in (DONE, DIVERGED) for run in results.runs.values())
    seeds = sorted({group.planned for group in (*analysis.groups, analysis.base) if group})
    facts = {
        "base batch size": f"{sweep.base_batch_size}",
        "margin": f"±{units.spread(sweep.margin)}",
        "seeds a point": "–".join(dict.fromkeys([str(seeds[0]), str(seeds[-1])])),
        "scatter over seeds (sd)": _scatter(analysis, units),
        "runs finished": f"{done} of {len(results.runs)}",
    }
    boxes = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    lines = [
        tag(
            "li",
            tag("b", rule(arm.arm)),
            badge(arm.verdict),
            tag("p", words.verdict_sentence(arm, analysis), " ", _second_witness(arm, analysis)),
        )
        for arm in analysis.arms
    ]
    advice, progress = words.advice(analysis), words.progress(results, analysis)
    caveats = words.caveats(results, analysis)
    return html(
        tag("h1", title(results)),
        tag("p", words.headline(analysis), class_="lead"),
        tag("p", advice, class_="lead") if advice else "",
        tag("p", progress) if progress else "",
        tag(
            "p",
            f"Each rule turns one recipe, tuned at batch size {sweep.base_batch_size}, into a "
            "recipe for another batch size; ",
            tag("b", "k"),
            f" is that batch size over {sweep.base_batch_size}. All runs see the same number of "
            "examples, so a larger batch makes fewer updates.",
        ),
        tag("dl", *boxes, class_="facts"),
        tag("ul", *lines, class_="verdicts"),
        tag("div", tag("b", "Caveats"), bullets(caveats), class_="warning") if caveats else "",
    )


def _scatter(analysis: Analysis, units: Units) -> str:
    noise = analysis.noise
    if noise is None:
        return "unknown"
    paired = f", {units.spread(noise.sd)} paired" if noise.paired else ""
    return units.spread(noise.seed_sd) + paired


def _second_witness(arm: ArmVerdict, analysis: Analysis) -> str:
    sentences = [words.curve_sentence(arm, analysis), words.limit_sentence(arm)]
    text = " ".join(sentence for sentence in sentences if sentence)
    return tag("span", text, class_="note") if text else ""


def _two_widths(figure: str, wide: "Figure", narrow: "Figure", prefix: str, caption: str) -> Html:
    """A figure drawn for a desktop and again for a phone, of which the page shows one."""
    return tag(
        "figure",
        tag("div", Html(style.to_svg(wide, figure, f"{prefix}w-")), class_="wide"),
        tag("div", Html(style.to_svg(narrow, figure, f"{prefix}n-")), class_="narrow"),
        tag("figcaption", caption),
    )


def overview(analysis: Analysis) -> Section | None:
    """The figure: final metric against batch size for every rule."""
    units = Units(analysis.sweep.accuracy_metric)
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
    return Section(
        f"Final {units.name} against batch size",
        _two_widths(
            f"Final {units.name} against batch size, one line a rule",
            plots.metric_figure(analysis, 8.7, 4.4),
            plots.metric_figure(analysis, 3.7, 3.6),
            "o",
            caption,
        ),
    )


def arm_panels(results: Results, analysis: Analysis) -> Section | None:
    """Four figures a rule: where it ends, how it gets there, evaluations, the gap to the base."""
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
        figures = {
            "final metric": plots.metric_figure(analysis, 4.1, 2.7, arm=arm.arm),
            "training curves": plots.curve_figure(analysis, arm.arm, 4.1, 2.7),
            "evaluations": plots.evaluation_figure(analysis, arm.arm, 4.1, 2.7),
            "training curves minus the base's": plots.gap_figure(analysis, arm.arm, 4.1, 2.7),
        }
        shown = [
            Html(style.to_svg(figure, f"{arm.arm}: {what}", f"p{index}-{number}-"))
            for number, (what, figure) in enumerate(figures.items())
            if figure is not None
        ]
        heading = tag("header", tag("h3", rule(arm.arm)), badge(arm.verdict))
        ramps = [_batch_sizes(group) for group in arm.groups if group.price.ramp is not None]
        grows = f" Its batch size changes while it trains: {ramps[-1]}." if ramps else ""
        meaning = tag("p", words.explanation(arm.arm, results) + grows)
        cards.append(
            tag("article", heading, meaning, tag("div", *shown, class_="pair"), class_="arm")
        )
    if len(analysis.arms) > _MAX_PANELS:
        cards.append(tag("p", f"The first {_MAX_PANELS} of {len(analysis.arms)} rules are drawn."))
    return Section(
        "Rule by rule",
        tag(
            "p",
            "Above: where each batch size ends (dots are single runs, a seed each; the other rules "
            f"are the faint lines), and the {in_words(sweep.curve_metric)} on the way there, mean "
            "over seeds. If the batch size does not matter, the curves lie on each other. Below: "
            "the evaluations on the way, and the training curves minus the base's, where above 0 "
            "is behind. Rest the pointer on a point to read its value.",
        ),
        tag("ul", tag("li", "batch size"), *key, class_="key"),
        *cards,
    )


def deviation(analysis: Analysis) -> Section | None:
    """How far the whole training curve strays from the base's, and what that means."""
    if not any(group.deviation for group in analysis.groups):
        return None
    curve = in_words(analysis.sweep.curve_metric)
    fallen = words.fall(analysis)
    scale = f" The base's {curve} falls by {fallen:.2f} in all." if fallen > 0 else ""
    meaning = (
        "The final metric says where a rule ends; the distance of its curve says whether it took "
        "the base's way there. A curve can stray early and end at the same place, and with few "
        f"seeds the curve shows smaller differences than the end does.{scale}"
    )
    caption = (
        f"Root mean square over {len(analysis.edges) - 1} windows of the mean {curve} minus the "
        "base's. The unit is what two groups of seeds of these sizes show when only the seed "
        "differs: about 1 is no distance, and up to about 2 can still be chance. Runs of one seed "
        "see the same examples in the same order at every batch size, so a good rule can come out "
        "below 1."
    )
    age = (
        "The loss of a batch is that of the weights before its update, so a curve over the "
        "examples seen lags by half a batch. Here batch sizes are compared over the examples that "
        "the weights have seen: examples seen − B/2."
    )
    return Section(
        "Does the whole training curve follow?",
        tag("p", meaning),
        _two_widths(
            "Distance of the training curve from the base's, in units of seed noise",
            plots.deviation_figure(analysis, 8.7, 3.6),
            plots.deviation_figure(analysis, 3.7, 3.2),
            "d",
            caption,
        ),
        tag("p", age, class_="note") if analysis.sweep.curve_metric.startswith("train/") else "",
    )


def price(analysis: Analysis) -> Section | None:
    """What a batch size costs, what it buys, and whether it lay inside the noise scale."""
    everyone = [*([analysis.base] if analysis.base else []), *analysis.groups]
    groups = [group for group in everyone if group.offset == 1 and group.values]
    if not any(math.isfinite(group.price.updates) for group in groups):
        return None
    constant = [group for group in groups if group.price.ramp is None]
    sizes = sorted({group.batch_size for group in constant})
    speeds = {size: _median_speed(constant, size) for size in sizes}
    base_speed = speeds.get(analysis.sweep.base_batch_size, math.nan)
    by_size = [
        [
            str(size),
            fraction(size / analysis.sweep.base_batch_size),
            whole(_median([g.price.updates for g in constant if g.batch_size == size])),
            duration(_median([g.price.seconds for g in constant if g.batch_size == size])),
            whole(speeds[size]),
            _times(speeds[size] / base_speed),
        ]
        for size in sizes
    ]
    own = analysis.base.share_to_base_loss if analysis.base is not None else math.nan
    measured = any(group.inside is not None for group in groups)
    header = ["rule", "batch size", "examples to the base's loss, × the base's"]
    header += ["updates to it", "time to it"]
    header += ["share of the run inside the noise scale", "not known"] if measured else []
    rows = []
    for group in groups[:_MAX_TABLE_ROWS]:
        is_base = group is analysis.base
        reached = group.share_to_base_loss
        finite = reached if math.isfinite(reached) else math.nan
        rows.append(
            [
                "base" if is_base else rule(group.arm),
                _batch_sizes(group),
                "not reached" if math.isinf(reached) else _times(reached / own),
                whole(group.price.updates_at(finite)),
                duration(group.price.seconds * finite),
                *(_inside(group) if measured else []),
            ]
        )
    notes = [
        f"“The base's loss” is its {in_words(analysis.sweep.curve_metric)} after "
        f"{share(LEVEL_AT)} of its training, where every rule is still on its way. "
        "Where the curves are flat already, the examples to it say little.",
        "Times are medians over runs of wall time as it was, evaluations included, beside whatever "
        "else ran on the machine.",
    ]
    if measured:
        notes.append(
            "“Inside the noise scale”: the batch was at most the measured gradient noise scale; in "
            "brackets by the ends of its range. The share is of the examples at which the noise "
            "scale was known. Inside, a rule can follow the base; beyond, none is expected to."
        )
    return Section(
        "What the batch size costs and buys",
        table(["batch size", "k", "updates", "time a run", "images/s", "× the base's"], by_size),
        table(header, rows) if measured or any(g.share_to_base_loss > 0 for g in groups) else "",
        bullets(notes),
    )


def _median_speed(groups: Sequence[Group], size: int) -> float:
    return _median([g.price.examples_per_second for g in groups if g.batch_size == size])


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _batch_sizes(group: Group) -> str:
    """The batch size, or those that a ramp went through, "16 → 64"."""
    if group.price.ramp is None:
        return str(group.batch_size)
    values = group.price.ramp.values
    changes = [values[0], *values[1:][np.diff(values) != 0]]
    shown = [f"{value:g}" for value in changes]
    return " → ".join(shown if len(shown) <= 4 else [shown[0], "…", shown[-1]])


def _inside(group: Group) -> list[str]:
    inside = group.inside
    if inside is None:
        return ["–", "–"]
    if not math.isfinite(inside.share):  # it was never known
        return ["–", share(inside.unknown)]
    ends = tag("small", f" [{share(inside.low)}, {share(inside.high)}]")
    return [html(share(inside.share), ends), share(inside.unknown)]


def numbers(analysis: Analysis) -> Section:
    """The table: a line a group."""
    sweep = analysis.sweep
    units, loss = Units(sweep.accuracy_metric), Units(sweep.loss_metric)
    with_offset = any(group.offset != 1 for group in analysis.groups)
    header = ["rule", "batch size", "k", *(["offset"] if with_offset else [])]
    header += [f"{units.name} ± sd", "difference [95 %]", "verdict", "seeds"]
    header += ["p (equivalent)", "p (different)"]
    header += [f"{loss.name} difference [95 %]", "curve distance", "× seed noise", "p (chance)"]
    header += ["runs, by seed"]
    groups = [*([analysis.base] if analysis.base else []), *analysis.groups]
    rows = []
    for group in groups[:_MAX_TABLE_ROWS]:
        comparison = group.comparison
        spread = f" ± {group.interval.sd * units.factor:.2f}" if group.interval.n > 1 else ""
        if not units.percent and group.interval.n > 1:
            spread = f" ± {group.interval.sd:.4f}"
        name = "base" if group is analysis.base else rule(group.arm)
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
                p_value(group.deviation.p_chance) if group.deviation else "–",
                _links(group),
            ]
        )
    cut = html()
    if len(groups) > _MAX_TABLE_ROWS:
        cut = tag(
            "p", f"The first {_MAX_TABLE_ROWS} of {len(groups)} lines; all rows are in the CSV."
        )
    return Section("The numbers", table(header, rows), cut, _how_to_read(analysis))


def _links(group: Group) -> Html:
    """A link to the folder of each run, under its seed."""
    return html(
        *(
            html(tag("a", str(seed), href=f"../runs/{quote(run.run_id, safe='')}/"), " ")
            if run.status != MISSING
            else f"{seed} "
            for seed, run in group.runs[:_MAX_NAMED]
        )
    )


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
            tag("b", "p (equivalent)"),
            f" is from two one-sided tests (TOST): at most 0.05 shows that the difference is "
            f"smaller than ±{margin}, which makes the point ",
            tag("i", "equivalent"),
            ". A small difference alone shows nothing if the seeds scatter.",
        ),
        html(
            tag("b", "p (different)"),
            f" at most 0.05, after counting the rule's points (Bonferroni), shows that the "
            f"difference is larger than ±{margin}: ",
            tag("i", "different"),
            ". So does any diverged run. In between, more seeds are needed.",
        ),
        "A rule is equivalent to the base if all its points are, different if any point is, and "
        "undecided otherwise.",
        "The loss is a second witness; it has no margin and no say in the verdict.",
        html(
            tag("b", "p (chance)"),
            " says how probable so large a curve distance is if nothing but the seed differs (an F "
            "test with as many degrees of freedom as the curves have independent windows). A "
            "rule's curve departs where it is at most 0.05, after counting the rule's points.",
        ),
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
                rule(arm),
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
