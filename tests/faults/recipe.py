"""A recipe that trains in a second, and a sweep of it, to be killed at every moment."""

from bs_jax.sweep.points import Point, product
from configs import fashion_mnist


def get_config():
    config = fashion_mnist.get_config()
    config.name = "faults"
    config.batch_size = config.base_batch_size = 16
    config.ghost_batch_size = 4
    config.train_examples = 192
    config.eval_every_examples = config.log_every_examples = 32
    config.checkpoint_every_examples = 64
    config.tensorboard = False
    config.scaling.rule = "none"
    config.model.name = "resnet2_patch"
    config.data.name = "synthetic:3x96"
    config.data.image_size = 8
    config.data.mean = config.data.std = (0.4, 0.4, 0.4)
    return config


def sweep_tiny() -> list[Point]:
    """2 rules x 2 batch sizes: 3 runs, as both rules are one at the base."""
    rules = {rule: {"scaling.rule": rule} for rule in ("none", "sqrt")}
    return product(arm=rules, batch_size=(16, 32), seed=(0,))
