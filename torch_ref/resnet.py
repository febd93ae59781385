"""ResNet-18, 34, 50, 101 and 152 (He et al. 2015, arXiv:1512.03385) as a PyTorch module.

With the default options, the state_dict has torchvision's keys, order and shapes. `load_state_dict(..., strict=True)`
therefore works in both directions. The same seed gives the same weights as in torchvision. Layouts are PyTorch's:
images (N, C, H, W), kernels (K, C, kh, kw).

>>> import torch
>>> model = resnet18(num_classes=10, in_channels=1).eval()
>>> logits, activations = model(torch.zeros(2, 1, 64, 96), return_activations=True)
>>> logits.shape, activations["layer4.1"].shape
(torch.Size([2, 10]), torch.Size([2, 512, 2, 3]))
"""

import functools
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIZE = 32
STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The first convolution applies the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, stride_in: str, batch_norm: bool):
        del stride_in  # only a bottleneck uses it
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride, batch_norm)
        self.bn1 = _norm(width, batch_norm)
        self.conv2 = _conv(width, width, 3, 1, batch_norm)
        self.bn2 = _norm(width, batch_norm)
        self.downsample = _shortcut(in_channels, width, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, stride_in: str, batch_norm: bool):
        super().__init__()
        first, second = (stride, 1) if stride_in == "conv1" else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1, first, batch_norm)
        self.bn1 = _norm(width, batch_norm)
        self.conv2 = _conv(width, width, 3, second, batch_norm)
        self.bn2 = _norm(width, batch_norm)
        self.conv3 = _conv(width, out_channels, 1, 1, batch_norm)
        self.bn3 = _norm(out_channels, batch_norm)
        self.downsample = _shortcut(in_channels, out_channels, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut, inplace=True)


class ResNet(nn.Module):
    """A residual network. `resnet18` ... `resnet152` create the standard networks.

    Initial convolutions are normal with standard deviation sqrt(2 / (kh·kw·K)) (He et al. 2015, arXiv:1502.01852,
    fan-out). BatchNorm weights are 1 and biases 0. The dense layer is torch's Linear. Without BatchNorm, activations
    would grow exponentially with depth, so convolutions then keep torch's own initial values. They also have a bias.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stage_sizes: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        stride_in: Literal["conv2", "conv1"] = "conv2",
        batch_norm: bool = True,
        zero_gamma: bool = False,
    ):
        """Creates the network and draws its weights from torch's global generator.

        Args:
          block: BasicBlock or Bottleneck.
          stage_sizes: the number of blocks in each of the four stages.
          num_classes: the number of logits.
          in_channels: the channels of the images, 3 for RGB, 1 for grey.
          stride_in: which convolution of a bottleneck applies the block's stride: "conv2", the 3x3 (v1.5, torchvision),
            or "conv1", the first 1x1 (v1, the paper).
          batch_norm: False removes every BatchNorm and gives the convolutions a bias, for ablations.
          zero_gamma: whether the weight of each block's last BatchNorm is initially 0. Every block then computes only
            its shortcut at first (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

        Raises:
          ValueError: if stride_in is unknown, or num_classes or in_channels is below 1.
        """
        super().__init__()
        if stride_in not in ("conv1", "conv2"):
            raise ValueError(f'stride_in must be "conv2" (v1.5) or "conv1" (v1), got {stride_in!r}')
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be >= 1, got {num_classes} and {in_channels}")
        channels = STAGE_WIDTHS[0]
        self.conv1 = _conv(in_channels, channels, 7, 2, batch_norm)
        self.bn1 = _norm(channels, batch_norm)
        for stage, (width, count) in enumerate(zip(STAGE_WIDTHS, stage_sizes, strict=True), start=1):
            blocks = []
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(block(channels, width, stride, stride_in, batch_norm))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        if batch_norm:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if batch_norm and zero_gamma:
            for _, residual in self._blocks():
                last = residual.bn2 if block is BasicBlock else residual.bn3
                nn.init.zeros_(last.weight)

    def forward(self, images: Tensor, return_activations: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Runs the network on a batch.

        Args:
          images: (N, in_channels, H, W) float, H and W at least 32, normalized by the caller.
          return_activations: whether to return the activations too.

        Returns:
          logits, (N, num_classes), before any softmax, or with return_activations (logits, activations). activations is
          {"stem", "layer1.0", ..., "layer4.2", "pool"}: the input of the first block, each block's output (N, C, h, w),
          and the pooled vector (N, C).

        Raises:
          ValueError: if images have a wrong rank, type, size or number of channels, or from BatchNorm in training with
            one value per channel.
        """
        self._check_images(images)
        activations = {}
        x = images
        for name, layer in [("stem", self._stem), *self._blocks(), ("pool", _global_avg_pool)]:
            x = layer(x)
            if return_activations:
                activations[name] = x
        logits = self.fc(x)
        return (logits, activations) if return_activations else logits

    def _stem(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        stages = [f"layer{stage}" for stage in range(1, len(STAGE_WIDTHS) + 1)]
        return [(f"{stage}.{number}", block) for stage in stages for number, block in enumerate(getattr(self, stage))]

    def _check_images(self, images: Tensor) -> None:
        in_channels = self.conv1.in_channels
        if images.ndim != 4 or images.shape[1] != in_channels:
            hint = ": is this NHWC?" if images.ndim == 4 and images.shape[3] == in_channels else ""
            raise ValueError(
                f"images must be (N, C, H, W) with C = {in_channels} (in_channels), got {tuple(images.shape)}{hint}"
            )
        if min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE}, got {images.shape[2]}x{images.shape[3]}")
        if not images.is_floating_point():
            raise ValueError(f"images must be float, got {images.dtype}: convert and normalize them first")


resnet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = functools.partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = functools.partial(ResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = functools.partial(ResNet, Bottleneck, (3, 8, 36, 3))


def _conv(in_channels: int, out_channels: int, size: int, stride: int, batch_norm: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=not batch_norm)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


def _shortcut(in_channels: int, out_channels: int, stride: int, batch_norm: bool) -> nn.Sequential | None:
    """Returns a projection if the block changes the shape, or None if the shortcut is the input itself."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride, batch_norm), _norm(out_channels, batch_norm))


def _global_avg_pool(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))
