"""Whether the images keep up: decoding, augmentation, moving, streaming; images a second.

python -m benchmarks.input --model=xresnet50 --image_size=64 --batch_size=32 --json=F

`busy` is how much of the time a device computes while a training streams its data from a
memory-mapped file, which it must where they do not fit: the time of the same updates with all data
on the device, over that of the streamed ones. Once with the file in the page cache, and once with
none of it in memory: it is thrown out before every read. `disk_bytes_per_image` says what that read
(the kernel reads ahead). The last row of the table tells the rate that the training asks for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _measure, _programs
from bs_jax.data import AugmentSpec, RandomResizedCrop, augment, decode, streaming
from bs_jax.data.image_data import ArraySplit


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="xresnet50", help="that the data are streamed to")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="examples an update")
    parser.add_argument("--steps", type=int, default=4, help="updates a chunk")
    parser.add_argument("--chunks", type=int, default=4, help="chunks that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = _on_disk(Path(folder), flags)
        evicted = _Evicted(data, Path(folder) / "evicted.npy")
        parts = {
            "decode JPEG, one thread": (_decode(1), _JPEGS),
            "decode JPEG, all threads": (_decode(os.cpu_count() or 1), _JPEGS),
            "augment (crop, resize, flip)": _augmentation(flags, data),
            "host to device": _transfer(flags, data),
            "read from the memory map": _read(flags, data),
            "read from the disk": _read(flags, evicted),
        }
        times = _measure.interleave({n: run for n, (run, _) in parts.items()}, rounds=flags.rounds)
        rates = {name: count / min(times[name]) for name, (_, count) in parts.items()}
        busy, needed, disk = _busy(flags, data, evicted)
    rates["needed by the training"] = needed
    for name, rate in rates.items():
        print(f"{name:32s} {rate:12,.0f} images/s")
    for source, share in busy.items():
        print(f"device busy while data are streamed from {source}: {share:.1%}")
    print(f"read from the disk for an image: {disk:,.0f} bytes")
    result = {
        **{k: getattr(flags, k) for k in ("model", "image_size", "batch_size", "steps")},
        "images_per_second": rates,
        "busy": busy,
        "disk_bytes_per_image": disk,
        "bytes_per_image": int(np.prod(data.image_shape)),
        "environment": _measure.environment(),
    }
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


_JPEGS = 64
_MEMORY, _DISK = "the page cache", "the disk"


class _Evicted(ArraySplit):
    """A memory-mapped file of which nothing is in memory when a read begins (on Linux)."""

    def __init__(self, data: ArraySplit, path: Path) -> None:
        np.save(path, data.images)  # a file of its own: what another map holds stays in memory
        self._map = np.load(path, mmap_mode="r")
        super().__init__(self._map, data.labels)
        self._file = os.open(path, os.O_RDONLY)
        os.fsync(self._file)  # only what is on the disk can be thrown out
        self._evict()

    def _evict(self) -> None:
        # Pages that are mapped stay in the cache: unmap them first.
        self._map._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, indices: np.ndarray) -> np.ndarray:
        self._evict()
        return super().read(indices)


def _bytes_read() -> int:
    """Bytes that this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _on_disk(folder: Path, flags: argparse.Namespace) -> ArraySplit:
    """Images in a memory-mapped file, as the cache of decoded data holds them."""
    made = _programs.make_images(
        flags.steps * flags.chunks * flags.batch_size, flags.image_size * 5 // 4
    )
    np.save(folder / "images.npy", made.images)
    return ArraySplit(np.load(folder / "images.npy", mmap_mode="r"), made.labels)


def _decode(threads: int) -> Callable[[], None]:
    from PIL import Image

    draw = np.random.default_rng(0)
    smooth = draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).resize((200, 160), Image.Resampling.BICUBIC).save(file, "JPEG")
    encoded = file.getvalue()
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def run() -> None:
        list(pool.map(lambda _: decode.decode_square(encoded, 160, "squash"), range(_JPEGS)))

    return run


def _augmentation(flags: argparse.Namespace, data: ArraySplit) -> tuple[Callable[[], Any], int]:
    spec = AugmentSpec(flags.image_size, flip=True, random_resized_crop=RandomResizedCrop(0.35, 1))
    images = jnp.asarray(data.read(np.arange(flags.batch_size)))
    apply = jax.jit(lambda images, at: augment(jax.random.key(0), at, images, spec))
    positions = jnp.arange(flags.batch_size, dtype=jnp.int32)
    return lambda: apply(images, positions), flags.batch_size


def _transfer(flags: argparse.Namespace, data: ArraySplit) -> tuple[Callable[[], Any], int]:
    images = data.read(np.arange(flags.batch_size * flags.steps))
    return lambda: jax.device_put(images), len(images)


def _read(flags: argparse.Namespace, data: ArraySplit) -> tuple[Callable[[], None], int]:
    order = np.random.default_rng(0).permutation(len(data))[: flags.batch_size * flags.steps]

    def run() -> None:
        data.read(order)

    return run, len(order)


def _busy(
    flags: argparse.Namespace, data: ArraySplit, evicted: _Evicted
) -> tuple[dict[str, float], float, float]:
    """Shares of the time that the device computes, images a second with all data on it, and the
    bytes read for an image that is not in memory.
    """
    run = _programs.make_run(
        flags.model, flags.image_size, flags.batch_size, **{"data.crop_area": (0.35, 1.0)}
    )
    resident = _programs.train_chunks(run, data, flags.steps)
    streamed = _programs.streamed_chunks(run, data)
    orders = np.random.default_rng(0).permutation(len(data)).astype(np.int32)
    orders = list(orders.reshape(flags.chunks, flags.steps, flags.batch_size))
    disk = []

    def with_all_data() -> Any:
        for _ in orders:
            metrics = resident()
        return metrics

    def from_the_stream(split: ArraySplit) -> Any:
        before = _bytes_read()
        for part in streaming.stream(split, orders):
            metrics = streamed(part)
        disk.append((_bytes_read() - before) / len(data))
        return metrics

    streamed_first = next(iter(streaming.stream(data, orders[:1])))
    jax.block_until_ready(streamed(streamed_first))
    programs = {
        "resident": with_all_data,
        _MEMORY: lambda: from_the_stream(data),
        _DISK: lambda: from_the_stream(evicted),
    }
    times = _measure.interleave(programs, rounds=flags.rounds, warmup=1)
    rows = _measure.summary(times, against="resident")
    images = flags.chunks * flags.steps * flags.batch_size
    busy = {source: 1 / rows[source]["ratio"] for source in (_MEMORY, _DISK)}
    return busy, images / rows["resident"]["seconds"], max(disk)


if __name__ == "__main__":
    main()
