"""Augmentation on the device, inside the jitted step: crop, flip, resize, normalise.

Each example draws its randomness from the run's key and its own position in the run's stream, so
what happens to it depends neither on the batch size nor on how a batch is cut into micro-batches
or spread over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bs_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and shape, resized to the whole image.

    Attributes:
      min_area: least share of the stored image's area, in (0, 1].
      max_area: greatest share, in [min_area, 1].
      min_ratio: least width / height of the box, in pixels of the image as it was before it was
        stored.
      max_ratio: greatest width / height; the ratio's logarithm is uniform between the two.
      attempts: boxes drawn until one fits; if none does, the largest central box is taken.

    >>> RandomResizedCrop(min_area=0.35, max_area=1.0).max_ratio
    1.3333333333333333

    Reference: Szegedy et al., "Going deeper with convolutions", 2015.
    """

    min_area: float
    max_area: float
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3
    attempts: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= self.max_area <= 1:
            raise UserError(
                f"random_resized_crop: areas {self.min_area}..{self.max_area}; "
                "want 0 < min_area <= max_area <= 1"
            )
        if not 0 < self.min_ratio <= self.max_ratio < math.inf:
            raise UserError(
                f"random_resized_crop: ratios {self.min_ratio}..{self.max_ratio}; "
                "want 0 < min_ratio <= max_ratio"
            )
        if self.attempts < 1:
            raise UserError(f"random_resized_crop: attempts {self.attempts}; want at least 1")


@dataclasses.dataclass(frozen=True)
class AugmentSpec:
    """What becomes of a stored image on its way to the model.

    Attributes:
      image_size: height and width that the model sees, pixels.
      mean: per channel, in units of full scale (0..1); one number serves all channels.
      std: per channel, the same units.
      crop_padding: black pixels added on each side before a random crop of `image_size`; 0 crops
        the centre instead.
      flip: mirror left to right with probability 1/2.
      random_resized_crop: if given, takes the place of the padded crop.
      dtype: of the result.

    >>> AugmentSpec(image_size=28, mean=(0.286,), std=(0.353,), crop_padding=2, flip=True).flip
    True
    """

    image_size: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_padding: int = 0
    flip: bool = False
    random_resized_crop: RandomResizedCrop | None = None
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.crop_padding < 0:
            raise UserError(
                f"augmentation: image_size {self.image_size} and crop_padding {self.crop_padding}; "
                "want image_size >= 1 and crop_padding >= 0"
            )
        if self.crop_padding and self.random_resized_crop:
            raise UserError(
                f"augmentation: crop_padding {self.crop_padding} and random_resized_crop exclude "
                "each other; set crop_padding=0 or random_resized_crop=None"
            )
        finite = all(math.isfinite(x) for x in (*self.mean, *self.std))
        if len(self.mean) != len(self.std) or not finite or min(self.std, default=0.0) <= 0:
            raise UserError(
                f"augmentation: mean {self.mean} and std {self.std}; "
                "want as many of each, finite, std above 0"
            )


def augment(
    key: jax.Array,
    positions: jax.Array,
    images: jax.Array,
    spec: AugmentSpec,
    *,
    aspects: jax.Array | None = None,
) -> jax.Array:
    """Augment a batch for training.

    `out = (crop(image) / 255 - mean) / std`, cropped and flipped by draws from
    `fold_in(key, position)`.

    Args:
      key: the run's augmentation key.
      positions: int32 [B], each example's position in the run's stream (examples seen before it).
      images: uint8 [B, H, W, C], as stored.
      spec: what to do (static).
      aspects: float32 [B], width over height of the images before they were squashed for storage:
        a random resized crop cuts the box from each as it was. `None`: as stored.

    Returns:
      `spec.dtype` [B, image_size, image_size, C].

    Raises:
      UserError: the stored images do not suit `spec`.

    >>> spec, key = AugmentSpec(image_size=4, crop_padding=1, flip=True), jax.random.key(0)
    >>> images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    >>> jax.jit(augment, static_argnames="spec")(key, jnp.arange(2), images, spec).shape
    (2, 4, 4, 1)
    """
    _check_shape(images.shape, spec, enlarged=spec.random_resized_crop is not None)
    resized_crop = spec.random_resized_crop
    num_draws = 1 + (2 if resized_crop is None else 4 * resized_crop.attempts)
    keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (num_draws,)))(keys)
    mirrored = draws[:, 0] < 0.5 if spec.flip else jnp.zeros(len(images), bool)
    if resized_crop is None and spec.crop_padding:
        cropped = _shifted_crop(draws[:, 1:], mirrored, images, spec)
    elif resized_crop is None:
        # Slices: a gather of single pixels takes a TPU two copies padded from 3 channels to 128.
        cropped = _centre(images, spec.image_size)
        if spec.flip:
            cropped = jnp.where(mirrored[:, None, None, None], cropped[:, :, ::-1], cropped)
    else:
        _, height, width, _ = images.shape
        if aspects is None:
            aspects = jnp.full(len(images), width / height, jnp.float32)
        box_of = functools.partial(_random_box, height=height, width=width, spec=resized_crop)
        boxes = jax.vmap(box_of)(draws[:, 1:], aspects)
        cropped = resize_boxes(images, boxes, mirrored, spec.image_size)
    return _normalize(cropped, spec)


def prepare_eval(images: jax.Array, spec: AugmentSpec) -> jax.Array:
    """Crop the centre and normalise, as `augment` does but without chance.

    Args:
      images: uint8 [B, H, W, C], as stored.
      spec: as given to `augment` (static).

    Returns:
      `spec.dtype` [B, image_size, image_size, C].

    Raises:
      UserError: the stored images do not suit `spec`.

    >>> prepare_eval(jnp.full((1, 4, 4, 1), 255, jnp.uint8), AugmentSpec(image_size=2)).tolist()
    [[[[1.0], [1.0]], [[1.0], [1.0]]]]
    """
    _check_shape(images.shape, spec, enlarged=False)
    return _normalize(_centre(images, spec.image_size), spec)


def resize_boxes(
    images: jax.Array, boxes: jax.Array, mirrored: jax.Array, image_size: int
) -> jax.Array:
    """Cut one box out of each image and resize it, bilinear with antialiasing.

    Along each axis output pixel i is the mean of the box's pixels j weighted by the triangle
    `max(0, 1 - |j + 1/2 - c_i| / max(s, 1))`, where `s = length / image_size` and
    `c_i = start + (i + 1/2) s`.
    Pixels outside the box are never used, as if it had been cut out first.

    Args:
      images: uint8 [B, H, W, C].
      boxes: float32 [B, 4], whole numbers: top, left, height, width, inside the image.
      mirrored: bool [B], flip left to right.
      image_size: height and width of the result.

    Returns:
      float32 [B, image_size, image_size, C], 0..255.

    >>> image = jnp.array([[[[0], [100]], [[0], [100]]]], jnp.uint8)
    >>> box = jnp.array([[0.0, 0.0, 2.0, 2.0]])
    >>> jax.jit(resize_boxes, static_argnames="image_size")(image, box, jnp.array([True]), 1).item()
    50.0
    """
    _, height, width, _ = images.shape
    straight = jnp.arange(image_size)[None]
    across = jnp.where(mirrored[:, None], image_size - 1 - straight, straight)
    rows, row_weights = _taps(boxes[:, 0], boxes[:, 2], straight, height, image_size)
    columns, column_weights = _taps(boxes[:, 1], boxes[:, 3], across, width, image_size)
    # A few gathers an axis: 3 to 5 times as fast on CPU as the same sums written as matrix products
    # or as jax.image.scale_and_translate, and exact in float32 on accelerators too. Mirroring the
    # indices costs nothing; mirroring the result would take longer than the resize.
    example = jnp.arange(len(images))
    squeezed = jnp.zeros((len(images), image_size, *images.shape[2:]), jnp.float32)
    for tap in range(rows.shape[-1]):
        picked = images[example[:, None], rows[:, :, tap]].astype(jnp.float32)
        squeezed += picked * row_weights[:, :, tap, None, None]
    out = jnp.zeros((len(images), image_size, image_size, images.shape[3]), jnp.float32)
    row = jnp.arange(image_size)
    for tap in range(columns.shape[-1]):
        picked = squeezed[example[:, None, None], row[None, :, None], columns[:, None, :, tap]]
        out += picked * column_weights[:, None, :, tap, None]
    return out


def _taps(
    start: jax.Array, length: jax.Array, wanted: jax.Array, stored_size: int, out_size: int
) -> tuple[jax.Array, jax.Array]:
    """Return the pixels each `wanted` one is made of, int32 [B, out, taps], and their weights."""
    num_taps = math.ceil(2 * max(1.0, stored_size / out_size)) + 1
    scale = (length / out_size)[:, None]
    support = jnp.maximum(scale, 1.0)
    center = start[:, None] + (wanted + 0.5) * scale
    pixel = jnp.floor(center - support + 0.5)[:, :, None] + jnp.arange(num_taps)[None, None]
    weight = 1.0 - jnp.abs(pixel + 0.5 - center[:, :, None]) / support[:, :, None]
    first, end = start[:, None, None], (start + length)[:, None, None]
    weight = jnp.where((pixel >= first) & (pixel < end), jnp.maximum(weight, 0.0), 0.0)
    weight /= weight.sum(-1, keepdims=True)
    return jnp.clip(pixel, 0, stored_size - 1).astype(jnp.int32), weight


def _random_box(
    draws: jax.Array, aspect: jax.Array, *, height: int, width: int, spec: RandomResizedCrop
) -> jax.Array:
    """Return top, left, height, width of the first box drawn that fits, else the central one."""
    area, log_ratio, vertical, horizontal = draws.reshape(spec.attempts, 4).T
    area = (spec.min_area + area * (spec.max_area - spec.min_area)) * (height * width)
    low, high = math.log(spec.min_ratio), math.log(spec.max_ratio)
    # From pixels of the image as it was to those of the stored one.
    ratio = jnp.exp(low + log_ratio * (high - low)) * ((width / height) / aspect)
    box_width = jnp.maximum(jnp.round(jnp.sqrt(area * ratio)), 1.0)
    box_height = jnp.maximum(jnp.round(jnp.sqrt(area / ratio)), 1.0)
    fits = (box_width <= width) & (box_height <= height)
    top = jnp.minimum(jnp.floor(vertical * (height - box_height + 1)), height - box_height)
    left = jnp.minimum(jnp.floor(horizontal * (width - box_width + 1)), width - box_width)
    # The central box always fits and comes last. A stable sort puts the first that fits in front;
    # unlike argmax, XLA on CPU does not fuse it into the resize and redo it for every pixel there.
    tried = jnp.stack([top, left, box_height, box_width])
    tried = jnp.concatenate([tried, _central_box(aspect, height, width, spec)[:, None]], axis=1)
    unfit = jnp.concatenate([~fits, np.array([False])])
    _, *first = jax.lax.sort((unfit, *tried), num_keys=1, is_stable=True)
    return jnp.stack([values[0] for values in first])


def _central_box(aspect: jax.Array, height: int, width: int, spec: RandomResizedCrop) -> jax.Array:
    """The largest box in the middle whose ratio is allowed."""
    box_height = jnp.maximum(jnp.round(height * jnp.minimum(1.0, aspect / spec.min_ratio)), 1.0)
    box_width = jnp.maximum(jnp.round(width * jnp.minimum(1.0, spec.max_ratio / aspect)), 1.0)
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return jnp.stack([top, left, box_height, box_width])


def _centre(images: jax.Array, size: int) -> jax.Array:
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images[:, top : top + size, left : left + size]


def _shifted_crop(
    draws: jax.Array, mirrored: jax.Array, images: jax.Array, spec: AugmentSpec
) -> jax.Array:
    _, height, width, _ = images.shape
    size, padding = spec.image_size, spec.crop_padding
    top = _uniform_integer(draws[:, 0], height + 2 * padding - size + 1) - padding
    left = _uniform_integer(draws[:, 1], width + 2 * padding - size + 1) - padding
    steps = jnp.arange(size)[None]
    rows = top[:, None] + steps
    columns = left[:, None] + jnp.where(mirrored[:, None], size - 1 - steps, steps)
    inside = ((rows >= 0) & (rows < height))[:, :, None, None]
    inside &= ((columns >= 0) & (columns < width))[:, None, :, None]
    picked = images[
        jnp.arange(len(images))[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ]
    return jnp.where(inside, picked, 0)


def _uniform_integer(uniform: jax.Array, count: int) -> jax.Array:
    # float32 rounding can lift the product to `count` itself.
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


def _normalize(images: jax.Array, spec: AugmentSpec) -> jax.Array:
    mean, std = np.array(spec.mean), np.array(spec.std)
    scale, shift = np.float32(1 / (255 * std)), np.float32(-mean / std)
    scale, shift = scale.reshape(1, 1, 1, -1), shift.reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) * scale + shift).astype(spec.dtype)


def _check_shape(shape: tuple[int, ...], spec: AugmentSpec, *, enlarged: bool) -> None:
    _, height, width, channels = shape
    if len(spec.mean) not in (1, channels):
        raise UserError(
            f"augmentation: {len(spec.mean)} means for images of {channels} channels; "
            f"give 1 or {channels}"
        )
    if not enlarged and min(height, width) < spec.image_size:
        raise UserError(
            f"augmentation: image_size {spec.image_size} is larger than the stored "
            f"{height}x{width} images; use image_size <= {min(height, width)}"
        )
