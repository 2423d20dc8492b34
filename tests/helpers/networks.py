"""Variables of a network that are quick to make: its initialisation is traced, never compiled."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, images_shape, rng, **mode):
    """Nothing hides behind a zero: scales, biases, gamma and the statistics are random too."""

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = path[-1].key
        if name in ("scale", "var"):
            value = np.exp(0.3 * noise)
        elif name in ("bias", "mean"):
            value = 0.1 * noise
        elif name == "gamma":
            value = np.full(leaf.shape, 2e-3)
        elif name == "kernel":
            value = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:  # the vectors of the power iteration
            value = noise / np.linalg.norm(noise)
        return value.astype(np.float32)

    images = jnp.zeros(images_shape)
    shapes = jax.eval_shape(lambda key: model.init(key, images, **mode), jax.random.key(0))
    return jax.tree.map_with_path(draw, shapes)
