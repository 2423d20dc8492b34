"""TFDS by name, without TensorFlow: real array_record files, read through TFDS itself."""

import io
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from bs_jax.data import load
from bs_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")


def png(index: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    colour = (index, 0, 9) if mode == "RGB" else index
    Image.new(mode, (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(root, name: str, splits: dict[str, int], mode: str = "RGB") -> None:
    """Write what TFDS's own preparation would, which needs TensorFlow."""
    example_proto = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    infos = []
    for split, count in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_dir,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="array_record",
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        for i in range(count):
            example = example_proto.Example()
            features = example.features.feature
            features["image"].bytes_list.value.append(png(i, mode))
            features["label"].int64_list.value.append(i % 10)
            if "id" in builder.info.features:
                features["id"].bytes_list.value.append(b"id")
            writer.write(example.SerializeToString())
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[count], num_bytes=1, filename_template=template
            )
        )
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(builder.data_dir)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("cifar10", {"train": 20, "test": 10}),
        ("imagenette/160px-v2", {"train": 20, "validation": 10}),
    ],
)
def test_prepared_data_is_read(tmp_path, root, name, splits):
    prepare(root, name, splits)
    data = load(f"tfds:{name}", image_size=16, cache_dir=tmp_path / "cache")
    assert (len(data.train), len(data.eval)) == (20, 10)
    assert data.num_classes == 10
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    images = data.train.read(np.arange(20))
    assert images.shape == (20, 16, 16, 3)
    assert images[:, 5, 5].tolist() == [[i, 0, 9] for i in range(20)]
    assert name.split("/")[0] in data.description
    again = load(f"tfds:{name}", image_size=16, cache_dir=tmp_path / "cache")
    assert again.checksum == data.checksum


def test_grey_images_become_rgb(tmp_path, root):
    prepare(root, "mnist", {"train": 20, "test": 10}, mode="L")
    data = load("tfds:mnist", image_size=28, cache_dir=tmp_path)
    assert data.eval.read(np.array([7]))[0, 3, 3].tolist() == [7, 7, 7]


def message(name: str, cache_dir) -> str:
    with pytest.raises(UserError) as caught:
        load(name, image_size=16, cache_dir=cache_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unprepared_data_says_how_to_prepare(tmp_path, root):
    found = message("tfds:cifar10", tmp_path)
    assert "not prepared" in found
    assert "bs_jax[tf]" in found
    assert "t.builder('cifar10', file_format='array_record').download_and_prepare()" in found


def test_missing_split_is_named(tmp_path, root):
    prepare(root, "cifar10", {"train": 20})
    assert "has splits train; want" in message("tfds:cifar10", tmp_path)


def test_unknown_names(tmp_path, root):
    assert "did you mean tfds:cifar10" in message("tfds:cifar11", tmp_path)
    assert "did you mean imagenette/160px-v2" in message("tfds:imagenette/160p-v2", tmp_path)
    for odd in ("cifar10:9.9.9", "cifar10:x", "../x", "a/b/c", "Cifar10", " "):
        assert repr(odd)[:4] in message(f"tfds:{odd}", tmp_path)


def test_without_tfds_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install tensorflow-datasets" in message("tfds:cifar10", tmp_path)
