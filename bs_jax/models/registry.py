"""The named architectures: `create("resnet18", num_classes=10)`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bs_jax.errors import UserError
from bs_jax.models.resnet import ResNet
from bs_jax.models.xresnet import XResNet

_XSE_RESNEXT50 = partial(
    XResNet, stage_sizes=(3, 4, 6, 3), groups=32, squeeze_excite=True, self_attention=True
)

_CATALOGUE: dict[str, Callable[..., nn.Module]] = {
    # For tests: the stem alone, and one block behind it.
    "resnet2_patch": partial(ResNet, stage_sizes=(0,), widths=(8,), stem="patch4"),
    "resnet4_patch": partial(ResNet, stage_sizes=(1,), widths=(8,), stem="patch4"),
    # For 28 to 32 pixels on CPU: maps of 7x7, 4x4 and 2x2; 77,866 parameters with 10 classes. On
    # Fashion-MNIST 1.6 times as quick as 2x2 patches with half the widths, and six points better
    # after 30,000 images (.842, sd .002, at batch 64); about 11,000 training images/s on one core.
    "resnet8_patch": partial(ResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64), stem="patch4"),
    "resnet8": partial(ResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64), stem="cifar"),
    "resnet14": partial(ResNet, stage_sizes=(2, 2, 2), widths=(16, 32, 64), stem="cifar"),
    "resnet20": partial(ResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64), stem="cifar"),
    "resnet18": partial(ResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "resnet34": partial(ResNet, stage_sizes=(3, 4, 6, 3), widths=(64, 128, 256, 512)),
    "resnet50": partial(
        ResNet, stage_sizes=(3, 4, 6, 3), widths=(64, 128, 256, 512), bottleneck=True
    ),
    "resnet18_cifar": partial(
        ResNet, stage_sizes=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="cifar"
    ),
    # For 32 to 64 pixels on CPU.
    "xresnet10_small": partial(
        XResNet,
        stage_sizes=(1, 1, 1, 1),
        widths=(16, 32, 64, 128),
        stem_widths=(8, 8, 16),
        expansion=1,
    ),
    "xresnet18": partial(XResNet, stage_sizes=(2, 2, 2, 2), expansion=1),
    "xresnet34": partial(XResNet, stage_sizes=(3, 4, 6, 3), expansion=1),
    "xresnet50": partial(XResNet, stage_sizes=(3, 4, 6, 3)),
    "xse_resnext50": partial(_XSE_RESNEXT50, shortcut_pool="max"),
    "xse_resnext50_blur": partial(_XSE_RESNEXT50, shortcut_pool="max_blur"),
}


def names() -> tuple[str, ...]:
    """The names that `create` accepts."""
    return tuple(_CATALOGUE)


def create(
    name: str,
    num_classes: int,
    *,
    dtype: Any = jnp.float32,
    ghost_batch_size: int | None = None,
    axis_name: str | None = None,
) -> nn.Module:
    """An architecture by its name.

    Args:
        name: one of `names()`.
        num_classes: length of the logits.
        dtype: of the computation; parameters, running statistics and logits are float32.
        ghost_batch_size: examples that BatchNorm normalises together; None or 0: the local batch.
        axis_name: mapped axis over which BatchNorm shares its statistics; None: not shared.

    Returns:
        A linen module: ``module.apply(variables, images, train=True, bn_decay=0.9,
        mutable=["batch_stats"])`` gives float32 logits and the new statistics.

    Raises:
        UserError: there is no such name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = create("resnet8_patch", num_classes=10)
        >>> images = jnp.zeros((2, 28, 28, 1))
        >>> init, apply = (jax.jit(f, static_argnames="train") for f in (model.init, model.apply))
        >>> variables = init(jax.random.key(0), images, train=False)
        >>> apply(variables, images, train=False).shape
        (2, 10)
    """
    if name not in _CATALOGUE:
        close = difflib.get_close_matches(name, _CATALOGUE, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(_CATALOGUE)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    return _CATALOGUE[name](
        num_classes=num_classes,
        dtype=dtype,
        ghost_batch_size=ghost_batch_size,
        axis_name=axis_name,
    )


def count_parameters(params: Any) -> int:
    """Number of scalars in a parameter tree (arrays or their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
