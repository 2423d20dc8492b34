"""The forms that a network's layers may take agree with the plain ones in values and gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import random_variables

from bs_jax.models import conv, initializers, layer_forms, pooling
from bs_jax.models.activations import MISH, RELU, Activation
from bs_jax.models.normalization import BatchNorm, normalise
from bs_jax.models.xresnet import XResNet

ALL = layer_forms.LayerForms(*(True for _ in dataclasses.fields(layer_forms.LayerForms)))
ONE_PASS = layer_forms.LayerForms(one_pass_statistics=True, sums_by_rows=True)
X = np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype(np.float32)


class Norm(nn.Module):
    """Ghost batches of two, behind them an activation."""

    activation: Activation

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(ghost_batch_size=2, activation=self.activation)
        return norm(x, train=True, decay=0.5)


class Pointwise(nn.Module):
    """A 1x1 convolution."""

    @nn.compact
    def __call__(self, x):
        return conv.conv(5, 1, kernel_init=initializers.he_normal("fan_in"))(x)


class Pool(nn.Module):
    """The stem's max pool."""

    @nn.compact
    def __call__(self, x):
        return pooling.max_pool(x, 3, 2, padding=1)


def passes(module, chosen):
    """Output, new statistics, and gradients of variables and input, of a module in some form."""
    variables = random_variables(module, X.shape, np.random.default_rng(0))
    with layer_forms.use(chosen):

        def loss(params, x):
            held = {**variables, "params": params}
            y, updated = module.apply(held, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updated)

        params = variables.get("params", {})
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, X)


MODULES = {"mish": Norm(MISH), "relu": Norm(RELU), "1x1": Pointwise(), "pool": Pool()}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_every_form_gives_the_plain_values_and_gradients(module):
    plain, other = passes(module, layer_forms.LayerForms()), passes(module, ALL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), plain, other)


def test_statistics_of_one_pass_keep_their_digits_far_from_zero():
    """E[x^2] - E[x]^2 in float32 is off by units here, about a value of the group it is not."""
    x = (1e4 + np.random.default_rng(1).standard_normal((2, 4096, 1))).astype(np.float32)
    with layer_forms.use(ONE_PASS):
        _, mean, var = jax.jit(functools.partial(normalise, epsilon=0.0))(
            x, np.ones(1), np.zeros(1)
        )
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(1), rtol=1e-7)
    np.testing.assert_allclose(var, x.astype(np.float64).var(1), rtol=1e-4)
    naive = np.mean(np.square(x), axis=1) - np.square(np.mean(x, axis=1))
    assert np.max(np.abs(naive - x.astype(np.float64).var(1))) > 0.1


@pytest.mark.parametrize("form", [layer_forms.LayerForms(), ALL], ids=["plain", "all"])
def test_a_second_derivative_goes_through_mean_and_variance(form):
    x, tangent = np.random.default_rng(3).standard_normal((2, 2, 16, 3)).astype(np.float32)

    def by_autodiff(x):
        mean, var = jnp.mean(x, 1, keepdims=True), jnp.var(x, 1, keepdims=True)
        return MISH((x - mean) / jnp.sqrt(var + 1e-3))

    def ours(x):
        return normalise(x, jnp.ones(3), jnp.zeros(3), epsilon=1e-3, activation=MISH)[0]

    def second(function):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))
        return jax.jit(jax.grad(lambda x: jnp.vdot(gradient(x), tangent)))(x)

    with layer_forms.use(form):
        found = second(ours)
    np.testing.assert_allclose(found, second(by_autodiff), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "deviation"), [("bfloat16", 1.0), ("bfloat16", 0.01), ("float16", 0.001)]
)
def test_statistics_of_one_pass_are_those_of_half_precision_inputs(dtype, deviation):
    """Down to a deviation of about the last bit of the mean."""
    noise = deviation * np.random.default_rng(1).standard_normal((1, 4096, 8))
    x = jnp.asarray(1.0 + noise, dtype)
    exact = np.asarray(x, np.float64)
    with layer_forms.use(ONE_PASS):
        _, mean, var = jax.jit(functools.partial(normalise, epsilon=0.0))(
            x, np.ones(8), np.zeros(8)
        )
    np.testing.assert_allclose(mean, exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var(1), rtol=5e-3)


def test_statistics_of_one_pass_are_shared_over_devices():
    x = np.random.default_rng(2).standard_normal((2, 1, 8, 3)).astype(np.float32) + 3
    with layer_forms.use(ONE_PASS):
        one = functools.partial(normalise, epsilon=0.0, axis_name="d")
        shared = jax.vmap(one, in_axes=(0, None, None), axis_name="d")
        _, mean, var = jax.jit(shared)(x, np.ones(3), np.zeros(3))
    whole = x.reshape(-1, 3)
    np.testing.assert_allclose(mean[0, 0], whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var[1, 0], whole.var(0), rtol=1e-5)


def test_a_network_is_traced_in_the_forms_in_use_and_no_other():
    module = XResNet(10, stage_sizes=(1,), widths=(8,), stem_widths=(8,))
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)

    def program():
        return str(jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, image))

    before = program()
    with layer_forms.use(ALL):
        inside = program()
    assert "reduce_window_max" in inside
    assert "reduce_window_max" not in before
    assert program() == before
