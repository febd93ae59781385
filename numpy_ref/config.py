"""The architectures in table 1 of the ResNet paper (He et al. 2015, arXiv:1512.03385) as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

Tree = dict[str, Any]  # a nested dict, of shapes in this module and of arrays elsewhere

STAGE_WIDTHS = (64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The architecture.

    Attributes:
      block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, and a 1x1 with four times the width).
      stage_sizes: the number of blocks in each of the four stages.
      num_classes: the number of logits. 0 removes the dense layer; the logits are then the pooled vector.
      in_channels: the channels of the images, 3 for RGB, 1 for grey.
      stride_in: which convolution of a bottleneck applies the block's stride: "conv2", the 3x3 (v1.5, torchvision), or
        "conv1", the first 1x1 (v1, the paper). In a basic block, the first 3x3 always applies the stride.
      batch_norm: False removes every BatchNorm and gives the convolutions a bias.
      zero_gamma: whether `init` sets the weight of each block's last BatchNorm to 0 (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1).
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, int, int, int]
    num_classes: int = 1000
    in_channels: int = 3
    stride_in: Literal["conv2", "conv1"] = "conv2"
    batch_norm: bool = True
    zero_gamma: bool = False

    def __post_init__(self):
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f'block must be "basic" or "bottleneck", got {self.block!r}')
        if self.stride_in not in ("conv1", "conv2"):
            raise ValueError(f'stride_in must be "conv2" (v1.5) or "conv1" (v1), got {self.stride_in!r}')
        if len(self.stage_sizes) != 4 or min(self.stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be four numbers >= 1, got {self.stage_sizes}")
        if self.num_classes < 0 or self.in_channels < 1:
            raise ValueError(
                f"num_classes must be >= 0 and in_channels >= 1, got {self.num_classes} and {self.in_channels}"
            )


def resnet18(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNetConfig:
    """ResNet-18. The options are those of `ResNetConfig`."""
    return ResNetConfig("basic", (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNetConfig:
    """ResNet-34. The options are those of `ResNetConfig`."""
    return ResNetConfig("basic", (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNetConfig:
    """ResNet-50. The options are those of `ResNetConfig`."""
    return ResNetConfig("bottleneck", (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNetConfig:
    """ResNet-101. The options are those of `ResNetConfig`."""
    return ResNetConfig("bottleneck", (3, 4, 23, 3), num_classes, in_channels, **options)


def resnet152(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNetConfig:
    """ResNet-152. The options are those of `ResNetConfig`."""
    return ResNetConfig("bottleneck", (3, 8, 36, 3), num_classes, in_channels, **options)


def blocks(config: ResNetConfig) -> Iterator[tuple[str, str, int]]:
    """Yields stage ("layer3"), number within the stage ("10") and stride of each residual block, in execution order."""
    for stage, count in enumerate(config.stage_sizes, start=1):
        for number in range(count):
            yield f"layer{stage}", str(number), 2 if stage > 1 and number == 0 else 1


def convolutions(config: ResNetConfig, width: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns (kernel size, number of filters, stride) of each convolution in a residual block."""
    if config.block == "basic":
        return [(3, width, stride), (3, width, 1)]
    first, second = (stride, 1) if config.stride_in == "conv1" else (1, stride)
    return [(1, width, first), (3, width, second), (1, 4 * width, 1)]


def shapes(config: ResNetConfig) -> tuple[Tree, Tree]:
    """Returns the shapes of params and batch_stats as nested dicts of tuples."""

    def add(params: Tree, stats: Tree, conv: str, norm: str, size: int, channels: int, filters: int) -> None:
        params[conv] = {"weight": (size, size, channels, filters)}
        if config.batch_norm:
            params[norm] = {"weight": (filters,), "bias": (filters,)}
            stats[norm] = {"running_mean": (filters,), "running_var": (filters,)}
        else:
            params[conv]["bias"] = (filters,)

    params, batch_stats, channels = {}, {}, STAGE_WIDTHS[0]
    add(params, batch_stats, "conv1", "bn1", 7, config.in_channels, channels)
    for stage, number, stride in blocks(config):
        p, stats = (tree.setdefault(stage, {}).setdefault(number, {}) for tree in (params, batch_stats))
        filters = channels
        for i, (size, wanted, _) in enumerate(convolutions(config, STAGE_WIDTHS[int(stage[-1]) - 1], stride), start=1):
            add(p, stats, f"conv{i}", f"bn{i}", size, filters, wanted)
            filters = wanted
        if stride > 1 or channels != filters:
            add(p.setdefault("downsample", {}), stats.setdefault("downsample", {}), "0", "1", 1, channels, filters)
        channels = filters
    if config.num_classes:
        params["fc"] = {"weight": (channels, config.num_classes), "bias": (config.num_classes,)}
    return params, batch_stats if config.batch_norm else {}
