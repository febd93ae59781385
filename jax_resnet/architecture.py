"""The architecture of a ResNet: its configuration, the five standard ones, and their blocks in execution order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

__all__ = [
    "MIN_SIZE",
    "STAGE_WIDTHS",
    "Block",
    "Conv",
    "ResNetConfig",
    "blocks",
    "feature_channels",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "stem",
]

MIN_SIZE = 32  # the smallest height and width of images, in pixels
STAGE_WIDTHS = (64, 128, 256, 512)  # channels of the 3x3 convolutions in each stage


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The architecture. It can be a static argument of jit.

    Attributes:
      block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1 with four times the width at its end).
      stage_sizes: the number of blocks in each of the four stages; a list becomes a tuple.
      num_classes: the number of logits. 0 leaves the dense layer out; logits are then the pooled vector (as in timm).
      in_channels: the channels of the images, 3 for RGB, 1 for grey.
      stride_in: the convolution of a bottleneck that applies the stride: "conv2", the 3x3 (v1.5, torchvision), or
        "conv1", the first 1x1 (v1, the paper). A basic block always applies the stride in its first 3x3.
      batch_norm: False removes every BatchNorm and gives the convolutions a bias, for ablations.
      zero_gamma: whether `init` sets the weight of each block's last BatchNorm to 0, so that every block starts as its
        shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
      batch_norm_eps: the number that each BatchNorm adds to the variance.
      batch_norm_momentum: the weight of a batch's statistics in the new running statistics, as in PyTorch. The momentum
        of flax and Keras is 1 - batch_norm_momentum.
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, int, int, int]
    num_classes: int = 1000
    in_channels: int = 3
    stride_in: Literal["conv2", "conv1"] = "conv2"
    batch_norm: bool = True
    zero_gamma: bool = False
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_sizes", tuple(self.stage_sizes))
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
        if not 0 < self.batch_norm_eps or not 0 <= self.batch_norm_momentum <= 1:
            raise ValueError(
                "batch_norm_eps must be > 0 and batch_norm_momentum between 0 and 1, "
                f"got {self.batch_norm_eps} and {self.batch_norm_momentum}"
            )


def resnet18(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
    zero_gamma: bool = False,
    batch_norm_eps: float = 1e-5,
    batch_norm_momentum: float = 0.1,
) -> ResNetConfig:
    """ResNet-18: 2, 2, 2 and 2 basic blocks, 11.7 million parameters with 1,000 classes.

    Args:
      num_classes: the number of logits; 0 leaves the dense layer out.
      in_channels: the channels of the images.
      stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum: as in `ResNetConfig`.
    """
    settings = (num_classes, in_channels, stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum)
    return ResNetConfig("basic", (2, 2, 2, 2), *settings)


def resnet34(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
    zero_gamma: bool = False,
    batch_norm_eps: float = 1e-5,
    batch_norm_momentum: float = 0.1,
) -> ResNetConfig:
    """ResNet-34: 3, 4, 6 and 3 basic blocks, 21.8 million parameters with 1,000 classes.

    Args:
      num_classes: the number of logits; 0 leaves the dense layer out.
      in_channels: the channels of the images.
      stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum: as in `ResNetConfig`.
    """
    settings = (num_classes, in_channels, stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum)
    return ResNetConfig("basic", (3, 4, 6, 3), *settings)


def resnet50(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
    zero_gamma: bool = False,
    batch_norm_eps: float = 1e-5,
    batch_norm_momentum: float = 0.1,
) -> ResNetConfig:
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks, 25.6 million parameters with 1,000 classes.

    Args:
      num_classes: the number of logits; 0 leaves the dense layer out.
      in_channels: the channels of the images.
      stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum: as in `ResNetConfig`.
    """
    settings = (num_classes, in_channels, stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum)
    return ResNetConfig("bottleneck", (3, 4, 6, 3), *settings)


def resnet101(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
    zero_gamma: bool = False,
    batch_norm_eps: float = 1e-5,
    batch_norm_momentum: float = 0.1,
) -> ResNetConfig:
    """ResNet-101: 3, 4, 23 and 3 bottleneck blocks, 44.5 million parameters with 1,000 classes.

    Args:
      num_classes: the number of logits; 0 leaves the dense layer out.
      in_channels: the channels of the images.
      stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum: as in `ResNetConfig`.
    """
    settings = (num_classes, in_channels, stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum)
    return ResNetConfig("bottleneck", (3, 4, 23, 3), *settings)


def resnet152(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
    zero_gamma: bool = False,
    batch_norm_eps: float = 1e-5,
    batch_norm_momentum: float = 0.1,
) -> ResNetConfig:
    """ResNet-152: 3, 8, 36 and 3 bottleneck blocks, 60.2 million parameters with 1,000 classes.

    Args:
      num_classes: the number of logits; 0 leaves the dense layer out.
      in_channels: the channels of the images.
      stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum: as in `ResNetConfig`.
    """
    settings = (num_classes, in_channels, stride_in, batch_norm, zero_gamma, batch_norm_eps, batch_norm_momentum)
    return ResNetConfig("bottleneck", (3, 8, 36, 3), *settings)


class Conv(NamedTuple):
    """A convolution and the BatchNorm after it: their names, the kernel's size, input and output channels, stride."""

    name: str
    norm: str
    size: int
    in_channels: int
    out_channels: int
    stride: int


class Block(NamedTuple):
    """A residual block: its name ("layer3.10"), its convolutions, and the shortcut's convolution or None."""

    name: str
    convs: tuple[Conv, ...]
    projection: Conv | None


def stem(config: ResNetConfig) -> Conv:
    """The first convolution, 7x7 with stride 2."""
    return Conv("conv1", "bn1", 7, config.in_channels, STAGE_WIDTHS[0], 2)


def blocks(config: ResNetConfig) -> Iterator[Block]:
    """The residual blocks in execution order.

    Do not iterate over the dict of parameters instead: jit sorts its keys as strings, and "10" comes before "2".
    """
    channels = STAGE_WIDTHS[0]
    for stage, (width, count) in enumerate(zip(STAGE_WIDTHS, config.stage_sizes, strict=True), start=1):
        for number in range(count):
            name = f"layer{stage}.{number}"
            stride = 2 if stage > 1 and number == 0 else 1
            if config.block == "basic":
                out = width
                shapes = [(3, channels, out, stride), (3, out, out, 1)]
            else:
                out = 4 * width
                first, second = (stride, 1) if config.stride_in == "conv1" else (1, stride)
                shapes = [(1, channels, width, first), (3, width, width, second), (1, width, out, 1)]
            convs = tuple(Conv(f"{name}.conv{i}", f"{name}.bn{i}", *shape) for i, shape in enumerate(shapes, start=1))
            projection = None
            if stride > 1 or channels != out:
                projection = Conv(f"{name}.downsample.0", f"{name}.downsample.1", 1, channels, out, stride)
            yield Block(name, convs, projection)
            channels = out


def feature_channels(config: ResNetConfig) -> int:
    """The length of the pooled vector, the input of a dense layer: 512 or 2048."""
    return STAGE_WIDTHS[-1] * (4 if config.block == "bottleneck" else 1)
