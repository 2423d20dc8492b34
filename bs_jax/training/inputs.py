"""The data set that a config names, loaded once however many runs share it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bs_jax import data
from bs_jax.data import ImageData

_FIELDS = ("name", "image_size", "train_storage_size", "eval_storage_size", "fit")


def data_key(config: Mapping[str, Any]) -> str:
    """What decides the loaded data: configs with equal keys share a data set."""
    return json.dumps([config["data"][field] for field in _FIELDS])


def load_data(config: Mapping[str, Any]) -> ImageData:
    """Load the data set of a config.

    Raises:
        UserError: the data is unknown, missing or damaged.
    """
    settings = config["data"]
    return data.load(
        settings["name"],
        image_size=settings["image_size"],
        train_storage_size=settings["train_storage_size"] or None,
        eval_storage_size=settings["eval_storage_size"] or None,
        fit=settings["fit"],
    )
