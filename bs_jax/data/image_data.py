"""The one protocol every data source serves: two splits of uint8 images with integer labels."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Split(Protocol):
    """Labelled uint8 images, read by position."""

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, int32 [N]."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of the images as stored."""
        ...

    @property
    def aspects(self) -> np.ndarray:
        """Width over height of the images before they were stored, float32 [N]."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return a fresh uint8 array [n, H, W, C] of the images at `indices` (integers [n])."""
        ...


class ArraySplit:
    """A `Split` over one uint8 array, in memory or a memory map of a file.

    Args:
      images: uint8 [N, H, W, C].
      labels: integers [N].
      aspects: width over height of the images before they were stored, where storing them changed
        it; `None`: that of the stored ones.

    >>> split = ArraySplit(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1]))
    >>> len(split), split.image_shape, split.read(np.array([3, 0])).shape
    (4, (2, 2, 1), (2, 2, 2, 1))
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, aspects: np.ndarray | None = None
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise TypeError(f"images: want uint8 [N, H, W, C], got {images.dtype} {images.shape}")
        if labels.shape != (len(images),):
            raise TypeError(f"labels: want shape ({len(images)},), got {labels.shape}")
        self._images = np.asarray(images)
        self._labels = labels.astype(np.int32)
        self._labels.flags.writeable = False
        if aspects is None:
            aspects = np.full(len(images), images.shape[2] / images.shape[1])
        if aspects.shape != labels.shape:
            raise TypeError(f"aspects: want shape {labels.shape}, got {aspects.shape}")
        self._aspects = aspects.astype(np.float32)
        self._aspects.flags.writeable = False

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 [N, H, W, C], without a copy."""
        return self._images

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, int32 [N]."""
        return self._labels

    @property
    def aspects(self) -> np.ndarray:
        """Width over height of the images before they were stored, float32 [N]."""
        return self._aspects

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of the images as stored."""
        height, width, channels = self._images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return a fresh uint8 array [n, H, W, C] of the images at `indices` (integers [n])."""
        return np.take(np.asarray(self._images), indices, axis=0)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set for classification.

    Attributes:
      name: what `load` was asked for.
      train: examples to train on, stored as the augmentation wants them.
      eval: examples to evaluate on, disjoint from `train`.
      class_names: one name a class, in label order.
      image_shape: (H, W, C) that the model sees, after augmentation or centre crop.
      checksum: sha256 (hex) of the content, equal wherever the same data is loaded the same way.
      description: one line for people.
    """

    name: str
    train: Split
    eval: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    checksum: str
    description: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
