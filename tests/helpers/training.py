"""A tiny data set, a tiny recipe and short runs of the real trainer for the tests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from bs_jax.data.image_data import ArraySplit, ImageData
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.sweep.points import apply_overrides, resolve
from bs_jax.training import optimizers
from bs_jax.training.train import Trainer

SIZE = 8  # pixels
# Images as they are stored, where chance does not matter: a third less to compile.
PLAIN = {"data.flip": False, "data.crop_padding": 0}


def tiny_data(train: int = 96, evaluation: int = 20) -> ImageData:
    """Three classes told apart by where the image is bright."""
    rng = np.random.default_rng(0)

    def split(count: int) -> ArraySplit:
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, SIZE, SIZE, 1), dtype=np.uint8)
        for index, label in enumerate(labels):
            images[index, 2 * label : 2 * label + 3] += 110
        return ArraySplit(images, labels.astype(np.int32))

    return ImageData(
        name="tiny",
        train=split(train),
        eval=split(evaluation),
        class_names=("top", "middle", "bottom"),
        image_shape=(SIZE, SIZE, 1),
        checksum="0" * 64,
        description="three bright bands",
    )


def tiny_config(**overrides) -> dict:
    """The Fashion-MNIST recipe, cut down to a second of training."""
    from configs.fashion_mnist import get_config

    config = json.loads(get_config().to_json())
    small = {
        "batch_size": 16,
        "base_batch_size": 16,
        "train_examples": 192,
        "scaling.rule": "none",
        "ghost_batch_size": 4,
        "optimizer.hyperparams.learning_rate": 2e-3,
        "data.flip": True,
        "data.image_size": SIZE,
        "data.crop_padding": 1,
        "data.mean": (0.3,),
        "data.std": (0.3,),
        "model.name": "resnet2_patch",
        "eval_batch_size": 8,
        "eval_every_examples": 96,
        "log_every_examples": 32,
        "checkpoint_every_examples": 96,
        "tensorboard": False,
    }
    return apply_overrides(config, small | overrides)


_TRAINERS: dict[tuple[str, int, bool], Trainer] = {}


def trainer_of(run: ResolvedRun, *, devices: int = 1, vmapped: bool = False) -> Trainer:
    """The trainer on the tiny data of every run that shares this run's programs.

    Tracing and compiling them takes far longer than a run. A test that changes what a trainer is
    made of makes its own.
    """
    key = (optimizers.cohort_key(run), devices, vmapped)
    if key not in _TRAINERS:
        made = Trainer(run, tiny_data(), jax.devices()[:devices], vmapped=vmapped)
        _TRAINERS[key] = made
    return _TRAINERS[key]


def train(path: Path, overrides: dict | None = None, *, devices: int = 1, **kwargs) -> list[dict]:
    """Train one run of the tiny recipe and return its rows of metrics."""
    run = resolve(tiny_config(**(overrides or {})))
    trainer_of(run, devices=devices).train([RunFolder(path, run)], **kwargs)
    return rows(path)


def rows(path: Path) -> list[dict]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[tuple[str, str]]]:
    """A list that every trace, lowering and compilation is added to, with the program's name."""
    found: list[tuple[str, str]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append((event.rsplit("/", 1)[-1], str(kwargs.get("fun_name"))))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
