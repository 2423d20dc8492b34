"""Data sets by name: embedded, folder of images, TFDS, synthetic; all served as `ImageData`."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import re
import tempfile

import numpy as np

from bs_jax.data import embedded
from bs_jax.data.cache import Storage
from bs_jax.data.image_data import ArraySplit, ImageData
from bs_jax.errors import UserError
from bs_jax.records.stores import local_path

_FORMS = (embedded.NAME, "folder:PATH", "tfds:NAME", "synthetic:CLASSESxEXAMPLES")


def load(
    name: str,
    *,
    image_size: int,
    train_storage_size: int | None = None,
    eval_storage_size: int | None = None,
    fit: str = "squash",
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Load a data set by name.

    Args:
      name: `fashion_mnist_10k`; `folder:PATH`, a folder or .tar/.tgz archive with class folders
        under train/ and val/; `tfds:NAME` or `tfds:NAME/CONFIG`; `synthetic:CLASSESxEXAMPLES`.
      image_size: height and width that the model sees, pixels.
      train_storage_size: at which training images are kept (folder and TFDS); `None`: `image_size`.
      eval_storage_size: at which evaluation images are kept; `None`: `image_size`.
      fit: see `Storage`.
      cache_dir: where decoded images are kept (folder and TFDS); `None` means
        `$XDG_CACHE_HOME/bs_jax`, or `~/.cache/bs_jax`.

    Returns:
      The training and evaluation splits.

    Raises:
      UserError: the name is unknown, or the data is missing, damaged or of another size.

    >>> load("fashion_mnist_10k", image_size=28).num_classes
    10
    """
    sizes = [image_size if s is None else s for s in (train_storage_size, eval_storage_size)]
    storage = Storage(*sizes, fit=fit)
    if image_size < 1 or image_size > storage.eval_size:
        raise UserError(
            f"image_size {image_size} must be between 1 and the size at which evaluation images "
            f"are kept, {storage.eval_size}; raise eval_storage_size"
        )
    kind, _, rest = name.partition(":")
    if name == embedded.NAME:
        wanted = {image_size, storage.train_size, storage.eval_size}
        if wanted != {embedded.IMAGE_SIZE}:
            raise UserError(
                f"{name} has {embedded.IMAGE_SIZE}-pixel images, not {max(wanted)}; "
                f"use image_size={embedded.IMAGE_SIZE} and no other storage size"
            )
        return embedded.load_fashion_mnist_10k()
    if kind == "synthetic" and rest:
        return _synthetic(name, rest, image_size, storage)
    if kind == "folder" and rest:
        from bs_jax.data import folder

        path = local_path(rest, "folder:")
        return folder.load_folder(name, path, image_size, storage, _cache(cache_dir))
    if kind == "tfds" and rest:
        from bs_jax.data import tfds_source

        return tfds_source.load_tfds(name, rest, image_size, storage, _cache(cache_dir))
    raise UserError(_unknown(name, kind))


def _cache(cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    if cache_dir is not None:
        return local_path(str(cache_dir), "cache_dir")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base:
        return local_path(base, "XDG_CACHE_HOME") / "bs_jax"
    try:
        return pathlib.Path.home() / ".cache" / "bs_jax"
    except RuntimeError:  # a user without $HOME and without an entry in the list of users
        return _temporary_cache()


def _temporary_cache() -> pathlib.Path:
    """A folder of this user among the temporary files."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"bs_jax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise UserError(
            f"no folder for the cache of images ({error}); set XDG_CACHE_HOME"
        ) from error
    if owner != os.getuid():
        raise UserError(
            f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of yours"
        )
    return folder


def _unknown(name: str, kind: str) -> str:
    if kind in ("folder", "tfds", "synthetic"):
        form = next(form for form in _FORMS if form.startswith(kind))
        return f"data set {name!r} is incomplete; write {form}"
    names = {embedded.NAME: embedded.NAME, "folder": _FORMS[1], "tfds": _FORMS[2]}
    names["synthetic"] = _FORMS[3]
    near = difflib.get_close_matches(name if ":" not in name else kind, names, n=1)
    suggestion = f"did you mean {names[near[0]]}? " if near else ""
    return f"unknown data set {name!r}; {suggestion}known: {', '.join(_FORMS)}"


def _synthetic(name: str, rest: str, image_size: int, storage: Storage) -> ImageData:
    match = re.fullmatch(r"(\d{1,4})x(\d{1,7})", rest)
    num_classes, num_train = map(int, match.groups()) if match else (0, 0)
    num_eval = num_train // 4
    if not 2 <= num_classes <= num_eval:
        raise UserError(
            f"data set {name!r}: want synthetic:CLASSESxEXAMPLES with at least 2 classes and 4 "
            "training examples a class, such as synthetic:4x64"
        )
    # Each class is a coarse pattern of its own under noise: learnable, and the same everywhere.
    rng = np.random.default_rng(num_classes)
    patterns = rng.integers(64, 192, (num_classes, 4, 4, 3))

    def split(count: int, size: int, seed: int) -> ArraySplit:
        labels = np.arange(count) % num_classes
        cell = np.arange(size) * 4 // size
        images = patterns[labels][:, cell[:, None], cell[None, :]]
        noise = np.random.default_rng(seed).integers(-63, 64, images.shape)
        return ArraySplit((images + noise).astype(np.uint8), labels)

    train = split(num_train, storage.train_size, seed=1)
    evaluation = split(num_eval, storage.eval_size, seed=2)
    digest = hashlib.sha256(train.images.tobytes() + evaluation.images.tobytes())
    return ImageData(
        name=name,
        train=train,
        eval=evaluation,
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        image_shape=(image_size, image_size, 3),
        checksum=digest.hexdigest(),
        description=f"synthetic patterns under noise, {num_train:,} train / {num_eval:,} eval",
    )
