"""Images for training: sources by name, augmentation on the device, the order of examples."""

from bs_jax.data.augment import AugmentSpec, RandomResizedCrop, augment, prepare_eval
from bs_jax.data.cache import Storage
from bs_jax.data.image_data import ArraySplit, ImageData, Split
from bs_jax.data.pipeline import (
    check_batch_size,
    device_arrays,
    device_budget_bytes,
    eval_batches,
    example_order,
    fits_on_device,
    num_bytes,
    process_columns,
)
from bs_jax.data.sources import load
from bs_jax.data.streaming import stream

__all__ = [
    "ArraySplit",
    "AugmentSpec",
    "ImageData",
    "RandomResizedCrop",
    "Split",
    "Storage",
    "augment",
    "check_batch_size",
    "device_arrays",
    "device_budget_bytes",
    "eval_batches",
    "example_order",
    "fits_on_device",
    "load",
    "num_bytes",
    "prepare_eval",
    "process_columns",
    "stream",
]
