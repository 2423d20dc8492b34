"""Small parameters, gradients and training loops shared by the tests of the transformation."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bs_jax import scaling

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
RECIPE = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}


def gradients(steps, seed=0, dtype=jnp.float32):
    """PARAMS and noise, an array of ``steps`` gradients a leaf; NumPy's, which compiles nothing."""
    rng = np.random.default_rng(seed + 1)
    return jax.tree.map(
        lambda p: np.asarray(p + rng.standard_normal((steps, *p.shape)), dtype),
        jax.device_get(PARAMS),
    )


def train(tx, grads, params=PARAMS, extra=None):
    """Return parameters and state after one update per gradient, in one scan."""

    def step(carry, xs):
        params, state = carry
        grad, kwargs = xs
        updates, state = tx.update(grad, state, params, **kwargs)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.jit(lambda p, g, e: jax.lax.scan(step, (p, tx.init(p)), (g, e)))(
        params, grads, {} if extra is None else extra
    )
    return params, state, updates


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def scan(tx, grads):
    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)[0][0]


def functions_run(call):
    """Return (file, name) of every function of bs_jax.scaling that a call goes into, in order.

    Lambdas and comprehensions are read where they stand, so they do not count.
    """
    folder, walk = str(Path(scaling.__file__).parent), []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder) and code.co_name[0] != "<":
            walk.append((Path(code.co_filename).name, code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return walk
