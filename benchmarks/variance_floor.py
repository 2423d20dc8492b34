"""The floor under the invariant second moment, leaf by leaf, on a real network.

Command:  python -m benchmarks.variance_floor --json=docs/results/variance_floor.json
Run time: two minutes on two CPU cores

A BatchNorm ResNet on the embedded part of Fashion-MNIST, before training and after two epochs of
it at the base batch size. Its weights are then held still while Adam's second moment is averaged
over the same number of examples twice: as the base batch size shows it (v), and as the invariant
rule finds it at another batch size (v' with the floor f W). What matters to an update is
sqrt(v/v'), which should be 1; its mean over the coordinates of a leaf is given as the mean over
leaves and as the two leaves furthest below and above, with the share of coordinates at the floor.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _measure
from bs_jax import data, models, scale_by_batch, value_grad_and_stats
from bs_jax.data import pipeline

BASE_BATCH_SIZE, GHOST, B2 = 64, 8, 0.99
FLOORS = (0.003, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0)
MEASURED_EXAMPLES, TRAINED_EXAMPLES = 64 * 800, 16_000


class Case(NamedTuple):
    """A batch size, the size of its micro-batches, and the dtype of the gradients."""

    batch_size: int
    micro_batch_size: int
    dtype: Any = jnp.float32


CASES = (
    Case(16, 8),
    Case(256, 8),
    Case(16, 8, jnp.bfloat16),
    Case(256, 8, jnp.bfloat16),
    Case(128, 64),
    Case(1024, 512),
    Case(1024, 512, jnp.bfloat16),
)


class Problem:
    """The network, its data on the device and its loss."""

    def __init__(self) -> None:
        found = data.load("fashion_mnist_10k", image_size=28)
        images = found.train.read(np.arange(len(found.train)))
        self.images = jnp.asarray((images / 255.0 - 0.286) / 0.353, jnp.float32)
        self.labels = jnp.asarray(found.train.labels)
        self.model = models.create("resnet8_patch", num_classes=10, ghost_batch_size=GHOST)
        init = jax.jit(lambda key, x: self.model.init(key, x, train=False))
        variables = init(jax.random.key(0), self.images[:1])
        self.params, self.batch_stats = variables["params"], variables["batch_stats"]

    def loss(self, params: Any, indices: jax.Array) -> jax.Array:
        """Mean cross entropy of the examples of these numbers."""
        logits, _ = self.model.apply(
            {"params": params, "batch_stats": self.batch_stats},
            self.images[indices],
            train=True,
            bn_decay=0.9,
            mutable=["batch_stats"],
        )
        labels = self.labels[indices]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def batches(self, seed: int, batch_size: int, examples: int) -> jax.Array:
        """A stream of examples in batches: their numbers, [batches, batch_size]."""
        order = pipeline.example_order(seed, len(self.labels), 0, examples)
        return jnp.asarray(order[: examples // batch_size * batch_size].reshape(-1, batch_size))

    def trained(self) -> Any:
        """The parameters after training at the base batch size."""
        tx = optax.adamw(2e-3, b2=B2, weight_decay=0.1)

        def step(carry: Any, indices: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(self.loss)(params, indices), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = self.batches(0, BASE_BATCH_SIZE, TRAINED_EXAMPLES)
        start = (self.params, tx.init(self.params))
        return jax.jit(lambda: jax.lax.scan(step, start, batches)[0][0])()


def second_moments(problem: Problem, params: Any, case: Case) -> tuple[Any, Any]:
    """Adam's second moment and the averaged noise W at weights held still, bias-corrected."""
    tx = scale_by_batch(
        optax.adam, batch_size=case.batch_size, base_batch_size=BASE_BATCH_SIZE, rule="invariant"
    )(1e-3, b2=B2)
    parts = case.batch_size // case.micro_batch_size
    gradient = value_grad_and_stats(problem.loss, microbatches=parts)
    narrow = jax.tree.map(lambda p: p.astype(case.dtype), params)

    def step(state: Any, indices: jax.Array) -> tuple[Any, None]:
        _, grads, stats = gradient(narrow, indices)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return tx.update(grads, state, params, microbatch=stats)[1], None

    batches = problem.batches(1, case.batch_size, MEASURED_EXAMPLES)
    state = jax.jit(lambda: jax.lax.scan(step, tx.init(params), batches)[0])()
    weight = 1 - B2 ** (MEASURED_EXAMPLES / BASE_BATCH_SIZE)
    nu = state.inner_state[0].nu
    (wide,) = state.variance if case.batch_size != BASE_BATCH_SIZE else (nu,)
    return jax.tree.map(lambda x: np.asarray(x) / weight, (nu, wide))


def compare(base: Any, nu: Any, wide: Any, floor: float) -> dict[str, float]:
    """Ratios of update sizes over leaves, and the share of coordinates at the floor."""
    ratios, shares, sizes = [], [], []
    for v, n, w in zip(*map(jax.tree.leaves, (base, nu, wide)), strict=True):
        seen = (v > 0) & (w > 0)
        if not seen.any():  # behind a residual branch that starts at zero
            continue
        ratios.append(np.mean(np.sqrt(v[seen] / np.maximum(n, floor * w)[seen])))
        shares.append(np.mean(n[seen] < floor * w[seen]))
        sizes.append(seen.sum())
    return {
        "mean": float(np.mean(ratios)),
        "lowest": float(min(ratios)),
        "highest": float(max(ratios)),
        "at_floor": float(np.average(shares, weights=sizes)),
        "at_floor_highest": float(max(shares)),
    }


def measure() -> list[dict[str, Any]]:
    problem = Problem()
    rows = []
    for when, params in (("at the start", problem.params), ("trained", problem.trained())):
        base, _ = second_moments(problem, params, Case(BASE_BATCH_SIZE, BASE_BATCH_SIZE))
        for case in CASES:
            nu, wide = second_moments(problem, params, case)
            for floor in FLOORS:
                found = compare(base, nu, wide, floor)
                setting = {"when": when, **case._asdict(), "dtype": jnp.dtype(case.dtype).name}
                rows.append({**setting, "floor": floor, **found})
            print(table(rows[-len(FLOORS) :], header=len(rows) == len(FLOORS)), flush=True)
    return rows


def table(rows: list[dict[str, Any]], header: bool) -> str:
    """One line a case: mean (lowest to highest leaf), share at the floor, for each floor."""
    first = rows[0]
    cells = [
        f"{r['mean']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}), {100 * r['at_floor']:.0f} %"
        for r in rows
    ]
    share = first["micro_batch_size"] / BASE_BATCH_SIZE
    name = f"{first['when']}, {first['batch_size']}, b/B0 = {share:g}, {first['dtype']}"
    lines = [
        "| weights, batch size, micro-batch, gradients | "
        + " | ".join(f"f = {r['floor']:g}" for r in rows)
        + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    return "\n".join([*(lines if header else []), f"| {name} | " + " | ".join(cells) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write the result to")
    arguments = parser.parse_args()
    rows = measure()
    if arguments.json:
        environment = _measure.environment()
        _measure.write_json(arguments.json, {"rows": rows, "environment": environment})


if __name__ == "__main__":
    main()
