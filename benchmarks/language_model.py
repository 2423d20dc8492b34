"""How far a language model's batch may grow: rules, guards, ramps and published recipes.

Command:  python -m benchmarks.language_model --out=build/language_model.jsonl
          python -m benchmarks.language_model --out=FILE --arms=sqrt,guard:invariant --scales=4
          python -m benchmarks.language_model --tiny
Run time: a minute a run on one CPU core; all arms and sizes with eight seeds side by side in
          minutes on a GPU

It trains the model of ``examples/language_model.py`` on the same examples under every arm, at k
times the base batch size, and writes a line of JSON a run as soon as it is done. Runs that the file
has already are not trained again. Then it prints the mean difference of the validation loss from
the base's with its 95 % t interval, paired by seed. A seed sets the initial weights and the order
of the examples.

An arm is a rule of the library (``invariant``), a name in ``_language_arms.RECIPES``, or one of
these in a form:

    guard:RULE    steps grow with the batch only up to the measured noise scale
    ramp:RULE     the batch grows in given stages, up to k
    follow:RULE   the batch doubles, up to k, as the measured noise scale allows
    floor:RULE    a guard that lets steps grow by at least sqrt(k): the rule's ``guard_power``

``follow.3:RULE`` lets the batch reach .3 of the noise scale in place of the library's own share,
``floor.25:RULE`` has k^.25 for sqrt(k).
Forms combine, as in ``guard:ramp:invariant``; without ``guard`` a rule is unguarded. The arm
``order`` is the base with its examples in another order inside blocks of 128: how much order alone
moves the loss.

Several processes may share a file, each with its own ``--arms``: they trace and compile side by
side. The command that is given last, with all arms, finds all runs done and prints the table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy import special

import bs_jax
from benchmarks import _measure
from benchmarks._language_arms import (
    ADAM,
    PLAIN,
    STAGES,
    TINY,
    Arm,
    Problem,
    find_arm,
    make_optimizer,
)
from bs_jax.scaling import BatchRamp
from examples import language_model as example

CURVE_EXAMPLES = 128  # a point of the training curve is the mean over so many


class Measured(NamedTuple):
    """Averages of signal and noise in three metrics: sums of c v^-p and of w b v^-p, p = 0, 1/2, 1.

    c and w are the elementwise signal and noise of the gradient, b the examples of a micro-batch
    and v the second moment of a batch of the base size. p = 0 is the gradient noise scale of
    McCandlish et al. 2018; 1/2 is the metric Adam moves in; 1 is the one AdaptDL uses.
    """

    signal: jax.Array  # (3,)
    noise: jax.Array  # (3,)

    def noise_scale(self, metric: int) -> jax.Array:
        """Examples; infinite where no signal shows."""
        signal = self.signal[metric]
        return jnp.where(signal > 0, self.noise[metric] / jnp.where(signal > 0, signal, 1), jnp.inf)


class Carry(NamedTuple):
    """All that training hands on from one update to the next."""

    params: Any
    opt_state: Any
    second_moment: Any  # averages of v0 and of its noise part, the metric of the noise scale
    measured: Measured
    weight: jax.Array  # of the averages


def make_model(problem: Problem, key: Any) -> example.GPT:
    return example.GPT(
        width=problem.width,
        layers=problem.layers,
        vocabulary=problem.vocabulary,
        rngs=nnx.Rngs(params=key),
    )


class Trainer:
    """The programs of one problem; every one serves several seeds at once."""

    def __init__(self, problem: Problem, side_by_side: bool) -> None:
        self.problem = problem
        text = example.load_text(problem.vocabulary)
        self.digest, self.sequences = text.digest, text.train
        self.held_out = text.validation[: problem.validation]
        self.train_data, self.validation_data = jnp.asarray(text.train), jnp.asarray(self.held_out)
        self.side_by_side = side_by_side
        self.graph = nnx.split(nnx.eval_shape(lambda: make_model(problem, jax.random.key(0))))[0]

    def mean_loss(self, params: Any, sequences: jax.Array) -> jax.Array:
        return example.mean_loss(nnx.merge(self.graph, params), sequences)

    def over_seeds(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Map over the leading axis of all arguments: at once, or one after another."""
        if self.side_by_side:
            return jax.vmap(fn)
        return lambda *xs: jax.lax.map(lambda x: fn(*x), xs)

    def init_params(self, keys: jax.Array) -> Any:
        return self.over_seeds(lambda key: nnx.state(make_model(self.problem, key), nnx.Param))(
            keys
        )

    def init(self, arm: Arm, batch_size: int, params: Any) -> Carry:
        """Return what training begins with; every leaf with the seeds in front."""
        seeds = jax.tree.leaves(params)[0].shape[0]
        tx = make_optimizer(self.problem, arm, batch_size)
        zeros = jax.tree.map(jnp.zeros_like, params)
        nothing = Measured(jnp.zeros((seeds, 3)), jnp.zeros((seeds, 3)))
        # The optimizer's state is the same for every seed but where it holds the parameters.
        opt_state = jax.jit(jax.vmap(tx.init))(params)
        # The programs give away what they are given, so no array may appear in it twice.
        second_moment = zeros, jax.tree.map(jnp.copy, zeros)
        return Carry(params, opt_state, second_moment, nothing, jnp.zeros(seeds))

    def chunk(self, arm: Arm, batch_size: int, carry: Carry, order: jax.Array) -> Any:
        """Train on ``order`` (seeds, updates, batch size); give what is to be recorded."""
        problem = self.problem
        k = batch_size / problem.base_batch_size
        moves = arm.form != "fixed"
        tx = make_optimizer(problem, arm, problem.base_batch_size if moves else batch_size)
        changed = {"batch_size": batch_size} if moves else {}
        count = problem.microbatches(batch_size)
        loss_and_grad = bs_jax.value_grad_and_stats(
            self.mean_loss, microbatches=count, method="vmap" if self.side_by_side else "scan"
        )

        def update(carry: Carry, indices: jax.Array) -> tuple[Carry, Any]:
            with jax.default_matmul_precision("highest"):
                loss, grads, stats = loss_and_grad(carry.params, self.train_data[indices])
            updates, opt_state = tx.update(
                grads, carry.opt_state, carry.params, microbatch=stats, **changed
            )
            second_moment, now = measure(carry.second_moment, stats, batch_size, k)
            decay = arm.decay(k)
            measured, weight = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new,
                (carry.measured, carry.weight),
                (now, jnp.ones(())),
            )
            gain = jnp.ones(())
            if arm.gain is not None:
                gain = arm.gain(measured.noise_scale(arm.metric) / problem.base_batch_size, k)
            # AdamW's update is proportional to its learning rate, its weight decay included.
            updates = jax.tree.map(lambda u: gain * u, updates)
            params = optax.apply_updates(carry.params, updates)
            return Carry(params, opt_state, second_moment, measured, weight), (loss, now, gain)

        def one(carry: Carry, order: jax.Array) -> Any:
            carry, (loss, now, gain) = jax.lax.scan(update, carry, order)
            updates = max(1, min(CURVE_EXAMPLES, problem.chunk_examples) // batch_size)
            points = loss.reshape(-1, updates).mean(axis=1)
            means = jax.tree.map(lambda x: x.mean(axis=0), (now, gain))
            return carry, (points, *means)

        return self.over_seeds(one)(carry, order)

    def validate(self, params: Any) -> jax.Array:
        def one(params: Any) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                parts = self.validation_data.reshape(-1, 16, example.CONTEXT + 1)
                return jax.lax.map(lambda x: self.mean_loss(params, x), parts).mean()

        return self.over_seeds(one)(params)

    def order(self, arm: Arm, seed: int) -> np.ndarray:
        """The examples of a run, in order: the same for every arm of a seed."""
        draw = np.random.default_rng([seed])
        order = draw.permutation(len(self.sequences))[: self.problem.examples]
        if arm.shuffled:
            order = draw.permuted(order.reshape(-1, 128), axis=1).reshape(-1)
        return order.astype(np.int32)


def measure(second_moment: Any, stats: Any, batch_size: int, k: float) -> tuple[Any, Measured]:
    """Take one update's micro-batches into the second moment, and sum signal and noise by it."""
    n, b, b2 = stats.count, batch_size / stats.count, 0.95**k

    def signal_and_noise(mean: jax.Array, mean_square: jax.Array) -> jax.Array:
        variance = jnp.maximum(mean_square - mean**2, 0.0) / (n - 1)
        return jnp.stack([mean**2 - variance, n * variance])

    both = jax.tree.map(signal_and_noise, stats.mean, stats.mean_square)
    share = k / n  # of a micro-batch in a base batch
    v0 = jax.tree.map(lambda x: x[0] + share * x[1], both)
    noise = jax.tree.map(lambda x: share * x[1], both)
    average = functools.partial(jax.tree.map, lambda old, new: b2 * old + (1 - b2) * new)
    v, wide = average(second_moment[0], v0), average(second_moment[1], noise)

    def sums(v: jax.Array, wide: jax.Array, both: jax.Array) -> jax.Array:
        # As the library's invariant second moment: never below most of its noise part. Where v is
        # zero no gradient was seen yet, so that c and w are zero as well.
        v = jnp.maximum(jnp.maximum(v, 0.7 * wide), 1e-20)
        inverse = jax.lax.rsqrt(v)[None]
        return jnp.stack(
            [x.reshape(2, -1).sum(axis=1) for x in (both, both * inverse, both * inverse**2)]
        )

    signal, w = sum(jax.tree.leaves(jax.tree.map(sums, v, wide, both)), jnp.zeros((3, 2))).T
    return (v, wide), Measured(signal, b * w)


class Job(NamedTuple):
    """Runs of one arm at one size that are trained in one program."""

    arm: Arm
    scale: float
    seeds: tuple[int, ...]


def batch_sizes(problem: Problem, job: Job) -> set[int]:
    """All batch sizes that a job may use."""
    if job.arm.form == "fixed":
        return {round(job.scale * problem.base_batch_size)}
    return {problem.base_batch_size * 2**i for i in range(int(math.log2(job.scale)) + 1)}


def batch_size_of(problem: Problem, job: Job, chunk: int) -> int:
    """The batch size of a chunk that is known before training."""
    base, largest = problem.base_batch_size, round(job.scale * problem.base_batch_size)
    if job.arm.form == "fixed":
        return largest
    reached = [size for share, size in STAGES if chunk >= round(share * problem.chunks)]
    return min(largest, base * reached[-1])


class OutOfTime(Exception):
    """The budget ended inside a run."""


class Programs:
    """Compiles every program once, many side by side."""

    def __init__(
        self, trainer: Trainer, pool: concurrent.futures.Executor, deadline: float
    ) -> None:
        self.trainer, self.pool, self.deadline = trainer, pool, deadline
        self.futures: dict[Any, concurrent.futures.Future[Any]] = {}

    def ask(self, job: Job) -> None:
        """Have all programs of a job compiled."""
        seeds = len(job.seeds)
        self._init_params(seeds)
        for batch_size in sorted(batch_sizes(self.trainer.problem, job)):
            self._chunk(job.arm, batch_size, seeds)
        self._validate(seeds)

    def init_params(self, seeds: Sequence[int]) -> Any:
        return self._await(self._init_params(len(seeds)))(_keys(seeds))

    def chunk(self, job: Job, batch_size: int) -> Any:
        return self._await(self._chunk(job.arm, batch_size, len(job.seeds)))

    def validate(self, job: Job, params: Any) -> Any:
        return self._await(self._validate(len(job.seeds)))(params)

    def _await(self, program: concurrent.futures.Future[Any]) -> Any:
        left = self.deadline - time.time()
        try:
            return program.result(None if math.isinf(left) else max(left, 0.0))
        except TimeoutError as error:
            raise OutOfTime from error

    def _init_params(self, seeds: int) -> concurrent.futures.Future[Any]:
        return self._ask(("init", seeds), self.trainer.init_params, lambda: (_keys(range(seeds)),))

    def _chunk(self, arm: Arm, batch_size: int, seeds: int) -> concurrent.futures.Future[Any]:
        # Arms that differ only in the order of their examples have one program.
        arm = dataclasses.replace(arm, name="", shuffled=False)

        def arguments() -> Any:
            params = jax.eval_shape(self.trainer.init_params, _keys(range(seeds)))
            carry = jax.eval_shape(functools.partial(self.trainer.init, arm, batch_size), params)
            shape = (seeds, self.trainer.problem.chunk_examples // batch_size, batch_size)
            return carry, jax.ShapeDtypeStruct(shape, jnp.int32)

        fn = functools.partial(self.trainer.chunk, arm, batch_size)
        return self._ask((arm, batch_size, seeds), fn, arguments, donate_argnums=0)

    def _validate(self, seeds: int) -> concurrent.futures.Future[Any]:
        def arguments() -> Any:
            return (jax.eval_shape(self.trainer.init_params, _keys(range(seeds))),)

        return self._ask(("validate", seeds), self.trainer.validate, arguments)

    def _ask(
        self, key: Any, fn: Callable[..., Any], arguments: Callable[[], Any], **jit: Any
    ) -> Any:
        if key not in self.futures:
            self.futures[key] = self.pool.submit(
                lambda: jax.jit(fn, **jit).lower(*arguments()).compile()
            )
        return self.futures[key]


def _keys(seeds: Iterable[int]) -> jax.Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def train(trainer: Trainer, programs: Programs, job: Job) -> list[dict[str, Any]]:
    """Train the runs of a job; one row each."""
    problem = trainer.problem
    first = min(batch_sizes(problem, job))
    carry = trainer.init(job.arm, first, programs.init_params(job.seeds))
    order = np.stack([trainer.order(job.arm, seed) for seed in job.seeds])
    order = order.reshape(len(job.seeds), problem.chunks, problem.chunk_examples)
    programs.chunk(job, first)  # compiled before the clock starts
    start = time.perf_counter()
    sizes, records, ramp = [], [], None
    if job.arm.form == "follow":
        largest = max(batch_sizes(problem, job))
        share = job.arm.follow_share
        # Asked once a chunk, which is many updates: one answer is enough.
        ramp = BatchRamp(batch_size=first, largest=largest, share=share, patience=1)
    for chunk in range(problem.chunks):
        batch_size = ramp.batch_size if ramp else batch_size_of(problem, job, chunk)
        step = programs.chunk(job, batch_size)
        shape = (len(job.seeds), -1, batch_size)
        carry, record = step(carry, jnp.asarray(order[:, chunk].reshape(shape)))
        sizes.append(batch_size)
        records.append(record)
        if ramp:
            state = jax.tree.map(lambda x: x[0], carry.opt_state)  # of a single run, see jobs_of
            ramp.next_batch_size(bs_jax.noise_scale_estimate(state))
        if time.time() > programs.deadline:
            raise OutOfTime
    losses = np.asarray(programs.validate(job, carry.params))
    seconds = (time.perf_counter() - start) / len(job.seeds)
    records = jax.tree.map(lambda *xs: np.stack(xs, axis=1), *jax.device_get(records))
    points, measured, gain = records
    return [
        {
            "arm": job.arm.name,
            "k": job.scale,
            "seed": seed,
            "validation_loss": float(losses[i]),
            "updates": sum(problem.chunk_examples // size for size in sizes),
            "batch_sizes": sizes,
            "curve": _short(points[i].reshape(-1)),
            "gain": _short(gain[i]),
            "signal": _short(measured.signal[i].T),
            "noise": _short(measured.noise[i].T),
            "seconds": round(seconds, 2),
        }
        for i, seed in enumerate(job.seeds)
    ]


def _short(x: np.ndarray) -> Any:
    """Lists of numbers of five digits; what is not finite becomes null."""
    if x.ndim > 1:
        return [_short(row) for row in x]
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in x]


DEFAULT_ARMS = (
    "base,order,none,linear,sqrt,noise_aware,invariant,guard:invariant,guard:noise_aware,"
    "ramp:invariant,ramp:sqrt,guard:follow:invariant,"
    "merrill,marek,marek_sqrt,adascale,adaptdl,malladi"
)


def plan(arms: str, scales: str, problem: Problem) -> list[tuple[Arm, float]]:
    """All pairs of an arm and a size k, what decides most first."""
    found = [find_arm(name) for name in arms.split(",")]
    sizes = [float(x) for x in scales.split(",")]
    for k in sizes:
        size = k * problem.base_batch_size
        if size < 2 or size != int(size) or problem.chunk_examples % size:
            raise SystemExit(
                f"--scales={scales}: {k:g} times {problem.base_batch_size} is {size:g}, which must"
                f" be a whole number from 2 that divides {problem.chunk_examples}"
            )
    own_size = ("base", "order")
    pairs = [(arm, 1.0) for arm in found if arm.name in own_size]
    for k in sizes:
        # Neither ramps nor guards do anything to a smaller batch.
        pairs += [
            (arm, k)
            for arm in found
            if arm.name not in own_size
            and (k > 1 or (k < 1 and arm.form == "fixed" and not re.match("guard|floor", arm.name)))
        ]
    return pairs


def jobs_of(
    pairs: Sequence[tuple[Arm, float]], seeds: Sequence[int], done: set[Any], together: int
) -> list[Job]:
    """The runs that are still to be done, so many seeds in one program."""
    jobs = []
    for arm, k in pairs:
        left = [seed for seed in seeds if (arm.name, k, seed) not in done]
        # A batch that follows the noise follows that of its own run.
        most = 1 if arm.form == "follow" else together
        jobs += [Job(arm, k, tuple(left[i : i + most])) for i in range(0, len(left), most)]
    return jobs


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Validation loss minus the base's, paired by seed, by arm and k, as a Markdown table."""
    base = {row["seed"]: row["validation_loss"] for row in rows if row["arm"] == "base"}
    if not base:
        return "no run of the base yet"
    scales = sorted({row["k"] for row in rows if row["arm"] != "base"})
    values = ", ".join(f"{seed}: {loss:.4f}" for seed, loss in sorted(base.items()))
    lines = [
        f"Validation loss of the base, by seed: {values}",
        "",
        "| arm | " + " | ".join(f"k = {k:g}" for k in scales) + " | updates |",
        "| --- |" + " --- |" * (len(scales) + 1),
    ]
    for name in dict.fromkeys(row["arm"] for row in rows if row["arm"] != "base"):
        own = [row for row in rows if row["arm"] == name]
        cells = [_difference([r for r in own if r["k"] == k], base) for k in scales]
        updates = [[r["updates"] for r in own if r["k"] == k] for k in scales]
        counts = ", ".join(f"{np.mean(u):.0f}" for u in updates if u)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {counts} |")
    return "\n".join(lines)


def _difference(rows: Sequence[dict[str, Any]], base: dict[int, float]) -> str:
    found = [r["validation_loss"] - base[r["seed"]] for r in rows if r["seed"] in base]
    if not found:
        return ""
    mean, n = np.mean(found), len(found)
    if n == 1:
        return f"{mean:+.3f} (one seed)"
    half = special.stdtrit(n - 1, 0.975) * np.std(found, ddof=1) / math.sqrt(n)
    return f"{mean:+.3f} ± {half:.3f} ({n})"


def noise_table(rows: Sequence[dict[str, Any]]) -> str:
    """Noise scale of the base by tenths of the run, in the plain and in Adam's metric."""
    lines = []
    for row in (row for row in rows if row["arm"] == "base"):
        parts = min(10, len(row["gain"]))
        signal, noise = (
            [part.mean(axis=1) for part in np.array_split(np.array(row[name]), parts, axis=1)]
            for name in ("signal", "noise")
        )
        for metric, label in ((PLAIN, "plain"), (ADAM, "in Adam's metric")):
            pairs = [(c[metric], w[metric]) for c, w in zip(signal, noise, strict=True)]
            cells = " ".join(f"{w / c:.0f}" if c > 0 else "inf" for c, w in pairs)
            lines.append(f"noise scale of the base, seed {row['seed']}, {label}: {cells}")
    return "\n".join(lines)


def read(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the rows of a file, which must be of the same problem and text."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = json.loads(lines[0])
    for name in ("problem", "text"):
        if found[name] != header[name]:
            raise SystemExit(
                f"{path} holds runs of another {name}: {found[name]}, not {header[name]};"
                " give another --out"
            )
    rows = []
    for line in filter(None, lines[1:]):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that a killed process left half written
            print(f"{path}: a line is cut short; its run is trained again")
    whole = [lines[0], *map(json.dumps, rows), ""]
    if whole != lines:
        path.write_text("\n".join(whole), encoding="utf-8")
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--arms", default=DEFAULT_ARMS)
    parser.add_argument("--scales", default="4,2,0.25,8,0.5", help="sizes k, first come first")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vmap_seeds", type=int, help="seeds side by side in one program")
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help="then it ends")
    parser.add_argument("--out", type=Path, help="file of rows (.jsonl); without it none is kept")
    parser.add_argument("--tiny", action="store_true", help="a size that shows that it runs")
    parser.add_argument("--problem", default="", help="e.g. learning_rate=1e-3,layers=4")
    flags = parser.parse_args(arguments)

    deadline = time.time() + 60 * flags.budget_minutes
    accelerator = jax.default_backend() != "cpu"
    flags.vmap_seeds = flags.vmap_seeds or (16 if accelerator else 1)
    problem = _changed(TINY if flags.tiny else Problem(), flags.problem)
    pairs = plan(flags.arms, flags.scales, problem)
    trainer = Trainer(problem, side_by_side=flags.vmap_seeds > 1)
    header = {
        "problem": dataclasses.asdict(problem),
        "text": trainer.digest,
        "environment": _measure.environment(),
    }
    rows = read(flags.out, header) if flags.out else []
    done = {(row["arm"], row["k"], row["seed"]) for row in rows}
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    jobs = jobs_of(pairs, seeds, done, flags.vmap_seeds)
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), flags.out.open("x", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
    print(
        f"{sum(len(job.seeds) for job in jobs)} runs to train, {len(rows)} done before", flush=True
    )

    pool = concurrent.futures.ThreadPoolExecutor(_cores())
    programs = Programs(trainer, pool, deadline)
    for job in jobs:
        programs.ask(job)
    try:
        for job in jobs:
            for row in train(trainer, programs, job):
                rows.append(row)
                if flags.out:
                    with flags.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                print(
                    f"{row['arm']:20} k {row['k']:<5g} seed {row['seed']:<3} validation loss"
                    f" {row['validation_loss']:.4f} after {row['updates']} updates,"
                    f" {row['seconds']:.1f} s",
                    flush=True,
                )
    except OutOfTime:
        print("the budget is used up; the same command goes on from here")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"\n{table(rows)}\n\n{noise_table(rows)}")
    return rows


def _changed(problem: Problem, changes: str) -> Problem:
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        kind = type(getattr(problem, name, None))
        if kind not in (int, float):
            raise SystemExit(f"--problem={changes}: no field {name!r} in {problem}")
        problem = dataclasses.replace(problem, **{name: kind(value)})
    return problem


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
