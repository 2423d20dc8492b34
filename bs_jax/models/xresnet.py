"""XResNets: ResNets with a stem of three convolutions, Mish and a pooled shortcut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bs_jax.models.activations import MISH, mish
from bs_jax.models.attention import SimpleSelfAttention, SqueezeExcite
from bs_jax.models.conv import conv
from bs_jax.models.initializers import he_normal
from bs_jax.models.normalization import BatchNorm
from bs_jax.models.pooling import average_pool, halving_max_pool, max_blur_pool, max_pool

Pool = Literal["average", "max", "max_blur"]

_HALVE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "average": average_pool,
    "max": halving_max_pool,
    "max_blur": max_blur_pool,
}


class XResBlock(nn.Module):
    """mish(path(x) + shortcut(x)), the path's last BatchNorm scale starting at zero.

    The path is 3x3, 3x3 for expansion 1, else 1x1, 3x3, 1x1; the stride sits in the first 3x3.
    The shortcut pools 2x2 if strided, then changes the channels if they differ by 1x1-BatchNorm.
    """

    features: int
    strides: int
    expansion: int
    inner: int
    groups: int
    squeeze_excite: bool
    self_attention: bool
    shortcut_pool: Pool
    conv: Callable[..., nn.Module]
    norm: Callable[..., Callable[..., jax.Array]]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, normalise: Callable[..., jax.Array], train: bool) -> jax.Array:
        """Apply the block; `normalise(norm, x)` calls a norm in the current mode."""
        outputs = self.features * self.expansion
        if self.expansion == 1:
            y = self.conv(self.inner, 3, strides=self.strides, groups=self.groups)(x)
            y = normalise(self.norm(activation=MISH), y)
            y = self.conv(outputs, 3)(y)
        else:
            y = normalise(self.norm(activation=MISH), self.conv(self.inner, 1)(x))
            y = self.conv(self.inner, 3, strides=self.strides, groups=self.groups)(y)
            y = normalise(self.norm(activation=MISH), y)
            y = self.conv(outputs, 1)(y)
        y = normalise(self.norm(scale_init=nn.initializers.zeros), y)
        if self.squeeze_excite:
            y = SqueezeExcite(dtype=self.dtype, name="squeeze_excite")(y)
        if self.self_attention:
            y = SimpleSelfAttention(dtype=self.dtype, name="self_attention")(y, train)
        if self.strides == 2:
            x = _HALVE[self.shortcut_pool](x)
        if x.shape[-1] != outputs:
            x = self.conv(outputs, 1, name="shortcut_conv")(x)
            x = normalise(self.norm(name="shortcut_norm"), x)
        return mish(y + x)


class XResNet(nn.Module):
    """Stem of three 3x3 convolutions and a max-pool, stages of blocks, average pool, dense layer.

    Attributes:
        num_classes: of the logits.
        stage_sizes: blocks in every stage; the second and later ones begin with stride 2.
        widths: features of every stage, before the expansion.
        stem_widths: features of the stem's three convolutions, the first with stride 2.
        expansion: 1 for blocks of two 3x3 convolutions, 4 for bottlenecks.
        groups: of the 3x3 convolutions of the bottlenecks, if above 1: then both inner widths are
            ``width // 16 * groups`` (four channels a group at width 64).
        squeeze_excite: weigh the channels at the end of every block's path.
        self_attention: at the end of the path of the first stage's last block.
        shortcut_pool: "average" or "max" (2x2), or "max_blur", which also takes the place of the
            stem's max-pool.
        dtype: of the computation; parameters, statistics and logits are float32.
        ghost_batch_size: see `BatchNorm`.
        axis_name: see `BatchNorm`.

    Reference:
        He et al., Bag of Tricks for Image Classification, 2018, in fastai's form (Howard, 2019);
        Xie et al., Aggregated Residual Transformations (ResNeXt), 2016.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_widths: tuple[int, ...] = (32, 32, 64)
    expansion: int = 4
    groups: int = 1
    squeeze_excite: bool = False
    self_attention: bool = False
    shortcut_pool: Pool = "average"
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
        convolve = partial(conv, dtype=self.dtype, kernel_init=he_normal("fan_in"))
        norm = partial(
            BatchNorm,
            ghost_batch_size=self.ghost_batch_size,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )

        def normalise(module: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
            return module(x, train=train, decay=bn_decay)

        x = images.astype(self.dtype)
        for index, width in enumerate(self.stem_widths):
            x = convolve(width, 3, strides=1 if index else 2, name=f"stem_conv{index + 1}")(x)
            x = normalise(norm(activation=MISH, name=f"stem_norm{index + 1}"), x)
        x = max_blur_pool(x) if self.shortcut_pool == "max_blur" else max_pool(x, 3, 2, padding=1)

        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(size):
                block = XResBlock(
                    features=width,
                    strides=2 if stage > 0 and index == 0 else 1,
                    expansion=self.expansion,
                    inner=width // 16 * self.groups if self.groups > 1 else width,
                    groups=self.groups,
                    squeeze_excite=self.squeeze_excite,
                    self_attention=self.self_attention and stage == 0 and index == size - 1,
                    shortcut_pool=self.shortcut_pool,
                    conv=convolve,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{index + 1}",
                )
                x = block(x, normalise, train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        head = nn.Dense(
            self.num_classes, dtype=jnp.float32, kernel_init=he_normal("fan_in"), name="head"
        )
        return head(x)
