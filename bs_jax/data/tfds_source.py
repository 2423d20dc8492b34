"""TensorFlow Datasets by name, from data prepared as array_record; TensorFlow not needed."""

from __future__ import annotations

import difflib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from bs_jax.data import cache
from bs_jax.data.image_data import ImageData
from bs_jax.errors import UserError

_EVAL_NAMES = ("validation", "test")


def load_tfds(
    name: str,
    tfds_name: str,
    image_size: int,
    storage: cache.Storage,
    cache_dir: pathlib.Path,
) -> ImageData:
    """Load an image classification set that TFDS has prepared, decoding it once into the cache.

    Args:
      name: what the result is to be called.
      tfds_name: TFDS's name, `cifar10` or `imagenette/160px-v2`; it is looked for in
        `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`. Evaluation uses its validation split, or the
        test split if it has none. Grey images become RGB.
      image_size: height and width that the model sees, pixels.
      storage: how the images are kept.
      cache_dir: where.

    Raises:
      UserError: TFDS is not installed, the data set is unknown, not prepared, prepared in another
        format, or not one of images with class labels.
    """
    tfds = _import_tfds()
    builder = _prepared_builder(tfds, tfds_name)
    if builder.info.supervised_keys is None:
        raise UserError(f"{name}: TFDS names no image and label in it; use another data set")
    image_key, label_key = builder.info.supervised_keys
    features = builder.info.features
    if not (
        isinstance(features[image_key], tfds.features.Image)
        and isinstance(features[label_key], tfds.features.ClassLabel)
    ):
        raise UserError(f"{name} is not a set of images with class labels; use another data set")
    eval_name = next((split for split in _EVAL_NAMES if split in builder.info.splits), None)
    if eval_name is None or "train" not in builder.info.splits:
        raise UserError(
            f"{name} has splits {', '.join(builder.info.splits) or 'none'}; want train and one of "
            f"{', '.join(_EVAL_NAMES)}"
        )

    def encoded(split: str) -> cache.EncodedSplit:
        source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
        labels = [int(source[row][label_key]) for row in range(len(source))]

        def read() -> Iterator[tuple[int, Callable[[], bytes]]]:
            for row in range(len(source)):
                yield row, functools.partial(bytes, source[row][image_key])

        names = [f"{tfds_name} {split}[{row}]" for row in range(len(source))]
        return cache.EncodedSplit(names, labels, tuple(features[label_key].names), read)

    train, evaluation = (
        cache.open_or_build(
            cache_dir,
            _fingerprint(builder, split),
            size,
            storage.fit,
            functools.partial(encoded, split),
        )
        for split, size in (("train", storage.train_size), (eval_name, storage.eval_size))
    )
    return cache.image_data(
        name, f"TFDS {builder.info.full_name}", train, evaluation, image_size, storage
    )


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"tfds: data sets need TensorFlow Datasets ({error}); install it: "
            "pip install tensorflow-datasets importlib_resources"
        ) from error
    return tfds


def _prepared_builder(tfds: Any, tfds_name: str) -> Any:
    set_name, _, config = tfds_name.partition(":")[0].partition("/")
    try:
        configs = list(tfds.builder_cls(set_name).builder_configs)
        if config and config not in configs:
            hint = _did_you_mean(f"{set_name}/", config, configs)
            raise UserError(f"TFDS knows no {tfds_name!r}{hint}")
        # TFDS itself reads the variable only once, when it is imported.
        data_dir = os.environ.get("TFDS_DATA_DIR") or None
        builder = tfds.builder(tfds_name, data_dir=data_dir, file_format="array_record")
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = _did_you_mean("tfds:", set_name, known)
        raise UserError(f"TFDS knows no data set {tfds_name!r}{hint}") from error
    # What TFDS raises for a wrong version or a malformed name varies.
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"TFDS cannot open {tfds_name!r} ({type(error).__name__}: {reason})"
        ) from error
    stored = builder.info.file_format
    if not builder.is_prepared() or stored is None or stored.value != "array_record":
        state = "not prepared" if not builder.is_prepared() else f"prepared as {stored}"
        raise UserError(
            f"tfds:{tfds_name} is {state} in {builder.data_dir}; prepare it, which needs "
            "TensorFlow (pip install 'bs_jax[tf]'): python -c \"import tensorflow_datasets as t; "
            f"t.builder('{tfds_name}', file_format='array_record').download_and_prepare()\""
        )
    return builder


def _did_you_mean(prefix: str, wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _fingerprint(builder: Any, split: str) -> str:
    status = [os.stat(path) for path in builder.info.splits[split].filepaths]
    sizes = [(s.st_size, s.st_mtime_ns) for s in status]
    return json.dumps(["tfds", builder.info.full_name, split, sizes])
