"""Models under vmap, scan, groups and odd shapes: what the trainer builds on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import random_variables

from bs_jax import models
from bs_jax.errors import UserError
from bs_jax.models import BatchNorm
from bs_jax.models.normalization import normalise

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_normalise(x, scale, bias, epsilon=1e-3):
    mean = jnp.mean(x, axis=1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + epsilon) * scale[None, None] + bias[None, None]


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((1, 3, 1), 0.0), ((2, 20, 3), 30.0), ((3, 8, 80), 0.0), ((2, 49, 3), 0.0)],
)
def test_the_written_backward_pass_is_autodiffs(shape, offset):
    x, scale, bias = offset + normal(*shape), normal(*shape[2:], seed=1), normal(*shape[2:], seed=2)
    slopes = normal(*shape, seed=3)

    @jax.jit
    def passes(*arguments):
        results = []
        for function in (lambda *a: normalise(*a, epsilon=1e-3)[0], plain_normalise):
            y, pullback = jax.vjp(function, *arguments)
            results.append((y, *pullback(slopes)))
        return results

    for got, want in zip(*passes(x, scale, bias), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4 * (1 + np.abs(want).max()))


def test_variance_survives_a_mean_far_from_zero():
    x = np.float32([[[999.0], [1001.0], [999.0], [1001.0]]])
    whole = jax.jit(functools.partial(normalise, epsilon=0.0))
    y, _, var = whole(x, np.ones(1, np.float32), np.zeros(1, np.float32))
    np.testing.assert_allclose(var, [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(y[0, :, 0], [-1, 1, -1, 1], atol=1e-3)


def test_bfloat16_gradients_keep_the_images_dtype_and_the_parameters_float32():
    x = jnp.zeros((2, 8, 4), jnp.bfloat16)

    def loss(x, scale, bias):
        y, mean, var = normalise(x, scale, bias, epsilon=1e-5, dtype=jnp.bfloat16)
        assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
        return jnp.sum(y.astype(jnp.float32) ** 3)

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), x, jnp.ones(4), jnp.zeros(4))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_ghost_and_shared_statistics_exclude_each_other():
    norm = BatchNorm(ghost_batch_size=2, axis_name="batch")
    with pytest.raises(UserError, match=r"ghost_batch_size 2 .* 'batch'"):
        norm.init(KEY, np.ones((4, 3)), train=True)


def test_a_ghost_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(UserError, match="3 does not divide a batch of 8 examples; use 2 or 8"):
        BatchNorm(ghost_batch_size=3).init(KEY, jnp.ones((8, 3)), train=True)


def tiny():
    return models.create("resnet4_patch", num_classes=3, ghost_batch_size=2)


def loss_and_gradient(variables, images, decay):
    def loss(params):
        logits, updated = tiny().apply(
            {**variables, "params": params},
            images,
            train=True,
            bn_decay=decay,
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.sin(logits)), updated["batch_stats"]

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def variables_of(*images_shape, seed=0):
    return random_variables(tiny(), images_shape, np.random.default_rng(seed), train=False)


def test_runs_advance_together_as_they_do_one_by_one():
    images, decays = normal(2, 4, 8, 8, 1), np.float32([0.5, 0.9])
    runs = [variables_of(1, 8, 8, 1, seed=run) for run in range(2)]
    variables = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    together = jax.jit(jax.vmap(loss_and_gradient))(variables, images, decays)
    alone = jax.jit(loss_and_gradient)
    for run in range(2):
        one = alone(runs[run], images[run], decays[run])
        jax.tree.map(
            lambda got, want, run=run: np.testing.assert_allclose(got[run], want, atol=1e-4),
            together,
            one,
        )


def test_statistics_of_micro_batches_average_to_those_of_the_batch():
    images = normal(4, 8, 8, 1)
    variables = variables_of(*images.shape)

    @jax.jit
    def whole_and_in_parts(images):
        one = lambda part: loss_and_gradient(variables, part, 0.9)  # noqa: E731
        return one(images), jax.lax.map(one, images.reshape(2, 2, 8, 8, 1))

    ((_, whole), gradient), ((_, parts), gradients) = whole_and_in_parts(images)
    np.testing.assert_allclose(
        np.mean(parts["stem_norm"]["mean"], axis=0), whole["stem_norm"]["mean"], atol=1e-6
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(np.sum(got, axis=0), want, atol=1e-4),
        gradients,
        gradient,
    )


def test_residual_branches_start_at_zero():
    variables = jax.eval_shape(
        functools.partial(models.create("resnet20", num_classes=3).init, train=False),
        KEY,
        jnp.zeros((1, 32, 32, 3)),
    )
    blocks = [name for name in variables["params"] if "block" in name]
    assert len(blocks) == 9

    @jax.jit
    def scales(key, images):
        block = tiny().init(key, images, train=False)["params"]["stage1_block1"]
        return [part["scale"] for part in block.values() if "scale" in part]

    found = scales(KEY, np.ones((2, 8, 8, 1), np.float32))
    assert sorted(float(np.max(scale)) for scale in found) == [0.0, 1.0]
