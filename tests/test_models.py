"""Models: BatchNorm against flax's, ghost and shared statistics, convolutions against XLA's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bs_jax import models
from bs_jax.errors import UserError
from bs_jax.models import BatchNorm
from bs_jax.models.conv import conv_general_dilated

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(8, 3, 3, 4) * 3 + 2
START = {
    "params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)},
    "batch_stats": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)},
}


def apply(norm, x, decay=0.9, variables=START):
    passes = jax.jit(functools.partial(norm.apply, train=True, mutable=["batch_stats"]))
    return passes(variables, x, decay=decay)


def test_batch_norm_equals_flax_in_values_statistics_and_gradients():
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.7, epsilon=1e-5)
    start = jax.jit(
        lambda key, x: (
            ours.init(key, x, train=False),
            theirs.init(key, x, use_running_average=True),
        )
    )
    variables, theirs_variables = start(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, variables, START)
    got, got_stats = apply(ours, X, decay=0.7)
    theirs_apply = functools.partial(
        theirs.apply, use_running_average=False, mutable=["batch_stats"]
    )
    want, want_stats = jax.jit(theirs_apply)(theirs_variables, X)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            got_stats["batch_stats"][name], want_stats["batch_stats"][name], rtol=1e-5
        )
    weights = normal(*X.shape, seed=1)

    def ours_loss(x, params):
        y, _ = apply(ours, x, variables={**variables, "params": params})
        return jnp.sum(jnp.sin(y) * weights)

    def theirs_loss(x, params):
        y, _ = theirs_apply({**theirs_variables, "params": params}, x)
        return jnp.sum(jnp.sin(y) * weights)

    params = {"scale": np.float32([0.5, 1, 1.5, 2]), "bias": np.float32([-1, -0.3, 0.3, 1])}
    got, want = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))(X, params) for loss in (ours_loss, theirs_loss)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)


def test_ghost_groups_are_normalised_on_their_own_and_average_in_the_statistics():
    ghost = BatchNorm(ghost_batch_size=2)
    whole, stats = apply(ghost, X)
    parts = [apply(BatchNorm(), X[at : at + 2]) for at in range(0, 8, 2)]
    np.testing.assert_allclose(whole, np.concatenate([y for y, _ in parts]), atol=1e-5)
    mean = np.mean([s["batch_stats"]["mean"] for _, s in parts], axis=0)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], mean, rtol=1e-5)


def test_ghost_batches_must_divide_the_batch():
    with pytest.raises(UserError, match="3"):
        apply(BatchNorm(ghost_batch_size=3), X)


def test_the_decay_may_be_traced_and_does_not_recompile():
    norm = BatchNorm()
    traces = []

    @jax.jit
    def step(decay):
        traces.append(decay)
        return apply(norm, X, decay=decay)[1]["batch_stats"]["mean"]

    mean = np.mean(X, axis=(0, 1, 2))
    for decay in (0.0, 0.5, 0.9):
        np.testing.assert_allclose(step(decay), (1 - decay) * mean, rtol=1e-4)
    assert len(traces) == 1


def test_statistics_shared_by_devices_are_those_of_the_whole_batch():
    shared, local = BatchNorm(axis_name="batch"), BatchNorm()
    weights = normal(*X.shape, seed=1)

    def loss(norm, x, w):
        y, updated = apply(norm, x)
        return jnp.sum(jnp.sin(y) * w), (y, updated["batch_stats"])

    (_, (want, want_stats)), want_grad = jax.jit(
        jax.value_and_grad(functools.partial(loss, local), has_aux=True)
    )(X, weights)

    def device(x, w):
        def summed(x):
            value, aux = loss(shared, x, w)
            return value, aux

        (_, (y, stats)), grad = jax.value_and_grad(summed, has_aux=True)(x)
        return y, stats, grad

    split = lambda a: a.reshape(2, 4, *a.shape[1:])  # noqa: E731
    y, stats, grad = jax.pmap(device, axis_name="batch")(split(X), split(weights))
    np.testing.assert_allclose(y.reshape(X.shape), want, atol=1e-4)
    np.testing.assert_allclose(stats["var"][0], want_stats["var"], rtol=1e-4)
    np.testing.assert_allclose(grad.reshape(X.shape), want_grad, atol=1e-3)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (0, 2))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_form_of_convolution_equals_xlas(kernel, strides, padding, dtype):
    images = normal(2, 6, 5, 3).astype(dtype)
    weights = normal(kernel, kernel, 3, 4, seed=1).astype(dtype)
    numbers = ("NHWC", "HWIO", "NHWC")

    def ours(images, weights):
        return conv_general_dilated(
            images, weights, (strides, strides), padding, dimension_numbers=numbers
        )

    def xla(images, weights):
        return jax.lax.conv_general_dilated(
            images, weights, (strides, strides), padding, dimension_numbers=numbers
        )

    with_gradients = dtype == jnp.float32 and kernel == 3

    @jax.jit
    def passes(images, weights):
        gradients = (
            jax.grad(lambda i, w, f=f: jnp.sum(jnp.sin(f(i, w))), argnums=(0, 1))(images, weights)
            for f in (ours, xla)
            if with_gradients
        )
        return (ours(images, weights), xla(images, weights)), tuple(gradients)

    (got, want), gradients = jax.device_get(passes(images, weights))
    assert got.dtype == want.dtype
    tolerance = 1e-4 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(
        got.astype(np.float32), want.astype(np.float32), atol=tolerance, rtol=tolerance
    )
    if with_gradients:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)


def test_grouped_and_dilated_convolutions_are_passed_on():
    images, weights = normal(2, 6, 6, 4), normal(3, 3, 2, 4, seed=1)
    numbers = ("NHWC", "HWIO", "NHWC")
    for options in (
        {"feature_group_count": 2},
        {"feature_group_count": 2, "rhs_dilation": (2, 2)},
    ):
        settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": numbers}
        ours, xla = (
            jax.jit(functools.partial(f, **settings, **options))
            for f in (conv_general_dilated, jax.lax.conv_general_dilated)
        )
        np.testing.assert_allclose(ours(images, weights), xla(images, weights), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)]
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    model = models.create(name, num_classes=1000)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), KEY, jnp.zeros((1, 64, 64, 3))
    )
    assert models.count_parameters(shapes["params"]) == parameters


def test_bfloat16_computes_with_float32_parameters_and_statistics():
    model = models.create("resnet4_patch", num_classes=3, dtype=jnp.bfloat16)
    images = jnp.ones((2, 8, 8, 1))
    variables = jax.eval_shape(functools.partial(model.init, train=False), KEY, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    text = jax.jit(functools.partial(model.apply, train=False)).lower(variables, images).as_text()
    assert "bf16" in text
    logits = jax.eval_shape(functools.partial(model.apply, train=False), variables, images)
    assert logits.dtype == jnp.float32


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        models.create("resnet_18", num_classes=3)
