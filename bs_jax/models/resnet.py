"""Residual networks: ResNet-18/34/50 and small ones for 28 to 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bs_jax.models.activations import RELU
from bs_jax.models.conv import conv
from bs_jax.models.initializers import he_normal
from bs_jax.models.normalization import BatchNorm
from bs_jax.models.pooling import max_pool


class BasicBlock(nn.Module):
    """relu(BN(conv3(relu(BN(conv3(x))))) + shortcut(x)), the last BN's scale starting at zero."""

    features: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., Callable[..., jax.Array]]

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, normalise: Callable[..., jax.Array]) -> jax.Array:
        """Apply the block; `normalise(norm, x)` calls a norm in the current mode."""
        y = self.conv(self.features, 3, strides=self.strides)(x)
        y = normalise(self.norm(activation=RELU), y)
        y = self.conv(self.features, 3)(y)
        y = normalise(self.norm(scale_init=nn.initializers.zeros), y)
        return nn.relu(y + _shortcut(self, x, y.shape, normalise))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (strided), 1x1 to four times the width; otherwise as `BasicBlock`."""

    features: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., Callable[..., jax.Array]]

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, normalise: Callable[..., jax.Array]) -> jax.Array:
        """Apply the block; `normalise(norm, x)` calls a norm in the current mode."""
        y = normalise(self.norm(activation=RELU), self.conv(self.features, 1)(x))
        y = self.conv(self.features, 3, strides=self.strides)(y)
        y = normalise(self.norm(activation=RELU), y)
        y = self.conv(self.features * self.expansion, 1)(y)
        y = normalise(self.norm(scale_init=nn.initializers.zeros), y)
        return nn.relu(y + _shortcut(self, x, y.shape, normalise))


def _shortcut(block: Any, x: jax.Array, shape: tuple[int, ...], normalise: Any) -> jax.Array:
    if x.shape == shape:
        return x
    x = block.conv(shape[-1], 1, strides=block.strides, name="shortcut_conv")(x)
    return normalise(block.norm(name="shortcut_norm"), x)


class ResNet(nn.Module):
    """Stem, stages of residual blocks (stride 2 from the second on), average pool, dense layer.

    Attributes:
        num_classes: of the logits.
        stage_sizes: blocks in every stage.
        widths: features of every stage (before the block's expansion).
        stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2), "cifar" (3x3) or
            "patch2" / "patch4" (non-overlapping 2x2 / 4x4 patches).
        bottleneck: blocks of three convolutions instead of two.
        dtype: of the computation; parameters, statistics and logits are float32.
        ghost_batch_size: see `BatchNorm`.
        axis_name: see `BatchNorm`.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, 2015; zero-initialised last scale:
        Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Literal["imagenet", "cifar", "patch2", "patch4"] = "imagenet"
    bottleneck: bool = False
    dtype: Any = jnp.float32
    ghost_batch_size: int | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, bn_decay: float | jax.Array | None = None
    ) -> jax.Array:
        """Logits of a batch.

        Args:
            images: [examples, height, width, channels], float.
            train: normalise by the batch's statistics and update the running ones.
            bn_decay: of the running statistics; may be traced. None: `BatchNorm`'s own.

        Returns:
            float32 [examples, num_classes].
        """
        convolve = partial(conv, dtype=self.dtype, kernel_init=he_normal("fan_out"))
        norm = partial(
            BatchNorm,
            ghost_batch_size=self.ghost_batch_size,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )

        def normalise(module: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
            return module(x, train=train, decay=bn_decay)

        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = convolve(self.widths[0], 7, strides=2, name="stem_conv")(x)
        elif self.stem == "cifar":
            x = convolve(self.widths[0], 3, name="stem_conv")(x)
        else:
            patch = int(self.stem.removeprefix("patch"))
            x = convolve(self.widths[0], patch, strides=patch, padding=0, name="stem_conv")(x)
        x = normalise(norm(activation=RELU, name="stem_norm"), x)
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, padding=1)

        block = BottleneckBlock if self.bottleneck else BasicBlock
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = block(width, strides, convolve, norm, name=name)(x, normalise)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
