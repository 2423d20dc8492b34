"""XResNets: their size, their parts one by one, and how they go with the trainer."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import random_variables

from bs_jax import models
from bs_jax.errors import UserError
from bs_jax.models.activations import mish
from bs_jax.models.attention import SimpleSelfAttention
from bs_jax.models.pooling import average_pool, halving_max_pool, max_blur_pool, max_pool
from bs_jax.models.xresnet import XResNet
from bs_jax.scaling import value_grad_and_stats

KEY = jax.random.key(0)
IMAGE = jnp.zeros((1, 128, 128, 3))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.cache
def shapes_of(name):
    model = models.create(name, num_classes=10)
    return jax.eval_shape(lambda key: model.init(key, IMAGE, False), KEY)


SIZES = [
    ("xresnet18", 11.20, 0.67),
    ("xresnet50", 23.55, 1.41),
    ("xse_resnext50", 25.62, 1.66),
    ("xse_resnext50_blur", 25.62, 1.68),  # with every kind of layer
]


@pytest.mark.parametrize(
    ("name", "million_parameters", "giga_multiply_adds", "backend"),
    [
        (*SIZES[0], "cpu"),
        *((*SIZES[-1], backend) for backend in ("cpu", "gpu")),
        (*SIZES[0], "gpu"),
        # Those of the others' layers: see the next test.
        *(
            pytest.param(*size, backend, marks=pytest.mark.long)
            for size in SIZES[1:-1]
            for backend in ("cpu", "gpu")
        ),
    ],
)
def test_size_at_128_pixels(name, million_parameters, giga_multiply_adds, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = models.create(name, num_classes=10)
    variables = shapes_of(name)
    assert round(models.count_parameters(variables["params"]) / 1e6, 2) == million_parameters
    count = models.count_multiply_adds(lambda v: model.apply(v, IMAGE, False), variables)
    assert round(count / 1e9, 2) == giga_multiply_adds


def test_the_networks_of_one_family_differ_in_their_settings_alone():
    create = functools.partial(models.create, num_classes=10)
    blurred = create("xse_resnext50_blur")
    plain = {"groups": 1, "squeeze_excite": False, "self_attention": False}
    assert create("xse_resnext50") == dataclasses.replace(blurred, shortcut_pool="max")
    xresnet50 = dataclasses.replace(blurred, shortcut_pool="average", **plain)
    assert create("xresnet50") == xresnet50
    small = {"stage_sizes": (2, 2, 2, 2), "expansion": 1}
    assert create("xresnet18") == dataclasses.replace(xresnet50, **small)


def test_multiply_adds_of_loops_and_branches():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
    count = models.count_multiply_adds
    assert count(lambda a, b: jax.jit(jnp.dot)(a, b), a, b) == 2 * 3 * 5
    assert count(jax.vmap(lambda x: x @ b), jnp.ones((7, 2, 3))) == 7 * 2 * 3 * 5
    assert count(lambda a: jax.lax.map(lambda x: x @ b, a), jnp.ones((7, 2, 3))) == 7 * 2 * 3 * 5
    either = lambda p, a: jax.lax.cond(p, lambda a: a @ b, lambda a: a @ b + a @ b, a)  # noqa: E731
    assert count(either, True, a) == 2 * 2 * 3 * 5
    square = jnp.ones((3, 3))
    with pytest.raises(UserError, match="while loop, whose rounds are not known"):
        count(lambda n: jax.lax.fori_loop(0, n, lambda _, x: x @ square, square), 4)


def test_mish_and_its_written_slope():
    x = np.float64(np.float32(np.concatenate([np.linspace(-30, 30, 241), [-1e4, 1e4]])))
    t = np.tanh(np.logaddexp(0, x))
    slope = t + x * (1 - t**2) / (1 + np.exp(-np.maximum(x, -700)))
    value_and_slope = jax.jit(jax.vmap(jax.value_and_grad(mish)))
    for got, want in zip(value_and_slope(np.float32(x)), (x * t, slope), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-7)
    narrow = value_and_slope(jnp.bfloat16(x))
    assert [a.dtype for a in narrow] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2), (2, 1, 2, 2)])
def test_pools_are_flaxs_in_values_and_gradients(shape):
    # A window that reaches over an odd edge holds what is there; max_pool's padding is -inf.
    ceil = [(0, shape[1] % 2), (0, shape[2] % 2)]
    average = functools.partial(
        nn.avg_pool, window_shape=(2, 2), strides=(2, 2), count_include_pad=False
    )
    pools = [
        (
            functools.partial(max_pool, size=3, stride=2, padding=1),
            lambda x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2),
        ),
        (halving_max_pool, lambda x: nn.max_pool(x, (2, 2), (2, 2), ceil)),
        (average_pool, lambda x: average(x, padding=ceil)),
    ]

    @jax.jit
    def passes(x):
        results = []
        for pair in pools:
            for pool in pair:
                y, pull_back = jax.vjp(pool, x)
                results.append((y, *pull_back(jnp.cos(jnp.arange(y.size).reshape(y.shape)))))
        return results

    results = passes(normal(*shape))
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_of_equal_values_the_first_takes_the_whole_gradient():
    slopes = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x, 2, 2))))
    gradient = np.asarray(slopes(np.zeros((1, 2, 4, 1), np.float32)))
    assert gradient[0, :, :, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_max_blur_pool_is_maxima_blurred_and_averaged():
    x = normal(1, 8, 6, 1)
    maxima = np.asarray(nn.max_pool(x, (3, 3), (1, 1), [(1, 1)] * 2))[0, :, :, 0]
    mirrored = np.pad(maxima, 2, mode="reflect")
    line = np.array([1, 4, 6, 4, 1]) / 16
    blurred = np.array(
        [[line @ mirrored[i : i + 5, j : j + 5] @ line for j in range(6)] for i in range(8)]
    )
    want = blurred.reshape(4, 2, 3, 2).mean((1, 3))
    got = np.asarray(jax.jit(max_blur_pool)(x))
    np.testing.assert_allclose(got[0, :, :, 0], want, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_blurring_keeps_what_does_not_vary_at_every_edge(size):
    blurred = jax.jit(max_blur_pool)(np.full((1, size, size, 1), 3, np.float32))
    np.testing.assert_allclose(blurred, np.full((1, -(-size // 2), -(-size // 2), 1), 3.0))


def test_spectral_norm_finds_the_largest_singular_value_and_evaluation_leaves_it():
    attention = SimpleSelfAttention()
    x = normal(2, 3, 3, 8)
    passes = functools.partial(attention.apply, mutable=["batch_stats"])

    @jax.jit
    def moved(key):
        variables = attention.init(key, x, False)
        variables["params"]["gamma"] = jnp.float32(1.0)
        step = lambda _, v: {**v, **passes(v, x, True)[1]}  # noqa: E731
        variables = jax.lax.fori_loop(0, 200, step, variables)
        return variables, *passes(variables, x, False)

    variables, got, same = jax.device_get(moved(jax.random.key(1)))
    kernel = np.float64(variables["params"]["kernel"])
    flat = np.float64(x).reshape(2, 9, 8)
    gram = np.swapaxes(flat, 1, 2) @ flat
    want = flat + (flat @ kernel / np.linalg.norm(kernel, 2)) @ gram
    np.testing.assert_allclose(got.reshape(2, 9, 8), want, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"])


def tiny(**changes):
    """Every part of the largest model, in few small layers."""
    settings = {
        "num_classes": 3,
        "stage_sizes": (1, 1),
        "widths": (16, 32),
        "stem_widths": (4, 4, 8),
        "groups": 4,
        "squeeze_excite": True,
        "self_attention": True,
        "shortcut_pool": "max_blur",
        "ghost_batch_size": 2,
    }
    return XResNet(**(settings | changes))


def loss_fn(params, images, batch_stats, model, decay=0.9):
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        bn_decay=decay,
        mutable=["batch_stats"],
    )
    return jnp.mean(jnp.sin(logits)), updated["batch_stats"]


def smallest(**changes):
    """Every kind of layer, once."""
    one_of_each = {"stage_sizes": (1,), "widths": (16,), "stem_widths": (8,), "expansion": 1}
    return tiny(**(one_of_each | changes))


def test_start():
    model = tiny(stage_sizes=(1,), widths=(32,), stem_widths=(8,))
    start = jax.jit(functools.partial(model.init, train=False))
    variables = jax.device_get(start(KEY, np.ones((1, 16, 16, 3), np.float32)))
    params = variables["params"]
    kernel = params["stage1_block1"]["Conv_2"]["kernel"]
    # He's normal of a fan in of 8 (1,024 draws): .5 +- .011, and not truncated at two deviations.
    assert abs(kernel.std() - np.sqrt(2 / 8)) < 0.05
    assert np.abs(kernel).max() > 2.7 * np.sqrt(2 / 8)
    assert np.abs(params["stage1_block1"]["BatchNorm_2"]["scale"]).max() == 0
    biases = [x for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "bias"]
    assert len(biases) > 5
    assert all(np.abs(bias).max() == 0 for bias in biases)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    for vector in variables["batch_stats"]["stage1_block1"]["self_attention"].values():
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-6)


def test_micro_batches_and_devices_are_one_round_of_the_power_iteration():
    model = smallest(groups=1, squeeze_excite=False, shortcut_pool="average")
    images = normal(8, 16, 16, 3)
    variables = random_variables(model, images.shape, np.random.default_rng(1), train=False)
    _, whole = jax.jit(functools.partial(loss_fn, model=model))(
        variables["params"], images, variables["batch_stats"]
    )
    devices = min(2, jax.local_device_count())
    grads_of = value_grad_and_stats(
        functools.partial(loss_fn, model=model),
        microbatches=2,
        axis_name="batch",
        has_aux=True,
    )
    (_, parts), _, _ = jax.pmap(
        grads_of, axis_name="batch", in_axes=(None, 0, None), devices=jax.devices()[:devices]
    )(variables["params"], images.reshape(devices, -1, 16, 16, 3), variables["batch_stats"])
    # The ghost batches are the same pairs: so is what BatchNorm and the power iteration keep.
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5),
        parts,
        whole,
    )


def test_runs_side_by_side_have_power_iterations_of_their_own():
    attention = SimpleSelfAttention()
    x = normal(2, 3, 2, 2, 4)

    def step(key, x):
        variables = attention.init(key, x, False)
        return attention.apply(variables, x, True, mutable=["batch_stats"])[1]

    keys = jax.random.split(KEY, 2)
    together, alone = jax.jit(jax.vmap(step))(keys, x), jax.jit(step)
    for run in range(2):
        jax.tree.map(
            lambda got, want, run=run: np.testing.assert_allclose(got[run], want, atol=1e-5),
            together,
            alone(keys[run], x[run]),
        )


def test_bfloat16_computes_near_float32_and_keeps_everything_else_float32():
    images = normal(8, 16, 16, 3)
    variables = random_variables(smallest(), images.shape, np.random.default_rng(1), train=False)
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = smallest(dtype=dtype, ghost_batch_size=None)
        logits, updated = jax.jit(
            functools.partial(model.apply, train=True, mutable=["batch_stats"])
        )(variables, images)
        assert logits.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
        results.append(np.asarray(logits))
    assert 0 < np.abs(results[0] - results[1]).max() < 0.1 * np.abs(results[0]).max()


@pytest.mark.parametrize(
    ("pool", "size"),
    [("average", 33), ("max", 33), ("max_blur", 33), ("max_blur", 28), ("max_blur", 65)],
)
def test_every_image_size_fits(pool, size):
    model = models.create("xresnet10_small", num_classes=10)
    model, image = model.clone(shortcut_pool=pool, stem_widths=(8,)), jnp.zeros((1, size, size, 3))
    logits, _ = jax.eval_shape(lambda key: model.init_with_output(key, image, False), KEY)
    assert logits.shape == (1, 10)
