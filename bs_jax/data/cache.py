"""Decode a split of images once, in parallel, and keep it on disk as uint8 of one size.

An entry is built in a folder of its own and renamed into place when it is whole, so a half-written
entry is never used, and processes that build the same entry at once do not disturb each other.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any

import numpy as np
from absl import logging

from bs_jax.data.decode import UnreadableError, aspect_ratio, decode_square, strict_decoding
from bs_jax.data.image_data import ArraySplit, ImageData
from bs_jax.errors import UserError

_FORMAT = 2
_MAX_STORED_SIZE = 4096
_BUILDING = ".building-"
_STALE_SECONDS = 24 * 3600
_FAILURES_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Storage:
    """How images of differing size become arrays of one size each.

    Attributes:
      train_size: height and width at which training images are kept, pixels.
      eval_size: the same for evaluation images.
      fit: `"squash"` resizes the whole image to a square, losing nothing of its content (its
        aspect ratio is kept beside it, for the random resized crop); `"crop"` resizes the shorter
        side and cuts out the centre.

    >>> Storage(train_size=160, eval_size=152, fit="squash").eval_size
    152
    """

    train_size: int
    eval_size: int
    fit: str

    def __post_init__(self) -> None:
        for size in (self.train_size, self.eval_size):
            if not 1 <= size <= _MAX_STORED_SIZE:
                raise UserError(f"storage size {size}; use 1 <= size <= {_MAX_STORED_SIZE} pixels")
        if self.fit not in ("squash", "crop"):
            raise UserError(f"storage fit {self.fit!r} is unknown; use 'squash' or 'crop'")


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split as it lies in its source: encoded images, each with a class.

    Attributes:
      names: of the images, for error messages [N].
      labels: class numbers [N].
      class_names: one a class.
      read: yields `(row, fetch)` for each image, in any order; `fetch()` returns its bytes and may
        be called from another thread.
    """

    names: list[str]
    labels: list[int]
    class_names: tuple[str, ...]
    read: Callable[[], Iterator[tuple[int, Callable[[], bytes]]]]


@dataclasses.dataclass(frozen=True)
class CachedSplit:
    """A split from the cache.

    Attributes:
      split: the decoded images, a memory map.
      class_names: one a class.
      checksum: sha256 (hex) over the encoded images, their labels, and how they were resized.
    """

    split: ArraySplit
    class_names: tuple[str, ...]
    checksum: str


def open_or_build(
    cache_dir: pathlib.Path,
    fingerprint: str,
    size: int,
    fit: str,
    source: Callable[[], EncodedSplit],
) -> CachedSplit:
    """Open the cache's entry for a split, decoding the split first if there is none.

    Args:
      cache_dir: folder of all entries; made if missing.
      fingerprint: changes whenever the source does.
      size: height and width of the stored images, pixels.
      fit: `"squash"` or `"crop"`, see `Storage`.
      source: lists the split; called only if it must be decoded.

    Raises:
      UserError: images are unreadable (the first few are named), or the cache cannot be written.
    """
    identity = json.dumps([_FORMAT, fingerprint, size, fit])
    entry = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:32]
    found = _open(entry)
    if found is None:
        try:
            _build(entry, size, fit, source())
        except OSError as error:
            raise UserError(
                f"cannot write decoded images to {cache_dir} ({error.strerror or error}); "
                "choose another folder by cache_dir or XDG_CACHE_HOME"
            ) from error
        found = _open(entry)
    if found is None:
        raise UserError(f"cached images in {entry} vanished or are damaged; delete it and retry")
    return found


def image_data(
    name: str,
    source: str,
    train: CachedSplit,
    evaluation: CachedSplit,
    image_size: int,
    storage: Storage,
) -> ImageData:
    """Two splits of the cache as one data set.

    Args:
      name: what `load` was asked for.
      source: where it comes from, for people.
      train: examples to train on.
      evaluation: examples to evaluate on.
      image_size: height and width that the model sees, pixels.
      storage: how the images are kept.

    Returns:
      The data set; its checksum covers both splits.
    """
    return ImageData(
        name=name,
        train=train.split,
        eval=evaluation.split,
        class_names=train.class_names,
        image_shape=(image_size, image_size, 3),
        checksum=hashlib.sha256((train.checksum + evaluation.checksum).encode()).hexdigest(),
        description=(
            f"{source}: {len(train.split):,} train / {len(evaluation.split):,} eval images, "
            f"{len(train.class_names)} classes, kept at {storage.train_size} / "
            f"{storage.eval_size} px ({storage.fit})"
        ),
    )


def _open(entry: pathlib.Path) -> CachedSplit | None:
    try:
        meta = json.loads((entry / "meta.json").read_text())
        shape = tuple(meta["shape"])
        labels = np.load(entry / "labels.npy")
        aspects = np.load(entry / "aspects.npy")
        # Mapping fails if the file is shorter than the shape; a longer one is no better.
        if (entry / "images.u8").stat().st_size != np.prod(shape) or len(labels) != shape[0]:
            return None
        images = np.memmap(entry / "images.u8", np.uint8, mode="r", shape=shape)
        split = ArraySplit(images, labels, aspects)
        return CachedSplit(split, tuple(meta["class_names"]), meta["checksum"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(entry: pathlib.Path, size: int, fit: str, source: EncodedSplit) -> None:
    root = entry.parent
    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(root)
    count, row_bytes = len(source.names), size * size * 3
    free = shutil.disk_usage(root).free
    if free < count * row_bytes:
        raise UserError(
            f"decoding {count:,} images to {size}x{size} needs {count * row_bytes / 1e6:,.0f} MB "
            f"in {root}, which has {free / 1e6:,.0f} MB free; free some, or choose another folder "
            "by cache_dir or XDG_CACHE_HOME"
        )
    logging.info("decoding %d images to %dx%d into %s", count, size, size, root)
    building = pathlib.Path(tempfile.mkdtemp(prefix=_BUILDING, dir=root))
    try:
        digests, aspects = [b""] * count, np.ones(count, np.float32)
        decoding = contextlib.closing(_decode_all(source, size, fit))
        with open(building / "images.u8", "wb") as file, decoding as decoded:
            for row, pixels, aspect, digest in decoded:
                digests[row], aspects[row] = digest, aspect
                file.seek(row * row_bytes)
                file.write(pixels.data)
            _sync(file)
        arrays = {"labels": np.array(source.labels, np.int32), "aspects": aspects}
        for name, array in arrays.items():
            with open(building / f"{name}.npy", "wb") as file:
                np.save(file, array)
                _sync(file)
        content = json.dumps([_FORMAT, size, fit, source.labels]).encode() + b"".join(digests)
        meta = {
            "shape": [count, size, size, 3],
            "class_names": source.class_names,
            "checksum": hashlib.sha256(content).hexdigest(),
        }
        with open(building / "meta.json", "w") as file:
            json.dump(meta, file)
            _sync(file)
        if entry.exists() and _open(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
        try:
            building.rename(entry)
        except OSError:
            # Another process may have been first: its entry serves as well.
            if _open(entry) is None:
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _decode_all(
    source: EncodedSplit, size: int, fit: str
) -> Generator[tuple[int, np.ndarray, float, bytes]]:
    """Yield (row, pixels, aspect, sha256 of the encoded bytes); raise at the end if any failed."""

    def work(row: int, fetch: Callable[[], bytes]) -> tuple[int, np.ndarray, float, bytes] | str:
        try:
            encoded = fetch()
            pixels = decode_square(encoded, size, fit)
            aspect = aspect_ratio(encoded) if fit == "squash" else 1.0
            return row, pixels, aspect, hashlib.sha256(encoded).digest()
        except OSError as error:
            return f"{source.names[row]!r} ({error.strerror or error})"
        except UnreadableError as error:
            return f"{source.names[row]!r} ({error})"

    failures: list[str] = []
    num_threads = available_cpus()
    # Pillow releases the interpreter lock while it decodes and resizes, so threads suffice. The
    # queue is bounded, since an archive's bytes are read well before they are decoded.
    with strict_decoding(), concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        tasks = source.read()
        running = True
        while running or pending:
            task = next(tasks, None) if running else None
            running = task is not None
            if task is not None:
                pending.append(pool.submit(work, *task))
            if pending and (not running or len(pending) >= 8 * num_threads):
                result = pending.popleft().result()
                if isinstance(result, str):
                    failures.append(result)
                else:
                    yield result
    if failures:
        named = ", ".join(sorted(failures)[:_FAILURES_NAMED])
        more = len(failures) - _FAILURES_NAMED
        raise UserError(
            f"{len(failures)} of {len(source.names):,} images cannot be read: {named}"
            f"{f' and {more} more' if more > 0 else ''}; mend or remove them"
        )


def available_cpus() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sync(file: IO[Any]) -> None:
    # Without this a power cut after the rename could leave the entry in place, but hollow.
    file.flush()
    os.fsync(file.fileno())


def _remove_stale(root: pathlib.Path) -> None:
    for left_over in root.glob(f"{_BUILDING}*"):
        if left_over.stat().st_mtime < time.time() - _STALE_SECONDS:
            shutil.rmtree(left_over, ignore_errors=True)
