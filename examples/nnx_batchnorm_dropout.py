"""flax nnx with BatchNorm and Dropout: the module itself goes into the loss.

    python examples/nnx_batchnorm_dropout.py

``value_grad_and_stats`` splits the batch, gives each part its own dropout masks, and keeps the
module's running statistics and random counters up to date.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bs_jax

BATCH_SIZE, BASE_BATCH_SIZE = 128, 32


class Net(nnx.Module):
    """Two layers with everything that keeps a state."""

    def __init__(self, rngs: nnx.Rngs, bn_momentum: float):
        self.first = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=bn_momentum, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))[:, 0]


def loss_fn(model: Net, batch) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.square(model(x) - y))


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    flags = parser.parse_args(arguments)

    # BatchNorm normalises a micro-batch: 32 examples together, as at the base batch size. Its
    # running statistics move once an update, so their decay follows the batch size too.
    scaled = bs_jax.scale_hyperparams(
        optax.adamw,
        {"bn_decay": 0.9},
        batch_size=BATCH_SIZE,
        base_batch_size=BASE_BATCH_SIZE,
        rule="invariant",
        roles={"bn_decay": "decay"},
    )
    model = Net(nnx.Rngs(0), bn_momentum=scaled["bn_decay"])
    tx = bs_jax.scale_by_batch(optax.adamw, batch_size=BATCH_SIZE, base_batch_size=BASE_BATCH_SIZE)(
        3e-3, b2=0.99
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    parts = BATCH_SIZE // BASE_BATCH_SIZE
    loss_and_grad = bs_jax.value_grad_and_stats(loss_fn, microbatches=parts)

    @nnx.jit
    def update(model, optimizer, batch):
        loss, grads, stats = loss_and_grad(model, batch)
        optimizer.update(model, grads, microbatch=stats)
        return loss

    losses = []
    for step in range(flags.updates):
        x = jax.random.normal(jax.random.key(step), (BATCH_SIZE, 8))
        losses.append(float(update(model, optimizer, (x, x[:, 0] * x[:, 1]))))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("in force:", bs_jax.hyperparams(optimizer, as_floats=True))
    return losses


if __name__ == "__main__":
    main()
