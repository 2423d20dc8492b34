"""flax linen with a TrainState: one line differs, since the statistics must reach the optimizer.

python examples/train_state.py
"""

from __future__ import annotations

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import bs_jax


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))[:, 0]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    flags = parser.parse_args(arguments)

    net = Net()
    state = TrainState.create(
        apply_fn=net.apply,
        params=net.init(jax.random.key(0), jnp.zeros((1, 8)))["params"],
        tx=bs_jax.scale_by_batch(optax.adamw, batch_size=128, base_batch_size=32)(3e-3, b2=0.99),
    )

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(net.apply({"params": params}, x) - y))

    loss_and_grad = bs_jax.value_grad_and_stats(loss_fn, microbatches=4)

    @jax.jit
    def update(state, batch):
        loss, grads, stats = loss_and_grad(state.params, batch)
        # In place of state.apply_gradients(grads=grads), which would hand no statistics on.
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, microbatch=stats)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    losses = []
    for step in range(flags.updates):
        x = jax.random.normal(jax.random.key(step), (128, 8))
        state, loss = update(state, (x, x[:, 0] * x[:, 1]))
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("in force:", bs_jax.hyperparams(state, as_floats=True))
    return losses


if __name__ == "__main__":
    main()
