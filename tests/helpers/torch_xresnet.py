"""XResNets in plain PyTorch, written apart from ours, and the way weights go from one to the other.

PyTorch's own layers do the work (its spectral norm, Mish, pools with ceil_mode), in float64.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SHORTCUT_POOLS = {
    "average": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "max": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max_blur": lambda: MaxBlur(),
}


class MaxBlur(nn.Module):
    """3x3 maxima, a 5x5 binomial blur with mirrored edges, then the mean of 2x2."""

    def forward(self, x):
        channels = x.shape[1]
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype) / 16
        kernel = (line[:, None] * line[None]).expand(channels, 1, 5, 5)
        x = functional.max_pool2d(x, 3, stride=1, padding=1)
        x = functional.pad(x, (2, 2, 2, 2), mode="reflect")
        return functional.avg_pool2d(functional.conv2d(x, kernel, groups=channels), 2)


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            self.averaged = x.numel() // x.shape[1]
            self.variance_before = self.norm.running_var.clone()
        return self.norm(x)


class Excite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = math.ceil(channels // 16 / 8) * 8
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        weight = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(functional.mish(self.squeeze(weight))))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.utils.spectral_norm(nn.Conv1d(channels, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        flat = x.flatten(2)
        resemblance = torch.bmm(flat, flat.transpose(1, 2))
        gathered = torch.bmm(resemblance, self.conv(flat))
        return (self.gamma * gathered + flat).view_as(x)


class Block(nn.Module):
    def __init__(self, inputs, width, stride, expansion, groups, excite, attention, pool):
        super().__init__()
        outputs = width * expansion
        inner = width // 16 * groups if groups > 1 else width
        if expansion == 1:
            self.path = nn.ModuleList(
                [ConvNorm(inputs, inner, 3, stride), ConvNorm(inner, outputs, 3)]
            )
        else:
            middle = ConvNorm(inner, inner, 3, stride, groups)
            self.path = nn.ModuleList(
                [ConvNorm(inputs, inner, 1), middle, ConvNorm(inner, outputs, 1)]
            )
        self.excite = Excite(outputs) if excite else None
        self.attention = Attention(outputs) if attention else None
        self.pool = SHORTCUT_POOLS[pool]() if stride == 2 else nn.Identity()
        self.shortcut = ConvNorm(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        y = x
        for layer in self.path[:-1]:
            y = functional.mish(layer(y))
        y = self.path[-1](y)
        y = self.excite(y) if self.excite else y
        y = self.attention(y) if self.attention else y
        x = self.pool(x)
        x = self.shortcut(x) if self.shortcut else x
        return functional.mish(y + x)


class XResNet(nn.Module):
    """The network with the attributes of a `bs_jax.models.xresnet.XResNet`."""

    def __init__(self, ours, bn_decay):
        super().__init__()
        channels = [3, *ours.stem_widths]
        self.stem = nn.ModuleList(
            ConvNorm(a, b, 3, stride)
            for a, b, stride in zip(channels, channels[1:], (2, 1, 1), strict=False)
        )
        blur = ours.shortcut_pool == "max_blur"
        self.pool = MaxBlur() if blur else nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks, inputs = nn.ModuleDict(), channels[-1]
        for stage, (size, width) in enumerate(zip(ours.stage_sizes, ours.widths, strict=True)):
            for index in range(size):
                self.blocks[f"stage{stage + 1}_block{index + 1}"] = Block(
                    inputs,
                    width,
                    stride=2 if stage and not index else 1,
                    expansion=ours.expansion,
                    groups=ours.groups,
                    excite=ours.squeeze_excite,
                    attention=ours.self_attention and not stage and index == size - 1,
                    pool=ours.shortcut_pool,
                )
                inputs = width * ours.expansion
        self.head = nn.Linear(inputs, ours.num_classes)
        for layer in self.modules():
            if isinstance(layer, ConvNorm):
                layer.norm.momentum = 1 - bn_decay

    def forward(self, x):
        for layer in self.stem:
            x = functional.mish(layer(x))
        x = self.pool(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x.mean((2, 3)))


def pairs(model: XResNet) -> Iterator[tuple[tuple[str, ...], torch.Tensor, tuple[int, ...]]]:
    """Every tensor of the model: its path in our variables, itself, its axes in our order."""

    def conv_norm(layer, conv, norm):
        yield ("params", *conv, "kernel"), layer.conv.weight, (2, 3, 1, 0)
        yield ("params", *norm, "scale"), layer.norm.weight, (0,)
        yield ("params", *norm, "bias"), layer.norm.bias, (0,)
        yield ("batch_stats", *norm, "mean"), layer.norm.running_mean, (0,)
        yield ("batch_stats", *norm, "var"), layer.norm.running_var, (0,)

    for i, layer in enumerate(model.stem, 1):
        yield from conv_norm(layer, (f"stem_conv{i}",), (f"stem_norm{i}",))
    for name, block in model.blocks.items():
        for i, layer in enumerate(block.path):
            yield from conv_norm(layer, (name, f"Conv_{i}"), (name, f"BatchNorm_{i}"))
        if block.shortcut:
            yield from conv_norm(block.shortcut, (name, "shortcut_conv"), (name, "shortcut_norm"))
        if block.excite:
            for part in ("squeeze", "excite"):
                layer, path = getattr(block.excite, part), ("params", name, "squeeze_excite", part)
                yield (*path, "kernel"), layer.weight, (2, 3, 1, 0)
                yield (*path, "bias"), layer.bias, (0,)
        if block.attention:
            path = name, "self_attention"
            yield ("params", *path, "gamma"), block.attention.gamma, (0,)
            yield ("params", *path, "kernel"), block.attention.conv.weight_orig, (2, 1, 0)
            yield ("batch_stats", *path, "u"), block.attention.conv.weight_u, (0,)
            yield ("batch_stats", *path, "v"), block.attention.conv.weight_v, (0,)
    yield ("params", "head", "kernel"), model.head.weight, (1, 0)
    yield ("params", "head", "bias"), model.head.bias, (0,)


def _leaf(variables, path):
    for name in path:
        variables = variables[name]
    return variables


def carry_over(model: XResNet, variables) -> None:
    """Give the model our weights and statistics."""
    with torch.no_grad():
        for path, tensor, axes in pairs(model):
            value = np.array(_leaf(variables, path), np.float64)
            shape = tuple(tensor.shape[axis] for axis in axes)
            tensor.copy_(torch.from_numpy(value.reshape(shape)).permute(*np.argsort(axes)))


def make_variances_biased(model: XResNet) -> None:
    """Undo n / (n - 1) in what the last training pass added to the running variances."""
    for layer in model.modules():
        if isinstance(layer, ConvNorm):
            kept = (1 - layer.norm.momentum) * layer.variance_before
            added = layer.norm.running_var - kept
            layer.norm.running_var.copy_(kept + added * (1 - 1 / layer.averaged))


def errors(model: XResNet, variables, what=lambda leaf: leaf) -> dict[str, float]:
    """Our greatest error in every tensor's values, or in those of ``what(tensor)``.

    In units of the root mean square of its values.
    """
    found = {}
    for path, tensor, axes in pairs(model):
        if path[0] in variables:
            want = what(tensor).detach().permute(*axes).numpy()
            got = np.asarray(_leaf(variables, path)).reshape(want.shape)
            size = np.sqrt(np.mean(np.square(want)))
            found["/".join(path)] = float(np.abs(got - want).max() / size)
    return found
