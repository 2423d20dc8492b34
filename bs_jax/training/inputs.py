"""The data set that a run names, loaded once however many runs share it."""

from __future__ import annotations

from collections.abc import Hashable

from bs_jax import data, recipe
from bs_jax.data import ImageData


def data_key(settings: recipe.Data) -> Hashable:
    """What decides the loaded data: runs with equal keys share a data set."""
    return (
        settings.name,
        settings.image_size,
        settings.train_storage_size,
        settings.eval_storage_size,
        settings.fit,
    )


def load_data(settings: recipe.Data) -> ImageData:
    """Load the data set of a run.

    Raises:
        UserError: the data is unknown, missing or damaged.
    """
    return data.load(
        settings.name,
        image_size=settings.image_size,
        train_storage_size=settings.train_storage_size or None,
        eval_storage_size=settings.eval_storage_size or None,
        fit=settings.fit,
    )
