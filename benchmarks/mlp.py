"""Every optimizer on a small network: how far a scaled run strays from the base.

A network of 16 inputs and 32 hidden units learns another one from fresh noisy examples, whose noise
is 1 of the loss. The learning rate is the one of a grid, up to the best, whose loss ends nearest to
2: the curve is still falling then, and a step of another length shows. A deviation is that of the
loss on clean examples from the base's, after the same examples, over the base's fall: the largest
of eight points of the curve, of the mean over paired seeds. Guards are off: the rule alone is
looked at.

Command:  python -m benchmarks.mlp [--optimizers=adam,sgd] [--csv=FILE]
Run time: about half an hour on one CPU core
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import contrib

from bs_jax.scaling import RULES, MicrobatchStats, problems, scale_by_batch

BASE_BATCH_SIZE = 32  # examples
BASE_UPDATES = 512
INPUTS, HIDDEN = 16, 32
POINTS = 8  # of the curve
SEEDS = 32
SCALES = {4.0: 4, 0.25: 2}  # k and the number of micro-batches
RATES = 2.0 ** np.arange(-4, 7)  # times the quadratic's learning rate
ENDS_NEAR = 2.0  # loss at the base
ARMS = ("sqrt", "noise_aware", "invariant")


def network(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def initial(key: jax.Array, out: float) -> Any:
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (INPUTS, HIDDEN)) / INPUTS**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": out * jax.random.normal(second, (HIDDEN, 1)) / HIDDEN**0.5,
        "b2": jnp.zeros(1),
    }


TEACHER = initial(jax.random.key(100), 4.5)
CLEAN = jax.random.normal(jax.random.key(101), (2048, INPUTS))


def loss(params: Any, x: jax.Array, noise: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(network(params, x) - network(TEACHER, x) - noise))


def curve(
    optimizer: Any, batch_size: int, parts: int, evaluate: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Train one seed; the loss on clean examples (noise added) before, and after each stretch."""
    start, data = jax.random.split(key)
    params = initial(start, 1.0)
    total = BASE_UPDATES * BASE_BATCH_SIZE

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        params, state = carry
        # Examples are drawn in blocks of eight, so every batch size sees the same ones in order.
        blocks = number * (batch_size // 8) + jnp.arange(batch_size // 8)
        keys = jax.vmap(lambda block: jax.random.fold_in(data, block))(blocks)
        drawn = jax.vmap(lambda one: jax.random.normal(one, (8, INPUTS + 1)))(keys)
        drawn = drawn.reshape(parts, batch_size // parts, INPUTS + 1)
        gradients = jax.vmap(lambda z: jax.grad(loss)(params, z[:, :-1], z[:, -1:]))(drawn)
        gradient = jax.tree.map(lambda g: jnp.mean(g, 0), gradients)
        extra = {}
        if parts > 1:
            squares = jax.tree.map(lambda g: jnp.mean(jnp.square(g), 0), gradients)
            extra["microbatch"] = MicrobatchStats(squares, parts)
        updates, state = optimizer.update(gradient, state, params, **extra)
        return (jax.tree.map(jnp.add, params, updates), state), None

    def stretch(carry: Any, numbers: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, numbers)
        seen = carry[0] if evaluate is None else evaluate(*carry)
        return carry, 1.0 + loss(seen, CLEAN, jnp.zeros(()))

    numbers = jnp.arange(total // batch_size).reshape(POINTS, -1)
    before = 1.0 + loss(params, CLEAN, jnp.zeros(()))
    return before, jax.lax.scan(stretch, (params, optimizer.init(params)), numbers)[1]


KEYS = jax.random.split(jax.random.key(0), SEEDS)


def tuned(check: problems.Check) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The recipe at the base with its learning rate, the losses before, and its curves."""
    rest = {name: value for name, value in check.recipe.items() if name != "learning_rate"}

    @jax.jit
    @jax.vmap
    def train(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        optimizer = check.factory(learning_rate=rate, **rest)
        evaluate = None if check.evaluate is None else averaged
        return jax.vmap(lambda key: curve(optimizer, BASE_BATCH_SIZE, 1, evaluate, key))(KEYS)

    rates = check.recipe["learning_rate"] * RATES
    before, curves = (np.asarray(x) for x in train(jnp.asarray(rates, jnp.float32)))
    ends = np.nan_to_num(curves[:, :, -1].mean(1), nan=np.inf)
    at = int(np.abs(ends[: ends.argmin() + 1] - ENDS_NEAR).argmin())
    return {"learning_rate": float(rates[at]), **rest}, before[at], curves[at]


def averaged(params: Any, state: Any) -> Any:
    """The weights that schedule-free optimizers are looked at by."""
    return contrib.schedule_free_eval_params(state, params)


def scaled(check: problems.Check, recipe: dict[str, Any], rule: str, k: float) -> np.ndarray:
    size = round(k * BASE_BATCH_SIZE)
    optimizer = scale_by_batch(
        check.factory, batch_size=size, base_batch_size=BASE_BATCH_SIZE, rule=rule, guard=False
    )(**recipe)
    parts = SCALES[k] if RULES[rule].measures else 1
    train = jax.jit(jax.vmap(lambda key: curve(optimizer, size, parts, check.evaluate, key)[1]))
    return np.asarray(train(KEYS))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", default="", help="names joined by commas; empty: all")
    parser.add_argument("--csv", type=Path, help="where the numbers go")
    flags = parser.parse_args(arguments)
    checks = problems.checks()
    del checks["muon's adam"], checks["adafactor, unfactored"]  # the network has matrices
    names = [name for name in flags.optimizers.split(",") if name] or list(checks)
    if unknown := set(names) - set(checks):
        parser.error(f"no optimizer {sorted(unknown)}; known: {', '.join(checks)}")
    rows = []
    print("| optimizer, learning rate, loss at the end | " + " | ".join(
        f"{rule}, k = {k:g}" for rule in ARMS for k in SCALES) + " |")  # fmt: skip
    print("| --- |" + " --- |" * (len(ARMS) * len(SCALES)))
    for name in names:
        check = checks[name]
        recipe, before, base = tuned(check)
        fall = np.mean(before - base[:, -1])
        cells = []
        for rule in ARMS:
            for k in SCALES:
                apart = (scaled(check, recipe, rule, k) - base) / fall
                mean = apart.mean(0)
                at = int(np.nan_to_num(np.abs(mean), nan=np.inf).argmax())
                half = 1.96 * apart[:, at].std(ddof=1) / SEEDS**0.5
                cells.append(f"{mean[at]:+.3f} ± {half:.3f}")
                rows.append({
                    "optimizer": name, "learning_rate": recipe["learning_rate"], "rule": rule,
                    "k": k, "deviation": f"{mean[at]:.5f}", "half_width_95": f"{half:.5f}",
                    "point": at + 1, "points": POINTS, "base_end": f"{base[:, -1].mean():.4f}",
                    "fall": f"{fall:.4f}", "seeds": SEEDS,
                })  # fmt: skip
        about = f"{name}, {recipe['learning_rate']:g}, {base[:, -1].mean():.2f}"
        print(f"| {about} | " + " | ".join(cells) + " |", flush=True)
        if flags.csv:
            with flags.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
