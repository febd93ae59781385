"""ResNets as flax's users write them: linen modules, as in flax's ImageNet example, with this project's paddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class Block(nn.Module):
    """Two 3x3 convolutions, or with bottleneck 1x1, 3x3 (with the stride, v1.5) and 1x1 of four times the width."""

    width: int
    stride: int
    bottleneck: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        out = 4 * self.width if self.bottleneck else self.width
        shapes = [(3, self.width, self.stride), (3, out, 1)]
        if self.bottleneck:
            shapes = [(1, self.width, 1), (3, self.width, self.stride), (1, out, 1)]
        y = x
        for number, (size, features, stride) in enumerate(shapes, start=1):
            y = self.conv(features, (size, size), stride, size // 2, name=f"conv{number}")(y)
            y = self.norm(name=f"bn{number}")(y)
            if number < len(shapes):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = self.norm(name="downsample_1")(self.conv(out, (1, 1), self.stride, 0, name="downsample_0")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 to 152; images (N, H, W, C) -> logits (N, num_classes). dtype is that of the activations."""

    arch: str
    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, images, train: bool):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        x = nn.relu(norm(name="bn1")(conv(64, (7, 7), 2, 3, name="conv1")(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        bottleneck = self.arch not in ("resnet18", "resnet34")
        for stage, count in enumerate(STAGES[self.arch]):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                x = Block(64 * 2**stage, stride, bottleneck, conv, norm, name=f"layer{stage + 1}_{number}")(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x.mean((1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
