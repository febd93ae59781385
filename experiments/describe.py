"""The structure of a ResNet as a table: `python -m experiments.describe --arch resnet101`."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from experiments.cli import Arch, exit_code, parse, parse_image_size
from experiments.output.tables import print_table

if TYPE_CHECKING:
    from jax_resnet import resnet


class Row(NamedTuple):
    """A layer, its BatchNorm included.

    shape: shape of the output for one image, (H, W, C) or (C,).
    parameters: how many numbers are trained; running statistics are not.
    multiply_adds: number in matrix products, for one image; sums, BatchNorm and the like are not counted.
    """

    name: str
    kernel: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layer_rows(config: resnet.ResNetConfig, height: int, width: int) -> Iterator[Row]:
    """The layers of a network in execution order; nothing is computed, only shapes."""
    import jax

    from experiments.frameworks.jax import layer_sizes, resnet

    params, _ = jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
    weights = {".".join(key.key for key in path): array for path, array in jax.tree.leaves_with_path(params)}

    def count(*names: str) -> int:
        return sum(w.size for name, w in weights.items() if name.rpartition(".")[0] in names)

    for conv, _, size in layer_sizes(config, height, width):
        if conv is None:
            yield Row("max_pool", "", (*size, resnet.stem(config).out_channels), 0, 0)
            continue
        kernel = f"{conv.size}x{conv.size}" + (f" / {conv.stride}" if conv.stride > 1 else "")
        multiply_adds = math.prod(size) * weights[f"{conv.name}.weight"].size
        yield Row(conv.name, kernel, (*size, conv.out_channels), count(conv.name, conv.norm), multiply_adds)
    yield Row("pool", "", (resnet.feature_channels(config),), 0, 0)
    if config.num_classes:
        yield Row("fc", "", (config.num_classes,), count("fc"), weights["fc.weight"].size)


def describe(
    arch: Arch = "resnet101",
    image_size: str = "224",
    in_channels: int = 3,
    num_classes: int = 1000,
    stride_in: Literal["conv2", "conv1"] = "conv2",
    batch_norm: bool = True,
) -> None:
    """Print the structure of a ResNet: each layer's output shape, parameters and multiply-adds for one image.

    Args:
      arch: the network.
      image_size: one side, or HEIGHTxWIDTH, in pixels: 96, 64x96.
      in_channels: the channels of the images: 3 for colour, 1 for grey.
      num_classes: the number of logits; 0 leaves the dense layer out.
      stride_in: which convolution of a bottleneck has the stride: conv2, its 3x3 (v1.5, torchvision), or conv1, its
        first 1x1 (v1, the paper).
      batch_norm: whether to use BatchNorm; the row of the convolution before it includes its parameters.
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
