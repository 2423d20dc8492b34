"""Micro-batches that arrive one at a time, with padding: each counts by its valid tokens.

python examples/accumulate_from_loader.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bs_jax

MICRO_BATCH_SIZE, PARTS, BASE_BATCH_SIZE = 16, 4, 32  # so one update has 64 sequences


def loader(updates: int) -> Iterator[dict[str, np.ndarray]]:
    """Sequences of unequal length, padded, with a mask: (MICRO_BATCH_SIZE, 12)."""
    numbers = np.random.default_rng(0)
    for _ in range(updates * PARTS):
        x = numbers.normal(size=(MICRO_BATCH_SIZE, 12, 4)).astype(np.float32)
        lengths = numbers.integers(3, 13, size=(MICRO_BATCH_SIZE, 1))
        yield {"x": x, "y": x.sum(axis=-1), "mask": (np.arange(12) < lengths).astype(np.float32)}


def loss_fn(params, batch):
    """A mean over the valid tokens of one micro-batch."""
    errors = jnp.square(batch["x"] @ params["w"] - batch["y"])
    return jnp.sum(batch["mask"] * errors) / jnp.sum(batch["mask"])


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    flags = parser.parse_args(arguments)

    tx = bs_jax.scale_by_batch(
        optax.adamw, batch_size=MICRO_BATCH_SIZE * PARTS, base_batch_size=BASE_BATCH_SIZE
    )(3e-2, b2=0.99)

    @jax.jit
    def gather(gathered, params, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return gathered.add(grads, weight=jnp.sum(batch["mask"])), loss

    @jax.jit
    def update(gathered, params, opt_state):
        grads, stats = gathered.result(params)
        updates, opt_state = tx.update(grads, opt_state, params, microbatch=stats)
        return optax.apply_updates(params, updates), opt_state

    params = {"w": jnp.zeros(4)}
    opt_state, losses, batches = tx.init(params), [], loader(flags.updates)
    for _ in range(flags.updates):
        gathered = bs_jax.GradientAccumulator.zeros_like(params)
        for _ in range(PARTS):
            gathered, loss = gather(gathered, params, next(batches))
            losses.append(float(loss))
        params, opt_state = update(gathered, params, opt_state)
    print(f"{flags.updates} updates of {PARTS} parts: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
