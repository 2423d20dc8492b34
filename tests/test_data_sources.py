"""Data sets by name: one protocol behind all of them, and errors that help."""

import re

import numpy as np
import pytest

from bs_jax.data import ArraySplit, ImageData, Split, load
from bs_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "image_size"), [("fashion_mnist_10k", 28), ("synthetic:3x40", 12)]
)
def test_every_source_serves_the_protocol(name, image_size):
    data = load(name, image_size=image_size)
    assert isinstance(data, ImageData)
    assert data.name == name
    assert re.fullmatch("[0-9a-f]{64}", data.checksum)
    assert "\n" not in data.description
    for split in (data.train, data.eval):
        assert isinstance(split, Split)
        assert split.labels.dtype == np.int32
        assert split.labels.shape == (len(split),)
        assert set(split.labels.tolist()) == set(range(data.num_classes))
        images = split.read(np.array([2, 0, 2]))
        assert images.dtype == np.uint8
        assert images.shape == (3, *split.image_shape)
        assert split.image_shape[-1] == data.image_shape[-1]
        np.testing.assert_array_equal(images[0], images[2])
        images[:] = 0
        assert split.read(np.array([2])).any()
        with pytest.raises(ValueError, match="read-only"):
            split.labels[0] = 1


def test_arrays_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        ArraySplit(np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int))
    with pytest.raises(TypeError, match="labels"):
        ArraySplit(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int))


def test_synthetic_data_is_deterministic_and_learnable():
    data = load("synthetic:4x64", image_size=8)
    assert load("synthetic:4x64", image_size=8).checksum == data.checksum
    assert (len(data.train), len(data.eval)) == (64, 16)
    train = data.train.read(np.arange(64)).reshape(64, -1).astype(float)
    means = np.stack([train[data.train.labels == label].mean(0) for label in range(4)])
    found = data.eval.read(np.arange(16)).reshape(16, 1, -1)
    nearest = ((found - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == data.eval.labels).all()


def test_synthetic_data_at_storage_sizes():
    data = load("synthetic:2x8", image_size=8, train_storage_size=10, eval_storage_size=9)
    assert data.train.image_shape == (10, 10, 3)
    assert data.eval.image_shape == (9, 9, 3)
    assert data.image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fashion_mnist", "did you mean fashion_mnist_10k"),
        ("fashon_mnist_10k", "did you mean fashion_mnist_10k"),
        ("fodler:/data", "did you mean folder:PATH"),
        ("tfd:cifar10", "did you mean tfds:NAME"),
        ("zzz", "known: fashion_mnist_10k"),
        ("", "known: fashion_mnist_10k"),
        ("folder:", "write folder:PATH"),
        ("tfds", "write tfds:NAME"),
        ("synthetic:", "write synthetic:"),
        ("synthetic:ten", "want synthetic:CLASSESxEXAMPLES"),
        ("synthetic:1x100", "at least 2 classes"),
        ("synthetic:4x15", "4 training examples a class"),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(UserError) as caught:
        load(name, image_size=8)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"image_size": 0}, "storage size 0"),
        ({"image_size": -3}, "storage size -3"),
        ({"image_size": 16, "eval_storage_size": 8}, "raise eval_storage_size"),
        ({"image_size": 8, "train_storage_size": 10**6}, "storage size 1000000"),
        ({"image_size": 8, "fit": "stretch"}, "'squash' or 'crop'"),
    ],
)
def test_impossible_sizes(options, hint):
    with pytest.raises(UserError) as caught:
        load("synthetic:2x8", **options)
    assert hint in str(caught.value)
