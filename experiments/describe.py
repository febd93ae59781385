"""The structure of a ResNet as a table: `python -m experiments.describe --arch resnet101`."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from experiments.cli import Arch, exit_code, parse, parse_image_size
from experiments.output.tables import print_table

if TYPE_CHECKING:
    from jax_resnet import resnet


class Row(NamedTuple):
    """A layer, its BatchNorm included.

    shape: of its output for one image, (H, W, C) or (C,).
    parameters: how many numbers are trained; running statistics are not.
    multiply_adds: of its matrix products, for one image; sums, BatchNorm and the like are not counted.
    """

    name: str
    kernel: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layer_rows(config: resnet.ResNetConfig, height: int, width: int) -> Iterator[Row]:
    """The layers of a network in execution order; nothing is computed, only shapes."""
    import jax
    from jax.numpy import float32

    from jax_resnet import layers, resnet

    params, _ = jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
    weights = {".".join(key.key for key in path): array for path, array in jax.tree.leaves_with_path(params)}

    def shape_of(layer: Callable[..., Any], x: Any, *arrays: Any, **settings: int) -> Any:
        return jax.eval_shape(functools.partial(layer, **settings), x, *arrays)

    def count(*names: str) -> int:
        return sum(w.size for name, w in weights.items() if name.rpartition(".")[0] in names)

    def convolution(conv: resnet.Conv, x: Any) -> tuple[Row, Any]:
        kernel = weights[f"{conv.name}.weight"]
        y = shape_of(layers.conv2d, x, kernel, stride=conv.stride, padding=conv.size // 2)
        size = f"{conv.size}x{conv.size}" + (f" / {conv.stride}" if conv.stride > 1 else "")
        multiply_adds = math.prod(y.shape[1:3]) * kernel.size
        return Row(conv.name, size, y.shape[1:], count(conv.name, conv.norm), multiply_adds), y

    row, x = convolution(resnet.stem(config), jax.ShapeDtypeStruct((1, height, width, config.in_channels), float32))
    yield row
    x = shape_of(layers.max_pool, x)
    yield Row("max_pool", "", x.shape[1:], 0, 0)
    for block in resnet.blocks(config):
        if block.projection:
            yield convolution(block.projection, x)[0]
        for conv in block.convs:
            row, x = convolution(conv, x)
            yield row
    x = shape_of(layers.global_avg_pool, x)
    yield Row("pool", "", x.shape[1:], 0, 0)
    if config.num_classes:
        x = shape_of(layers.dense, x, weights["fc.weight"])
        yield Row("fc", "", x.shape[1:], count("fc"), weights["fc.weight"].size)


def describe(
    arch: Arch = "resnet101",
    image_size: str = "224",
    in_channels: int = 3,
    num_classes: int = 1000,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
) -> None:
    """Print the structure of a ResNet: by layer the output's shape, parameters and multiply-adds for one image.

    Args:
      arch: the network.
      image_size: a side, or HEIGHTxWIDTH: 96, 64x96.
      in_channels: the channels of the images: 3 for colour, 1 for grey.
      num_classes: the number of logits; 0 leaves the dense layer out.
      stride_in: which convolution of a bottleneck has the stride: conv2, its 3x3 (v1.5, torchvision), or conv1, its
        first 1x1 (v1, the paper).
      batch_norm: whether there is BatchNorm; its parameters are in the row of the convolution before it.
    """
    from jax_resnet import resnet

    size = parse_image_size(image_size)
    config = getattr(resnet, arch)(
        num_classes=num_classes, in_channels=in_channels, stride_in=stride_in, batch_norm=batch_norm
    )
    rows = list(layer_rows(config, *size))
    parameters, multiply_adds = (sum(getattr(row, name) for row in rows) for name in ("parameters", "multiply_adds"))
    total = Row("total", "", (), parameters, multiply_adds)
    print_table(
        {
            row.name: {
                "kernel": row.kernel,
                "output": " x ".join(map(str, row.shape)),
                "parameters": f"{row.parameters:,}",
                "multiply-adds": f"{row.multiply_adds:,}",
            }
            for row in (*rows, total)
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: parse(describe, arguments, "describe"))


if __name__ == "__main__":
    sys.exit(main())
