"""A training loop of a user's own, where pip installed bs_jax with JAX, optax and NumPy alone."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

import bs_jax
from bs_jax.errors import UserError

for name in ("flax", "matplotlib", "ml_collections", "orbax", "pyarrow"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: this is no core installation"


def loss_fn(params, batch):
    return jnp.mean(jnp.square(batch @ params["w"] - batch.sum(axis=1)))


def make_optimizer(batch_size, base_batch_size):
    return bs_jax.scale_by_batch(
        optax.adamw, batch_size=batch_size, base_batch_size=base_batch_size, rule="invariant"
    )(learning_rate=optax.cosine_decay_schedule(1e-2, 2048), b1=0.9, b2=0.99, weight_decay=0.1)


data = jax.random.normal(jax.random.key(0), (4096, 8))
params = {"w": jnp.zeros(8)}
tx = make_optimizer(512, 64)
loss_and_grad = jax.jit(bs_jax.value_grad_and_stats(loss_fn, microbatches=8))
opt_state = tx.init(params)
losses = []
for batch in data.reshape(8, 512, 8):
    loss, grads, stats = loss_and_grad(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, microbatch=stats)
    params = optax.apply_updates(params, updates)
    losses.append(float(loss))
assert losses[-1] < losses[0], losses
print("in force:", bs_jax.hyperparams(opt_state))

recipe = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
print(
    bs_jax.explain(optax.adamw, batch_size=512, base_batch_size=64, rule="sqrt", **recipe).to_text()
)
check = bs_jax.invariance_check(
    loss_fn,
    params,
    data,
    make_optimizer,
    batch_sizes=[128],
    base_batch_size=64,
    train_examples=2048,
)
print(check.to_text())
try:
    check.plot("unwritten.png")
    told = "a picture without matplotlib"
except UserError as error:
    told = str(error)
assert "pip install matplotlib" in told, told

flags = "--optimizer=adamw --learning_rate=1e-3 --base_batch_size=64 --batch_size=512 --format=json"
told = subprocess.run(
    [sys.executable, "-m", "bs_jax.scaling", *flags.split()], check=True, capture_output=True
)
json.loads(told.stdout)
print("the library works with JAX, optax and NumPy alone")
