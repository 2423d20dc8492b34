"""What scale_by_batch costs: a train step against the same step with plain optax.

Command:  python -m benchmarks.transform_overhead --json=docs/results/transform_overhead.json
Run time: four minutes on two CPU cores

Every program is one AdamW step (forward, backward, update; state donated) of a ResNet-18 on the
same random images, and they take turns. --model=gpt: of the transformer of
``examples/language_model.py`` on random tokens. --steps=20: so many steps in one program, for a
card, where one step by itself would time the host that launches it.

    plain                  optax.adamw on the gradient of the whole batch
    static                 the same with scale_by_batch: constant batch size and hyperparameters
    dynamic                the same with the batch size a traced argument of update
    plain, accumulated     optax.adamw on a gradient summed over n micro-batches in a scan
    noise_aware            the same n micro-batches, whose statistics give the noise scale
    invariant              the same, whose statistics give the second moment and hold the steps
                           back above the noise scale (its guard)
    invariant, unguarded   the same without the guard

The first three are compared with the first, the others with the fourth (and with the first).
With --devices=2 a batch is spread over devices by pmap, which are the micro-batches: the baseline
averages gradients over them, the others the squares as well.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bs_jax
from benchmarks import _measure
from bs_jax import models
from examples import language_model

BASE_BATCH_SIZE = 16
RECIPE = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
AXIS = "devices"


class Case(NamedTuple):
    """One program: the optimizer's kind, whether the batch is split, and whether guarded."""

    kind: str
    split: bool
    guard: bool | None = None


CASES = {
    "plain": Case("plain", False),
    "static": Case("static", False),
    "dynamic": Case("dynamic", False),
    "plain, accumulated": Case("plain", True),
    "noise_aware": Case("noise_aware", True),
    "invariant": Case("invariant", True),
    "invariant, unguarded": Case("invariant", True, guard=False),
}


class Problem:
    """A model with its loss, a batch, and the starting point of every program."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.batch_size = arguments.batch_size
        self.microbatches = arguments.microbatches
        self.devices = arguments.devices
        self.steps = arguments.steps
        if arguments.model == "gpt":
            self._make_gpt()
            return
        self.model = models.create(arguments.model, num_classes=10)
        draw = np.random.default_rng(0)
        shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
        self.batch = {
            "images": jnp.asarray(draw.standard_normal(shape), jnp.float32),
            "labels": jnp.asarray(draw.integers(0, 10, arguments.batch_size), jnp.int32),
        }
        init = jax.jit(functools.partial(self.model.init, train=False))
        self.variables = init(jax.random.key(0), self.batch["images"][:1])

    def _make_gpt(self) -> None:
        graph, params = nnx.split(language_model.GPT(rngs=nnx.Rngs(0)))
        shape = (self.batch_size, language_model.CONTEXT + 1)
        tokens = np.random.default_rng(0).integers(0, language_model.VOCABULARY, shape)
        self.batch = {"tokens": jnp.asarray(tokens, jnp.int32)}
        self.variables = {"params": params, "batch_stats": {}}
        self.graph = graph

    def loss(self, params: Any, batch: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        """Mean cross entropy and the new running statistics."""
        if "tokens" in batch:
            model = nnx.merge(self.graph, params)
            return language_model.mean_loss(model, batch["tokens"]), batch_stats
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["images"],
            train=True,
            bn_decay=0.9,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses), updated["batch_stats"]

    def gradient(self, case: Case) -> Callable[..., Any]:
        """(params, batch, batch_stats) -> (loss, batch_stats), gradient[, statistics]."""
        axis = AXIS if self.devices > 1 else None
        whole = jax.value_and_grad(self.loss, has_aux=True)
        if case.kind in ("noise_aware", "invariant"):
            return bs_jax.value_grad_and_stats(
                self.loss, microbatches=self.microbatches, axis_name=axis, has_aux=True
            )
        if not case.split:
            return whole

        def accumulated(params: Any, batch: Any, batch_stats: Any) -> Any:
            """What one writes by hand: summed in a scan, averaged over devices."""
            n = self.microbatches
            if n == 1:
                return jax.lax.pmean(whole(params, batch, batch_stats), axis)
            parts = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
            shapes = jax.eval_shape(whole, params, jax.tree.map(lambda x: x[0], parts), batch_stats)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, whole(params, part, batch_stats)), None

            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, parts)
            mean = jax.tree.map(lambda x: x / n, total)
            return mean if axis is None else jax.lax.pmean(mean, axis)

        return accumulated


def make_optimizer(case: Case, batch_size: int) -> optax.GradientTransformationExtraArgs:
    sizes = {"batch_size": batch_size, "base_batch_size": BASE_BATCH_SIZE}
    if case.kind == "plain":
        by_hand = bs_jax.scale_hyperparams("adamw", RECIPE, **sizes, rule="linear")
        return optax.with_extra_args_support(optax.adamw(**by_hand))
    rule = "linear" if case.kind in ("static", "dynamic") else case.kind
    return bs_jax.scale_by_batch(optax.adamw, **sizes, rule=rule, guard=case.guard)(**RECIPE)


def program(problem: Problem, case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(state, batch, batch size) -> (state, loss) over `problem.steps` steps, and its arguments."""
    tx = make_optimizer(case, problem.batch_size)
    gradient = problem.gradient(case)

    def step(state: Any, batch: Any, batch_size: Any) -> Any:
        params, batch_stats, opt_state = state
        (loss, batch_stats), grads, *stats = gradient(params, batch, batch_stats)
        extra = {"microbatch": stats[0]} if stats else {}
        if case.kind == "dynamic":
            extra["batch_size"] = batch_size
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    def steps(state: Any, batch: Any, batch_size: Any) -> Any:
        def body(state: Any, _: Any) -> Any:
            return step(state, batch, batch_size)

        state, losses = jax.lax.scan(body, state, length=problem.steps)
        return state, losses[-1]

    params, batch_stats = problem.variables["params"], problem.variables["batch_stats"]
    state = jax.tree.map(jnp.copy, (params, batch_stats, tx.init(params)))
    batch = problem.batch
    if problem.devices > 1:
        batch = jax.tree.map(lambda x: x.reshape(problem.devices, -1, *x.shape[1:]), batch)
    arguments = (state, batch, jnp.int32(problem.batch_size))
    return step if problem.steps == 1 else steps, arguments


def make_step(problem: Problem, case: Case) -> Callable[[], Any]:
    """A compiled call that takes steps from its own last state each time it is called."""
    call, (state, *others) = program(problem, case)
    if problem.devices > 1:
        compiled = jax.pmap(
            call, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,)
        )
    else:
        compiled = jax.jit(call, donate_argnums=(0,))

    def run() -> Any:
        nonlocal state
        state, loss = compiled(state, *others)
        return loss

    return run


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    problem = Problem(arguments)
    cases = CASES if arguments.devices == 1 else {n: c for n, c in CASES.items() if c.split}
    times = _measure.interleave(
        {name: make_step(problem, case) for name, case in cases.items()}, rounds=arguments.rounds
    )
    results: dict[str, Any] = {}
    for against in ("plain", "plain, accumulated", "invariant, unguarded"):
        if against in cases:
            results[f"against {against}"] = _measure.summary(times, against)
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    return {"settings": settings, "results": results}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write the result to")
    parser.add_argument("--model", default="resnet18", help="or gpt")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="examples")
    parser.add_argument("--microbatches", type=int, default=2, help="on each device")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="in one program")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    if arguments.devices > 1 and jax.config.values["jax_platforms"] == "cpu":
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    found = measure(arguments)
    for against, rows in found["results"].items():
        print(f"{against}\n\n{_measure.table(rows)}\n")
    if arguments.json:
        _measure.write_json(arguments.json, {**found, "environment": _measure.environment()})


if __name__ == "__main__":
    main()
