"""An optax loop at another batch size, and what it says about its noise.

    python examples/plain_optax.py
    python examples/plain_optax.py --batch_size=1024

Logistic regression on made-up data. The recipe was tuned at 64 examples an update.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import optax

import bs_jax

BASE_BATCH_SIZE, EXAMPLES = 64, 16_384


def loss_fn(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.sigmoid_binary_cross_entropy(logits, batch["y"]).mean()


def make_data(examples: int):
    x = jax.random.normal(jax.random.key(0), (examples, 32))
    noise = jax.random.normal(jax.random.key(1), (examples,))
    return {"x": x, "y": (x[:, 0] + 0.5 * x[:, 1] + noise > 0).astype(jnp.float32)}


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=256, help="examples in an update")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="to train on")
    flags = parser.parse_args(arguments)

    # The schedule as it was written: in updates of the base batch size.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1e-2, warmup_steps=16, decay_steps=EXAMPLES // BASE_BATCH_SIZE
    )
    tx = bs_jax.scale_by_batch(
        optax.adamw, batch_size=flags.batch_size, base_batch_size=BASE_BATCH_SIZE
    )(schedule, b1=0.9, b2=0.99, weight_decay=0.1)
    loss_and_grad = bs_jax.value_grad_and_stats(loss_fn, microbatches=4)

    @jax.jit
    def update(params, opt_state, batch):
        loss, grads, stats = loss_and_grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, microbatch=stats)
        return optax.apply_updates(params, updates), opt_state, loss

    data = make_data(flags.examples)
    params = {"w": jnp.zeros(32), "b": jnp.zeros(())}
    opt_state, losses = tx.init(params), []
    for start in range(0, flags.examples, flags.batch_size):
        batch = jax.tree.map(lambda x, at=start: x[at : at + flags.batch_size], data)
        params, opt_state, loss = update(params, opt_state, batch)
        losses.append(float(loss))
    print(f"{len(losses)} updates of {flags.batch_size}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("in force:", json.dumps(bs_jax.hyperparams(opt_state, as_floats=True)))
    scale = bs_jax.noise_scale_estimate(opt_state)
    if scale is not None:  # None: an optimizer that keeps no statistics
        print(f"noise scale {scale.noise_scale:.0f} examples ({scale.low:.0f} to {scale.high:.0f})")
    return losses


if __name__ == "__main__":
    main()
