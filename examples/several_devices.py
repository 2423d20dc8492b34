"""Several devices with jit and NamedSharding: the batch is sharded, nothing else changes.

python examples/several_devices.py
XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/several_devices.py
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bs_jax

BATCH_SIZE, BASE_BATCH_SIZE = 256, 64


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(jnp.tanh(x @ params["first"]) @ params["last"] - y))


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    flags = parser.parse_args(arguments)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, over_devices = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",))
    )
    tx = bs_jax.scale_by_batch(optax.adamw, batch_size=BATCH_SIZE, base_batch_size=BASE_BATCH_SIZE)(
        3e-3, b2=0.99
    )
    # interleave: every part lies on all devices, so that each of them computes its share.
    loss_and_grad = bs_jax.value_grad_and_stats(loss_fn, microbatches=2, interleave=True)

    @jax.jit
    def update(params, opt_state, batch):
        loss, grads, stats = loss_and_grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, microbatch=stats)
        return optax.apply_updates(params, updates), opt_state, loss

    first, last = (jax.random.normal(jax.random.key(i), shape) for i, shape in
                   enumerate(((8, 32), (32,))))  # fmt: skip
    params = jax.device_put({"first": first / 3, "last": last / 6}, replicated)
    opt_state = jax.device_put(tx.init(params), replicated)
    losses = []
    for step in range(flags.updates):
        x = jax.random.normal(jax.random.key(step), (BATCH_SIZE, 8))
        batch = jax.device_put((x, jnp.sin(x[:, 0])), over_devices)
        params, opt_state, loss = update(params, opt_state, batch)
        losses.append(float(loss))
    print(f"{jax.device_count()} devices: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
