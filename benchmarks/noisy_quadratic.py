"""Noisy quadratics in a figure and tables: every rule, or what the flags name.

Command:  python benchmarks/noisy_quadratic.py [--out=docs/figures]
          python benchmarks/noisy_quadratic.py [--families] [--floor] [--decay_floor] [--price]
Run time: one minute on two CPU cores; ten for --families or --floor, three for the others
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from bs_jax.scaling import RULES, ScalingRule, problems, scale_by_batch

SIGMAS = problems.SIGMAS
REGIMES = ("mostly noise (σ = 10)", "noise and signal (σ = 1)", "mostly signal (σ = 0.3)")
STYLES = {
    "sqrt": ("#c44e52", "square root"),
    "linear": ("#dd8452", "linear"),
    "noise_aware": ("#4c72b0", "noise-aware, 2 micro-batches"),
    "invariant": ("#2a9d5c", "invariant second moment, 2 micro-batches"),
}
SCALES = (8, 0.25)
POINTS = 20


def adam(rule: str | ScalingRule, b2: float = 0.99, **settings):
    def make(batch_size: int, base_batch_size: int):
        scaled = scale_by_batch(
            optax.adam, batch_size=batch_size, base_batch_size=base_batch_size, rule=rule,
            guard=False,  # a quadratic without a limit on the step
            **settings,
        )  # fmt: skip
        return scaled(1e-3, b1=0.9, b2=b2)

    return make


def rule_curves() -> dict[tuple[str, float], np.ndarray]:
    """Mean of x along training, by rule and k."""
    curves = {("base", 1.0): problems.run(adam("none"), k=1, sigmas=SIGMAS, quarters=POINTS)}
    for rule in STYLES:
        for k in SCALES:
            measured = rule in ("noise_aware", "invariant")
            curves[rule, k] = problems.run(
                adam(rule), k=k, sigmas=SIGMAS, microbatches=2 if measured else 1, quarters=POINTS
            )
    return curves


def draw(curves: dict[tuple[str, float], np.ndarray], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(SCALES), len(SIGMAS), sharex=True, sharey=True)
    examples = np.arange(POINTS + 1) / POINTS * 4000 * problems.BASE_BATCH_SIZE / 1000
    for row, k in zip(grid, SCALES, strict=True):
        for i, axes in enumerate(row):
            start = np.ones(1)
            base = np.concatenate([start, curves["base", 1.0][i]])
            axes.plot(examples, base, color="0.75", lw=7, solid_capstyle="round", label="base")
            for rule, (color, label) in STYLES.items():
                curve = np.concatenate([start, curves[rule, k][i]])
                dashes = (4, 2) if rule == "invariant" else ()
                axes.plot(examples, curve, color=color, lw=1.6, dashes=dashes, label=label)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(color="0.93")
            axes.spines[["top", "right"]].set_visible(False)
            if k == SCALES[0]:
                axes.set_title(REGIMES[i], fontsize=11)
            else:
                axes.set_xlabel("thousand examples seen")
        size = round(problems.BASE_BATCH_SIZE * k)
        row[0].set_ylabel(f"batch size {size} (k = {k:g})\nmean of x")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Adam tuned at batch size 64: a rule that works lies on the grey line")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def rule_table(curves: dict[tuple[str, float], np.ndarray]) -> str:
    step = POINTS // 4

    def cells(rows: np.ndarray) -> str:
        return " | ".join(" ".join(f"{x:.3f}" for x in row[step - 1 :: step]) for row in rows)

    lines = ["| Adam, lr 1e-3 | σ 10 | σ 1 | σ 0.3 |", "| --- | --- | --- | --- |"]
    lines += [f"| {rule}, k = {k:g} | {cells(rows)} |" for (rule, k), rows in curves.items()]
    return "\n".join(lines)


def family_table() -> str:
    lines = [
        "| optimizer | noise-aware, k = 8 | k = 1/4 | invariant, k = 8 | k = 1/4 | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, check in problems.checks().items():
        by_rule = [problems.deviations(check, rule) for rule in ("noise_aware", "invariant")]
        best = min(found.max() for found in by_rule)
        label = "exact" if best <= problems.EXACT_WITHIN else "approximate"
        cells = " | ".join(f"{x:.3f}" for found in by_rule for x in found.max(axis=1))
        lines.append(f"| {name} | {cells} | {label} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def floor_table() -> str:
    floors = (0.003, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0)
    lines = [
        "| b2, k, micro-batches | " + " | ".join(f"{f:g}" for f in floors) + " |",
        "| --- |" + " --- |" * len(floors),
    ]
    for b2 in (0.99, 0.9):
        base = problems.run(adam("none", b2), k=1, sigmas=SIGMAS)
        for k, n in ((0.5, 2), (0.25, 2), (0.25, 4), (0.125, 2), (8, 2), (4, 32)):
            found = []
            for floor in floors:
                make = adam("invariant", b2, variance_floor=floor)
                rows = problems.run(make, k=k, sigmas=SIGMAS, microbatches=n)
                found.append(f"{np.abs(rows - base).max():.3f}")
            lines.append(f"| {b2}, {k:g}, {n} | " + " | ".join(found) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def decay_floor_table() -> str:
    """Decays that stop at a floor in place of b^k: deviation from the base."""
    floors = (None, 0.3, 0.5, 0.9)
    named = ["b^k" if f is None else f"{f:g}" for f in floors]
    lines = [
        "| b1, b2, k | floor under | " + " | ".join(named) + " |",
        "| --- | --- |" + " --- |" * len(floors),
    ]
    for b2 in (0.99, 0.95):
        base = problems.run(adam("none", b2), k=1, sigmas=SIGMAS)
        for k in (16, 64):
            for held in ({"b1": 0.9}, {"b2": b2}):
                cells = []
                for floor in floors:
                    # A factor on k: b^(k factor) is the floor.
                    factors = {
                        name: math.log(floor) / (k * math.log(b))
                        for name, b in held.items()
                        if floor is not None and b**k < floor
                    }
                    if floor is not None and not factors:
                        cells.append("the same")
                        continue
                    make = adam(RULES["invariant"].replace(**factors), b2)
                    rows = problems.run(make, k=k, sigmas=SIGMAS, microbatches=8)
                    cells.append(f"{np.abs(rows - base).max():.3f}")
                lines.append(f"| 0.9, {b2}, {k} | {next(iter(held))} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


LENGTHS = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)


def examples_needed(final_loss: Callable[[float], float], wanted: float) -> float:
    """Return the length, over the base's, at which a run ends at the wanted loss."""
    last: tuple[float, float] | None = None
    for length in LENGTHS:
        loss = final_loss(length)
        if loss <= wanted:
            if last is None:
                return length
            share = math.log(last[1] / wanted) / math.log(last[1] / loss)
            return last[0] + share * (length - last[0])
        last = length, loss
    return math.inf


def price_table() -> str:
    """Examples to the base's final loss where steps have a limit, beside what is expected."""
    updates, spread = 500, problems.SPREAD
    lines = [
        "| sigma, phi | k | needed | (1 + k/phi)/(1 + 1/phi), mean over the run |",
        "| --- | --- | --- | --- |",
    ]
    for sigma in (0.1, 0.3, 1.0):
        base = problems.spread_quadratic("none", 1, sigma=sigma, base_updates=updates)[-1]
        noise = sigma**2 * spread.sum()
        signal = problems.spread_quadratic(
            "none", 1, sigma=sigma, base_updates=updates, quarters=20,
            read=lambda x, _: jnp.square(spread * x) * spread.size,
        )  # fmt: skip
        phi = noise / np.concatenate([[np.sum(spread**2)], signal])
        for k in (2, 4, 8):
            needed = examples_needed(
                lambda length, k=k, sigma=sigma: problems.spread_quadratic(
                    "invariant", k, sigma=sigma, base_updates=round(updates * length)
                )[-1],
                base,
            )
            expected = np.mean((1 + k / phi) / (1 + 1 / phi))
            about = f"{sigma:g}, {phi[0]:.2g} to {phi[-1]:.2g}"
            lines.append(f"| {about} | {k} | {needed:.2f} | {expected:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", action="store_true", help="hold every optimizer against it")
    parser.add_argument("--floor", action="store_true", help="study the floor of the invariant v")
    parser.add_argument("--decay_floor", action="store_true", help="study a floor under decays")
    parser.add_argument("--price", action="store_true", help="examples to the base's loss")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    flags = parser.parse_args()
    tables = {
        family_table: flags.families,
        floor_table: flags.floor,
        decay_floor_table: flags.decay_floor,
        price_table: flags.price,
    }
    if not any(tables.values()):
        curves = rule_curves()
        draw(curves, flags.out / "noisy_quadratic.png")
        print(rule_table(curves))
    for table, wanted in tables.items():
        if wanted:
            table()


if __name__ == "__main__":
    main()
