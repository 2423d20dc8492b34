"""Convolutions: every form against XLA's own, in values, gradients and transformations."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bs_jax.models.cpu
from bs_jax.models.conv import conv_general_dilated
from bs_jax.models.cpu import conv as conv_cpu
from bs_jax.models.cpu.conv import IMAGE_GRADIENTS, convolve
from bs_jax.models.cpu.forms import FORMS, Settings

NUMBERS = ("NHWC", "HWIO", "NHWC")


def reference(images, kernel, strides, padding, groups=1):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=NUMBERS, feature_group_count=groups
    )


def operands(size, channels, kernel, features, groups=1, dtype=jnp.float32, examples=2):
    draw = np.random.default_rng(0).standard_normal
    images = draw((examples, *size, channels)).astype(dtype)
    return images, draw((*kernel, channels // groups, features)).astype(dtype)


def values_and_gradients(function, images, kernel):
    outputs, pullback = jax.vjp(function, images, kernel)
    return outputs, *pullback(jnp.sin(outputs))


def close(got, want, tolerance=1e-4):
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, atol=tolerance * (1 + np.abs(w).max()))


CASES = [
    # size, kernel, strides, padding, channels, features
    ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), 16, 6),
    ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1)), 20, 4),
    ((1, 3), (3, 3), (1, 1), ((1, 1), (1, 1)), 16, 4),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), 16, 5),
    ((7, 6), (3, 2), (2, 1), ((1, 0), (0, 2)), 17, 4),
    ((7, 9), (2, 3), (3, 2), ((0, 0), (2, 2)), 16, 3),
    ((8, 8), (1, 1), (1, 1), ((0, 0), (0, 0)), 5, 7),
    ((7, 7), (1, 1), (2, 2), ((0, 0), (0, 0)), 5, 7),
    ((6, 6), (1, 1), (1, 1), ((1, 1), (0, 0)), 16, 3),
    ((12, 12), (7, 7), (2, 2), ((3, 3), (3, 3)), 3, 8),
    ((12, 12), (4, 4), (4, 4), ((0, 0), (0, 0)), 1, 8),
    ((6, 7), (3, 3), (1, 1), ((-1, 0), (0, -2)), 16, 4),
    ((6, 7), (2, 2), (1, 1), ((3, 3), (2, 3)), 16, 4),
]


# The forms themselves are held against XLA's for the others by the next test.
CHOSEN = (CASES[0], *CASES[6:10], CASES[12])


@pytest.mark.parametrize(
    "case",
    [c if c in CHOSEN else pytest.param(c, marks=pytest.mark.long) for c in CASES],
    ids=str,
)
def test_the_chosen_forms_equal_xlas_in_values_and_gradients(case):
    size, kernel, strides, padding, channels, features = case
    images, weights = operands(size, channels, kernel, features)

    @jax.jit
    def both(images, weights):
        return tuple(
            values_and_gradients(lambda i, w, f=form: f(i, w, strides, padding), images, weights)
            for form in (convolve, reference)
        )

    close(*both(images, weights))


@pytest.mark.parametrize("case", CASES[:6] + CASES[9:], ids=str)
def test_every_form_is_right_wherever_it_might_be_chosen(case):
    size, kernel, strides, padding, channels, features = case
    images, weights = operands(size, channels, kernel, features)
    settings = Settings(strides, padding)

    @jax.jit
    def all_forms(images, weights):
        outputs, changes, slopes = values_and_gradients(
            lambda i, w: reference(i, w, strides, padding), images, weights
        )
        found = {
            name: (
                form.forward(settings, images, weights),
                form.kernel_gradient(settings, images, kernel, jnp.sin(outputs)),
            )
            for name, form in FORMS.items()
        }
        moved = [
            form(settings, size, weights, jnp.sin(outputs)) for form in IMAGE_GRADIENTS.values()
        ]
        return (outputs, slopes), changes, found, moved

    want, images_slopes, found, moved = all_forms(images, weights)
    for got in found.values():
        close(got, want)
    for got in moved:
        close([got], [images_slopes])


@pytest.mark.parametrize(
    ("groups", "channels", "features", "size"),
    [(2, 4, 6, 5), (32, 64, 64, 3), (3, 3, 6, 4)],
)
def test_groups(groups, channels, features, size):
    images, weights = operands((size, size), channels, (3, 3), features, groups)

    @jax.jit
    def both(images, weights, strides=((1, 1), (2, 2)), padding=((1, 1), (1, 1))):
        return [
            [
                values_and_gradients(
                    lambda i, w, f=f, s=s: f(i, w, s, padding, groups), images, weights
                )
                for f in (convolve, reference)
            ]
            for s in strides
        ]

    for pair in both(images, weights):
        close(*pair)


def test_gradients_are_those_of_float64():
    images, weights = operands((8, 8), 32, (3, 3), 16, examples=4)
    passes = jax.jit(
        lambda f, i, w: values_and_gradients(lambda i, w: f(i, w, (1, 1), ((1, 1), (1, 1))), i, w),
        static_argnums=0,
    )
    got = passes(convolve, images, weights)
    with jax.enable_x64():
        want = passes(
            reference, *(jnp.asarray(np.asarray(a), jnp.float64) for a in (images, weights))
        )
        want = [np.asarray(w) for w in want]
    for g, w in zip(got, want, strict=True):
        assert np.abs(g - w).max() < 1e-5 * np.abs(w).max()


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    images, weights = operands((2, 2), 64, (3, 3), 4, dtype=jnp.bfloat16)
    got = jax.jit(
        lambda i, w: values_and_gradients(
            lambda i, w: convolve(i, w, (1, 1), ((1, 1), (1, 1))), i, w
        )
    )(images, weights)
    assert {g.dtype for g in got} == {jnp.dtype("bfloat16")}
    wide = reference(
        images.astype(jnp.float32), weights.astype(jnp.float32), (1, 1), ((1, 1), (1, 1))
    )
    close([got[0]], [wide], tolerance=4e-3)


@pytest.mark.parametrize(
    ("axes", "size"),  # of 2: patches and taps; of 16: XLA's own
    [
        *((axes, 2) for axes in ((0, 0), (None, 0), (0, None))),
        ((0, 0), 16),
        *(pytest.param(axes, 16, marks=pytest.mark.long) for axes in ((None, 0), (0, None))),
    ],
)
def test_vmapped_runs_equal_single_ones(size, axes):
    images, weights = operands((size, size), 32, (3, 3), 4, examples=6)
    images = images.reshape(3, 2, *images.shape[1:]) if axes[0] == 0 else images
    weights = jnp.stack([weights, 2 * weights, -weights]) if axes[1] == 0 else weights
    single = functools.partial(
        values_and_gradients, lambda i, w: convolve(i, w, (1, 1), ((1, 1), (1, 1)))
    )
    together = jax.jit(jax.vmap(single, in_axes=axes))(images, weights)
    one = jax.jit(single)
    for run in range(3):
        pair = [a[run] if axis == 0 else a for a, axis in zip((images, weights), axes, strict=True)]
        close([t[run] for t in together], one(*pair))


def test_inside_scan_and_pmap():
    images, weights = operands((6, 6), 16, (3, 3), 16, examples=4)
    padding = ((1, 1), (1, 1))

    def loss(form, weights, images):
        def layer(x, _):
            return jnp.tanh(0.1 * form(x, weights, (1, 1), padding)), None

        return jnp.sum(lax.scan(layer, images, None, length=2)[0] ** 2)

    want = jax.jit(jax.grad(functools.partial(loss, reference)))(weights, images)
    devices = jax.local_device_count()
    shared = images.reshape(devices, -1, *images.shape[1:])
    gradient = jax.grad(functools.partial(loss, convolve))
    got = jax.pmap(
        lambda w, i: lax.psum(gradient(w, i), "batch"), axis_name="batch", in_axes=(None, 0)
    )(weights, shared)
    close([got[0]], [want])


def test_what_is_not_channels_last_goes_to_xla():
    images, weights = operands((6, 6), 4, (3, 3), 4)
    for numbers, options in (
        (("NCHW", "OIHW", "NCHW"), {}),
        (NUMBERS, {"rhs_dilation": (2, 2)}),
        (NUMBERS, {"lhs_dilation": (2, 2)}),
    ):
        moved = numbers[0] == "NCHW"
        args = (
            jnp.moveaxis(images, -1, 1) if moved else images,
            jnp.transpose(weights, (3, 2, 0, 1)) if moved else weights,
            (1, 1),
            "SAME" if not options.get("lhs_dilation") else ((1, 1), (1, 1)),
        )
        np.testing.assert_array_equal(
            conv_general_dilated(*args, dimension_numbers=numbers, **options),
            lax.conv_general_dilated(*args, dimension_numbers=numbers, **options),
        )


def test_gradients_inside_a_loop_avoid_the_plain_loop_nest():
    """XLA clears permuted convolutions in its outermost computation only; ours have none."""
    images, weights = operands((16, 16), 16, (3, 3), 16, examples=8)

    def step(carry, _):
        images, weights = carry
        outputs, slopes, changes = values_and_gradients(
            lambda i, w: convolve(i, w, (1, 1), ((1, 1), (1, 1))), images, weights
        )
        del outputs
        return (images - slopes, weights - changes), None

    text = jax.jit(lambda c: lax.scan(step, c, None, length=2)).lower((images, weights)).as_text()
    found = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(found) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in found)


def test_forms_are_chosen_by_shape():
    def chosen(examples, size, channels, kernel=3, stride=1):
        pad = (kernel - 1) // 2
        images = (examples, size, size, channels)
        window = (kernel, kernel, channels, channels)
        settings = Settings((stride, stride), ((pad, pad), (pad, pad)))
        slopes = (examples, -(-size // stride), -(-size // stride), channels)
        return (
            conv_cpu.choose_forward(images, window, settings),
            conv_cpu.choose_image_gradient(slopes, window),
            conv_cpu.choose_kernel_gradient(images, window, settings),
        )

    assert chosen(32, 16, 64) == ("xla", "residues", "xla")
    assert chosen(32, 64, 3, kernel=7, stride=2) == ("xla", "columns", "xla")
    assert chosen(32, 64, 3, stride=2) == ("patches", "columns", "patches")
    assert chosen(32, 2, 512) == ("patches", "columns", "taps")
    assert chosen(32, 8, 512, kernel=1) == ("taps", "columns", "taps")
    assert chosen(8, 7, 16) == ("patches", "columns", "patches")


def test_the_forms_of_the_cpu_lie_behind_one_function():
    root, door = pathlib.Path(bs_jax.__file__).parent, "bs_jax.models.cpu"
    imported = [
        (str(path.relative_to(root)), f"{node.module}.{name.name}")
        for path in root.rglob("*.py")
        if path.parent != root / "models" / "cpu"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if f"{node.module}.{name.name}.".startswith(f"{door}.")
    ]
    assert imported == [("models/conv.py", door)]
    assert bs_jax.models.cpu.__all__ == ["convolve"]
