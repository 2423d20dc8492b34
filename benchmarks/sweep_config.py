"""Sixteen small runs to be timed: the Fashion-MNIST recipe at four batch sizes, four seeds."""

import ml_collections

from bs_jax.sweep.points import Point, product
from configs.fashion_mnist import get_config as fashion_mnist

BATCH_SIZES = (8, 16, 32, 64)
SEEDS = (0, 1, 2, 3)


def get_config() -> ml_collections.ConfigDict:
    """The recipe, a quarter as long, evaluated once."""
    config = fashion_mnist()
    config.name = "timed"
    config.train_examples = 7_680
    config.eval_every_examples = 7_680
    config.scaling.rule = "sqrt"
    return config


def sweep_timed() -> list[Point]:
    """16 points of one arm."""
    return product(arm={"sqrt": {}}, batch_size=BATCH_SIZES, seed=SEEDS)
