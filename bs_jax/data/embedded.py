"""The data set that ships with the project: the 10,000 test images of Fashion-MNIST.

A checkout has its files in ``bs_jax/data/embedded/``. The wheel of bs_jax has them not, so that
they do not weigh on who wants the library alone; there the distribution ``bs_jax_fashion_mnist``
brings them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
from importlib.resources.abc import Traversable

import numpy as np

from bs_jax.data.image_data import ArraySplit, ImageData
from bs_jax.errors import UserError

NAME = "fashion_mnist_10k"
IMAGE_SIZE = 28
_TRAIN_EXAMPLES_PER_CLASS = 800
_SPLIT_SEED = 2017
_IMAGES_FILE = "t10k-images-idx3-ubyte.gz"
_LABELS_FILE = "t10k-labels-idx1-ubyte.gz"
_SHA256 = {
    _IMAGES_FILE: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    _LABELS_FILE: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_REINSTALL = "check the file out again, or reinstall bs_jax_fashion_mnist"
_IMAGES_HEADER = bytes.fromhex("00000803000027100000001c0000001c")
_LABELS_HEADER = bytes.fromhex("0000080100002710")
_CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist_10k(folder: Traversable | None = None) -> ImageData:
    """Load the embedded Fashion-MNIST t10k part, split 8,000 / 2,000, stratified, always alike.

    Args:
      folder: where the two files lie; `None` means the project's own copy.

    Returns:
      Greyscale images [28, 28, 1]; 800 training and 200 evaluation examples of each class.

    Raises:
      UserError: the files are not installed, or the sha256 of one is not the one expected.

    >>> data = load_fashion_mnist_10k()
    >>> len(data.train), len(data.eval), data.train.image_shape
    (8000, 2000, (28, 28, 1))

    Reference: Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017.
    """
    folder = _installed() if folder is None else folder
    pixels = _read_verified(folder, _IMAGES_FILE, _IMAGES_HEADER)
    labels = _read_verified(folder, _LABELS_FILE, _LABELS_HEADER)
    images = pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    train, evaluation = stratified_split(labels, _TRAIN_EXAMPLES_PER_CLASS, _SPLIT_SEED)
    fingerprint = "".join(_SHA256.values()).encode() + train.astype("<i8").tobytes()
    return ImageData(
        name=NAME,
        train=ArraySplit(images[train], labels[train]),
        eval=ArraySplit(images[evaluation], labels[evaluation]),
        class_names=_CLASS_NAMES,
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1),
        checksum=hashlib.sha256(fingerprint).hexdigest(),
        description=(
            "Fashion-MNIST, its 10,000 test images only, split 8,000 train / 2,000 eval "
            "(800 / 200 a class, fixed); not comparable with results on the full 60,000"
        ),
    )


def stratified_split(
    labels: np.ndarray, train_per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split positions so that each class gives `train_per_class` examples to the first part.

    Args:
      labels: integers [N].
      train_per_class: examples of each class in the first part; the rest go to the second.
      seed: chooses which; the choice is the same on every machine and NumPy version, since it uses
        Philox's raw output only, which NumPy keeps fixed.

    Returns:
      Two sorted int64 arrays of positions, disjoint, together all of 0..N-1.

    >>> first, second = stratified_split(np.array([0, 1, 0, 1, 0, 1]), 2, seed=0)
    >>> len(first), len(second), np.intersect1d(first, second).size
    (4, 2, 0)
    """
    first, second = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key = np.array([seed, int(label)], np.uint64)
        shuffled = members[np.argsort(np.random.Philox(key=key).random_raw(len(members)))]
        first.append(shuffled[:train_per_class])
        second.append(shuffled[train_per_class:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _installed() -> Traversable:
    """Where the project's own copy lies."""
    checkout = importlib.resources.files("bs_jax.data") / "embedded"
    if checkout.is_dir():
        return checkout
    try:
        return importlib.resources.files("bs_jax_fashion_mnist")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the images of {NAME} are not in the wheel of bs_jax; install the wheel "
            "bs_jax_fashion_mnist, or give pip install CHECKOUT/bs_jax/data/embedded, or name "
            "other data, such as --config.data.name=folder:PATH"
        ) from error


def _read_verified(folder: Traversable, name: str, header: bytes) -> np.ndarray:
    try:
        packed = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"embedded data file {name} cannot be read ({error}); {_REINSTALL}"
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != _SHA256[name]:
        raise UserError(
            f"embedded data file {name} is corrupt: {len(packed):,} bytes with sha256 "
            f"{found[:12]}..., want {_SHA256[name][:12]}...; {_REINSTALL}"
        )
    content = gzip.decompress(packed)
    if not content.startswith(header):
        raise UserError(f"embedded data file {name} is not the IDX file expected; {_REINSTALL}")
    return np.frombuffer(content, np.uint8, offset=len(header))
