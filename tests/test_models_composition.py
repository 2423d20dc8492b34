"""Models under vmap, scan, groups and odd shapes: what the trainer builds on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bs_jax import models
from bs_jax.errors import UserError
from bs_jax.models import BatchNorm
from bs_jax.models.normalization import normalise

KEY = jax.random.key(0)


def plain_normalise(x, scale, bias, epsilon=1e-3):
    mean = jnp.mean(x, axis=1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + epsilon) * scale[None, None] + bias[None, None]


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((1, 3, 1), 0.0), ((2, 20, 3), 30.0), ((3, 8, 80), 0.0), ((2, 49, 3), 0.0)],
)
def test_the_written_backward_pass_is_autodiffs(shape, offset):
    keys = jax.random.split(KEY, 4)
    x = offset + jax.random.normal(keys[0], shape)
    scale, bias = jax.random.normal(keys[1], shape[2:]), jax.random.normal(keys[2], shape[2:])
    slopes = jax.random.normal(keys[3], shape)

    @functools.partial(jax.jit, static_argnums=0)
    def passes(function, x, scale, bias):
        y, pullback = jax.vjp(function, x, scale, bias)
        return y, *pullback(slopes)

    ours = passes(lambda *a: normalise(*a, epsilon=1e-3)[0], x, scale, bias)
    for got, want in zip(ours, passes(plain_normalise, x, scale, bias), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4 * (1 + jnp.abs(want).max()))


def test_variance_survives_a_mean_far_from_zero():
    x = 1000.0 + jnp.array([[[-1.0], [1.0], [-1.0], [1.0]]])
    y, _, var = normalise(x, jnp.ones(1), jnp.zeros(1), epsilon=0.0)
    np.testing.assert_allclose(var, [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(y[0, :, 0], [-1, 1, -1, 1], atol=1e-3)


def test_bfloat16_gradients_keep_the_images_dtype_and_the_parameters_float32():
    x = jax.random.normal(KEY, (2, 8, 4)).astype(jnp.bfloat16)

    def loss(x, scale, bias):
        y, mean, var = normalise(x, scale, bias, epsilon=1e-5, dtype=jnp.bfloat16)
        assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
        return jnp.sum(y.astype(jnp.float32) ** 3)

    dtypes = [g.dtype for g in jax.grad(loss, argnums=(0, 1, 2))(x, jnp.ones(4), jnp.zeros(4))]
    assert dtypes == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_ghost_and_shared_statistics_exclude_each_other():
    norm = BatchNorm(ghost_batch_size=2, axis_name="batch")
    with pytest.raises(UserError, match=r"ghost_batch_size 2 .* 'batch'"):
        norm.init(KEY, jnp.ones((4, 3)), train=True)


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


def test_runs_advance_together_as_they_do_one_by_one():
    images = jax.random.normal(KEY, (2, 4, 8, 8, 1))
    decays = jnp.array([0.5, 0.9])
    init = functools.partial(tiny().init, train=False)
    variables = jax.jit(jax.vmap(init, in_axes=(0, None)))(jax.random.split(KEY, 2), images[0])
    together = jax.jit(jax.vmap(loss_and_gradient))(variables, images, decays)
    alone = jax.jit(loss_and_gradient)
    for run in range(2):
        one = alone(jax.tree.map(lambda a, run=run: a[run], variables), images[run], decays[run])
        jax.tree.map(
            lambda got, want, run=run: np.testing.assert_allclose(got[run], want, atol=1e-4),
            together,
            one,
        )


def test_statistics_of_micro_batches_average_to_those_of_the_batch():
    images = jax.random.normal(KEY, (4, 8, 8, 1))
    variables = jax.jit(functools.partial(tiny().init, train=False))(KEY, images)
    (_, whole), gradient = jax.jit(loss_and_gradient)(variables, images, 0.9)
    (_, parts), gradients = jax.lax.map(
        lambda part: loss_and_gradient(variables, part, 0.9), images.reshape(2, 2, 8, 8, 1)
    )
    np.testing.assert_allclose(
        jnp.mean(parts["stem_norm"]["mean"], axis=0), whole["stem_norm"]["mean"], atol=1e-6
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(jnp.sum(got, axis=0), want, atol=1e-4),
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
    params = jax.jit(functools.partial(tiny().init, train=False))(KEY, jnp.ones((2, 8, 8, 1)))
    scales = {n: p["scale"] for n, p in params["params"]["stage1_block1"].items() if "scale" in p}
    assert sorted(float(jnp.max(s)) for s in scales.values()) == [0.0, 1.0]
