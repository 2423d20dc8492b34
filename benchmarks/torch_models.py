"""The same networks as `bs_jax.models`, written plainly in PyTorch, to be timed against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

_WIDTHS, _STEM = (64, 128, 256, 512), (32, 32, 64)
_XRESNETS: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int], int]] = {
    # blocks a stage, widths, the stem's widths, expansion
    "xresnet10_small": ((1, 1, 1, 1), (16, 32, 64, 128), (8, 8, 16), 1),
    "xresnet18": ((2, 2, 2, 2), _WIDTHS, _STEM, 1),
    "xresnet50": ((3, 4, 6, 3), _WIDTHS, _STEM, 4),
}


def create(name: str, num_classes: int) -> nn.Module:
    """A network by its name in `bs_jax.models`, initialised as PyTorch initialises."""
    if name == "resnet18":
        return _ResNet18(num_classes)
    if name in _XRESNETS:
        return _XResNet(*_XRESNETS[name], num_classes)
    known = ", ".join(("resnet18", *_XRESNETS))
    raise ValueError(f"no PyTorch peer for {name!r}; known: {known}")


def _conv_norm(
    inputs: int,
    outputs: int,
    kernel_size: int,
    stride: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    padding = (kernel_size - 1) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _mish() -> nn.Module:
    return nn.Mish(inplace=True)


class _Residual(nn.Module):
    """activation(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


class _ResNet18(nn.Module):
    """7x7 stem, max-pool, four stages of two basic blocks (He et al. 2015)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 64, 7, 2, _relu), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for stage, width in enumerate(_WIDTHS):
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                branch = nn.Sequential(
                    _conv_norm(inputs, width, 3, stride, _relu), _conv_norm(width, width, 3)
                )
                same = stride == 1 and inputs == width
                shortcut = nn.Identity() if same else _conv_norm(inputs, width, 1, stride)
                layers.append(_Residual(branch, shortcut, _relu()))
                inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class _XResNet(nn.Module):
    """Three 3x3 convolutions as the stem, Mish, average-pooled shortcuts (He et al. 2018)."""

    def __init__(
        self,
        stages: Sequence[int],
        widths: Sequence[int],
        stem: Sequence[int],
        expansion: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for index, width in enumerate(stem):
            layers.append(_conv_norm(inputs, width, 3, 1 if index else 2, _mish))
            inputs = width
        layers.append(nn.MaxPool2d(3, 2, 1))
        for stage, (blocks, width) in enumerate(zip(stages, widths, strict=True)):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(self._block(inputs, width, stride, expansion))
                inputs = width * expansion
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    @staticmethod
    def _block(inputs: int, width: int, stride: int, expansion: int) -> nn.Module:
        outputs = width * expansion
        if expansion == 1:
            branch = nn.Sequential(
                _conv_norm(inputs, width, 3, stride, _mish), _conv_norm(width, outputs, 3)
            )
        else:
            branch = nn.Sequential(
                _conv_norm(inputs, width, 1, 1, _mish),
                _conv_norm(width, width, 3, stride, _mish),
                _conv_norm(width, outputs, 1),
            )
        shortcut: list[nn.Module] = []
        if stride == 2:
            shortcut.append(nn.AvgPool2d(2, ceil_mode=True))
        if inputs != outputs:
            shortcut.append(_conv_norm(inputs, outputs, 1))
        return _Residual(branch, nn.Sequential(*shortcut), _mish())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))
