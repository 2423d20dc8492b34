"""The embedded data: bit for bit as distributed, split the same way for ever, guarded."""

import gzip
import hashlib
import importlib.resources
import pathlib
import shutil

import numpy as np
import pytest

from bs_jax.data import load
from bs_jax.data.embedded import load_fashion_mnist_10k, stratified_split
from bs_jax.errors import UserError

IMAGES = "t10k-images-idx3-ubyte.gz"
LABELS = "t10k-labels-idx1-ubyte.gz"


def packaged() -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("bs_jax.data") / "embedded"))


@pytest.fixture
def copied(tmp_path):
    for name in (IMAGES, LABELS):
        shutil.copy(packaged() / name, tmp_path)
    return tmp_path


def test_files_are_the_ones_debian_distributes():
    digests = {name: hashlib.sha256((packaged() / name).read_bytes()) for name in (IMAGES, LABELS)}
    assert digests[IMAGES].hexdigest() == (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    )
    assert digests[LABELS].hexdigest() == (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    )
    system_copy = pathlib.Path("/usr/share/datasets/fashion-mnist")
    for name in (IMAGES, LABELS):
        if (system_copy / name).exists():
            assert (system_copy / name).read_bytes() == (packaged() / name).read_bytes()


def test_licence_is_kept():
    text = (packaged() / "LICENSE.fashion-mnist").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


def test_split_is_stratified_and_complete():
    data = load("fashion_mnist_10k", image_size=28)
    assert np.bincount(data.train.labels).tolist() == [800] * 10
    assert np.bincount(data.eval.labels).tolist() == [200] * 10
    raw = np.frombuffer(gzip.decompress((packaged() / IMAGES).read_bytes()), np.uint8, offset=16)
    everything = np.concatenate([data.train.images, data.eval.images]).reshape(10_000, -1)
    # As multisets of images: nothing lost, nothing in both parts.
    assert sorted(map(bytes, everything)) == sorted(map(bytes, raw.reshape(10_000, -1)))


def test_split_never_changes():
    raw = gzip.decompress((packaged() / LABELS).read_bytes())
    train, evaluation = stratified_split(np.frombuffer(raw, np.uint8, offset=8), 800, 2017)
    assert not set(train) & set(evaluation)
    digest = hashlib.sha256(train.astype("<i8").tobytes()).hexdigest()
    assert digest == "e99bad50b3791a27cb5b0f8b0d2f7b713ea7b9b9d363a5ebd34d6d099a9fb683"
    assert load("fashion_mnist_10k", image_size=28).checksum == (
        "9d3af15f10c91c5359e8623ea1e8c11a7828686d379bf82cbf08410ae825b7a8"
    )


def test_description_says_it_is_a_part():
    data = load("fashion_mnist_10k", image_size=28)
    assert "10,000 test images only" in data.description
    assert data.image_shape == data.train.image_shape == (28, 28, 1)


def test_injected_folder_gives_the_same_data(copied):
    assert load_fashion_mnist_10k(copied).checksum == load_fashion_mnist_10k().checksum


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damage_is_reported(copied, name, damage):
    path = copied / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name}.*reinstall") as caught:
        load_fashion_mnist_10k(copied)
    assert "\n" not in str(caught.value)


def test_other_image_size_is_refused():
    with pytest.raises(UserError, match="28-pixel images, not 32"):
        load("fashion_mnist_10k", image_size=32)
