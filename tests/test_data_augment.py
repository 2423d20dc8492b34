"""Augmentation: every pixel where it belongs, each example's fate its own, crops as Pillow's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.data.augment import (
    AugmentSpec,
    RandomResizedCrop,
    _random_box,
    augment,
    prepare_eval,
    resize_boxes,
)
from bs_jax.errors import UserError

augment_jit = jax.jit(augment, static_argnames="spec")
prepare_jit = jax.jit(prepare_eval, static_argnames="spec")
resize_jit = jax.jit(resize_boxes, static_argnames="image_size")
KEY = jax.random.key(11)
PAD_CROP = AugmentSpec(image_size=8, mean=(0.4,), std=(0.3,), crop_padding=2, flip=True)
RESIZED = AugmentSpec(image_size=8, flip=True, random_resized_crop=RandomResizedCrop(0.35, 1.0))


def noise(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def positions(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def test_padded_crop_is_one_of_the_possible_crops():
    images = noise(300, 8, 3)
    spec = AugmentSpec(image_size=8, crop_padding=2, flip=True)
    out = np.asarray(augment_jit(KEY, positions(300), images, spec))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))) / np.float32(255)
    fates = list(itertools.product(range(5), range(5), (False, True)))
    matches = np.empty((300, len(fates)), bool)
    for at, (top, left, mirrored) in enumerate(fates):
        crops = padded[:, top : top + 8, left : left + 8][:, :, :: -1 if mirrored else 1]
        matches[:, at] = np.isclose(out, crops, atol=1e-6).all(axis=(1, 2, 3))
    assert (matches.sum(axis=1) == 1).all()
    tops, lefts, mirrored = np.array(fates)[matches.argmax(axis=1)].T
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=5)
        # Chi-squared with 4 degrees of freedom: 23.5 is exceeded once in 10,000.
        assert ((counts - 60) ** 2 / 60).sum() < 23.5
    assert 110 < mirrored.sum() < 190
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.25


def test_normalisation():
    images = noise(4, 8, 3)
    spec = AugmentSpec(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(augment_jit(KEY, positions(4), images, spec), expected, atol=1e-5)
    np.testing.assert_allclose(prepare_jit(images, spec), expected, atol=1e-5)


def test_padding_is_black():
    images = np.full((50, 8, 8, 1), 255, np.uint8)
    out = np.unique(np.asarray(augment_jit(KEY, positions(50), images, PAD_CROP)))
    np.testing.assert_allclose(out, [-0.4 / 0.3, 0.6 / 0.3], rtol=1e-5)


def test_without_randomness_training_equals_evaluation():
    images = noise(5, 11, 3)
    spec = AugmentSpec(image_size=8)
    np.testing.assert_array_equal(
        augment_jit(KEY, positions(5), images, spec), prepare_jit(images, spec)
    )
    np.testing.assert_allclose(prepare_jit(images, spec), images[:, 1:9, 1:9] / 255, atol=1e-6)


@pytest.mark.parametrize("spec", [PAD_CROP, RESIZED])
def test_examples_do_not_depend_on_their_batch(spec):
    images = noise(24, 8, 3)
    whole = augment_jit(KEY, positions(24, start=1000), images, spec)
    for size in (1, 8):
        parts = [
            augment_jit(KEY, positions(size, start=1000 + at), images[at : at + size], spec)
            for at in range(0, 24, size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-6)
    moved = augment_jit(KEY, positions(24, start=1024), images, spec)
    other_run = augment_jit(jax.random.key(12), positions(24, start=1000), images, spec)
    for other in (moved, other_run):
        changed = np.abs(np.asarray(other) - np.asarray(whole)).max(axis=(1, 2, 3)) > 1e-3
        assert changed.mean() > 0.8


@pytest.mark.parametrize("spec", [PAD_CROP, RESIZED])
def test_maps_over_micro_batches_runs_and_devices(spec):
    images = noise(8, 8, 3)
    whole = augment_jit(KEY, positions(8), images, spec)
    cut = images.reshape(2, 4, 8, 8, 3), positions(8).reshape(2, 4)
    one = lambda pair: augment(KEY, pair[1], pair[0], spec)  # noqa: E731
    scanned = jax.jit(lambda pairs: jax.lax.map(one, pairs))(cut)
    np.testing.assert_allclose(np.reshape(scanned, whole.shape), whole, atol=1e-6)
    devices = min(2, jax.local_device_count())
    spread = [part.reshape(devices, -1, *part.shape[2:]) for part in cut]
    mapped = jax.pmap(lambda x, p: augment(KEY, p, x, spec))(*spread)
    np.testing.assert_allclose(np.reshape(mapped, whole.shape), whole, atol=1e-6)
    seeds = np.arange(2)
    one_run = lambda seed, *data: augment(jax.random.key(seed), *data, spec)  # noqa: E731
    side_by_side = jax.jit(jax.vmap(one_run, in_axes=(0, None, None)))
    for run, seed in zip(np.asarray(side_by_side(seeds, positions(8), images)), seeds, strict=True):
        alone = augment_jit(jax.random.key(seed), positions(8), images, spec)
        np.testing.assert_allclose(run, alone, atol=1e-6)


def test_result_type():
    spec = AugmentSpec(image_size=8, crop_padding=1, dtype="bfloat16")
    assert augment_jit(KEY, positions(2), noise(2, 8, 1), spec).dtype == jnp.bfloat16


@pytest.mark.parametrize(("stored", "out"), [(24, 16), (16, 16), (40, 16), (12, 16)])
def test_boxes_are_resized_as_pillow_does(stored, out):
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(stored)
    images = noise(24, stored, 3, seed=stored)
    sides = rng.integers(1, stored + 1, (24, 2))
    sides[0] = stored
    corners = rng.integers(0, stored - sides + 1)
    mirrored = rng.random(24) < 0.5
    boxes = np.concatenate([corners, sides], axis=1).astype(np.float32)
    ours = np.asarray(resize_jit(images, boxes, mirrored, image_size=out))
    for image, (top, left, height, width), flip, got in zip(
        images, boxes.astype(int), mirrored, ours, strict=True
    ):
        cut = image_module.fromarray(image[top : top + height, left : left + width])
        wanted = np.asarray(cut.resize((out, out), image_module.Resampling.BILINEAR), np.float32)
        wanted = wanted[:, ::-1] if flip else wanted
        # Pillow rounds to whole numbers after each axis and its weights to 8 bits or so: 1.6 levels
        # of 255 at most; its mean error must vanish, or a pixel would be shifted.
        assert np.abs(got - wanted).max() < 1.6
        assert abs((got - wanted).mean()) < 0.2


def draw_boxes(height, width, crop, count, aspect=None) -> np.ndarray:
    draws = np.random.default_rng(3).random((count, 4 * crop.attempts), np.float32)
    aspect = np.float32(width / height if aspect is None else aspect)
    box = functools.partial(_random_box, height=height, width=width, spec=crop)
    return np.asarray(jax.jit(jax.vmap(lambda u: box(u, aspect)))(draws))


def test_box_statistics():
    boxes = draw_boxes(200, 200, RandomResizedCrop(0.35, 1.0), 4000)
    top, left, height, width = boxes.T
    assert (boxes == np.round(boxes)).all()
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 200
    area, ratio = height * width / 200**2, width / height
    assert area.min() > 0.34
    assert area.max() > 0.97
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    # Symmetric in the logarithm, and centred.
    assert abs(np.log(ratio).mean()) < 0.02
    assert abs((top + height / 2).mean() - 100) < 1.5
    assert abs((left + width / 2).mean() - 100) < 1.5


@pytest.mark.parametrize("aspect", [1.0, 1.5])
def test_box_area_and_ratio_are_uniform_where_all_boxes_fit(aspect):
    """The ratio in pixels of the image as it was, whatever it was squashed to."""
    boxes = draw_boxes(1000, 1000, RandomResizedCrop(0.1, 0.45), 4000, aspect)
    _, _, height, width = boxes.T
    spread = np.log(4 / 3)
    for value, low, high in (
        (height * width / 1e6, 0.1, 0.45),
        (np.log(aspect * width / height), -spread, spread),
    ):
        uniform = np.sort((value - low) / (high - low))
        # Kolmogorov-Smirnov: 2.2 / sqrt(4000) is exceeded about once in 10,000.
        assert np.abs(uniform - np.arange(4000) / 4000).max() < 2.2 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("height", "width", "aspect", "central"),
    [
        (100, 400, 4, [0, 133, 100, 133]),
        (400, 100, 1 / 4, [133, 0, 133, 100]),
        (100, 100, 1, [0, 0, 100, 100]),
        (100, 100, 4, [0, 33, 100, 33]),
        (100, 100, 1 / 2, [16, 0, 67, 100]),
    ],
)
def test_central_box_if_no_attempt_fits(height, width, aspect, central):
    # At full area no box of another shape than the image's fits.
    crop = RandomResizedCrop(1.0, 1.0)
    boxes = draw_boxes(height, width, crop, 50, aspect)
    mostly = [tuple(box) == tuple(central) for box in boxes]
    assert np.mean(mostly) > 0.9


def test_crops_of_a_squashed_image_are_those_of_the_image_before():
    """fastai's recipe in numbers: the box drawn on 60x40 pixels, the image stored as 40x40."""
    crop, count = RandomResizedCrop(0.35, 1.0), 400
    _, _, height, width = draw_boxes(40, 60, crop, count).T
    _, _, squashed_height, squashed_width = draw_boxes(40, 40, crop, count, 60 / 40).T
    np.testing.assert_allclose(squashed_height, height, atol=1)
    np.testing.assert_allclose(squashed_width, width * 40 / 60, atol=1)


@pytest.mark.parametrize("size", [1, 5, 12])
@given(value=st.integers(0, 255))
def test_a_plain_image_stays_plain(size, value):
    images = np.full((4, 8, 8, 1), value, np.uint8)
    boxes = np.array([[1, 2, 5, 6], [0, 0, 8, 8], [7, 7, 1, 1], [3, 0, 1, 8]], np.float32)
    out = resize_jit(images, boxes, np.array([True, False, True, False]), image_size=size)
    np.testing.assert_allclose(out, value, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(0.0, 1.0), "0 < min_area"),
        (lambda: RandomResizedCrop(0.5, 1.5), "max_area <= 1"),
        (lambda: RandomResizedCrop(0.5, 1.0, min_ratio=2.0), "min_ratio <= max_ratio"),
        (lambda: RandomResizedCrop(0.5, 1.0, attempts=0), "attempts 0"),
        (lambda: AugmentSpec(image_size=0), "image_size 0"),
        (lambda: AugmentSpec(image_size=8, crop_padding=-1), "crop_padding -1"),
        (lambda: AugmentSpec(image_size=8, std=(0.0,)), "std above 0"),
        (lambda: AugmentSpec(image_size=8, mean=(float("nan"),)), "finite"),
        (lambda: AugmentSpec(image_size=8, mean=(0.5, 0.5)), "as many of each"),
        (
            lambda: AugmentSpec(
                image_size=8, crop_padding=1, random_resized_crop=RandomResizedCrop(0.5, 1.0)
            ),
            "exclude each other",
        ),
    ],
)
def test_impossible_specs_are_refused(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_images_that_do_not_suit_the_spec_are_refused():
    images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    with pytest.raises(UserError, match="image_size 9 is larger than the stored 8x8"):
        augment(KEY, positions(2), images, AugmentSpec(image_size=9))
    with pytest.raises(UserError, match="2 means for images of 3 channels"):
        prepare_eval(images, AugmentSpec(image_size=8, mean=(0.1, 0.2), std=(1.0, 1.0)))
    larger = AugmentSpec(image_size=9, random_resized_crop=RandomResizedCrop(0.5, 1.0))
    with pytest.raises(UserError, match="larger than the stored"):
        prepare_eval(images, larger)
