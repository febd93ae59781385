"""Each distinct layer of a network by itself: `python -m experiments.bench layers`.

Convolutions and the dense layer are matrix products at heart, so their speed is told in GFLOP/s and as a share of what
the best contestant reaches with one large product in the same run. BatchNorm, ReLU and pooling move memory: GB/s, for
reading the input and writing the output (backward: the gradients too), as if each were touched once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.bench.contestants import Case, Precision, finished, torch_device
from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table
from experiments.bench.turns import Step, available, compete, started
from experiments.output.tables import Cell

Pass = Literal["forward", "dx", "dweight"]
CONVOLUTION_PASSES: tuple[Pass, ...] = ("forward", "dx", "dweight")
SIDE = 2048  # of the square matrices whose product is the peak


class Layer(NamedTuple):
    """A layer: its kind, how often the network has it, its input (N, H, W, C), and of a convolution the rest."""

    kind: Literal["conv", "dense", "norm+relu", "max_pool"]
    count: int
    shape: tuple[int, int, int, int]
    out_channels: int = 0
    kernel: int = 1
    stride: int = 1

    def __str__(self) -> str:
        n, h, w, c = self.shape
        size = f"{n} of {h}x{w}"
        if self.kind in ("conv", "dense"):
            name = f"{self.kernel}x{self.kernel}" if self.kind == "conv" else "dense"
            return f"{name}{'/2' if self.stride == 2 else ''} {c}->{self.out_channels}, {size}"
        return f"{self.kind} {c}, {size}"

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        n, h, w, c = self.shape
        out = self.out_channels or c
        return n, -(-h // self.stride), -(-w // self.stride), out

    @property
    def operations(self) -> int:
        """Multiplications and additions of each pass; 0 for what is no product."""
        return 2 * self.kernel**2 * self.shape[3] * int(np.prod(self.output_shape)) if self.out_channels else 0

    def bytes_moved(self, name: Pass, itemsize: int) -> int:
        x, y = int(np.prod(self.shape)), int(np.prod(self.output_shape))
        return itemsize * (x + y if name == "forward" else 2 * x + y)


def distinct_layers(case: Case) -> list[Layer]:
    """The layers of a network from stem to head, equal ones counted."""
    from jax_resnet import resnet

    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    found: dict[Layer, int] = {}

    def add(layer: Layer) -> tuple[int, int]:
        found[layer] = found.get(layer, 0) + 1
        return layer.output_shape[1:3]

    def add_conv(conv: resnet.Conv, size: tuple[int, int]) -> tuple[int, int]:
        shape = (case.batch_size, *size, conv.in_channels)
        size = add(Layer("conv", 1, shape, conv.out_channels, conv.size, conv.stride))
        add(Layer("norm+relu", 1, (case.batch_size, *size, conv.out_channels)))
        return size

    size = add_conv(resnet.stem(config), (case.height, case.width))
    size = add(Layer("max_pool", 1, (case.batch_size, *size, 64), kernel=3, stride=2))
    for block in resnet.blocks(config):
        if block.projection:
            add_conv(block.projection, size)
        for conv in block.convs:
            size = add_conv(conv, size)
    add(Layer("dense", 1, (case.batch_size, 1, 1, resnet.feature_channels(config)), case.num_classes))
    return [layer._replace(count=count) for layer, count in found.items()]


def passes(layer: Layer) -> tuple[Pass, ...]:
    """What is measured of it: for what is no product, forward and the input's gradient."""
    return CONVOLUTION_PASSES if layer.operations else ("forward", "dx")


def operands(layer: Layer) -> dict[str, np.ndarray]:
    """x, dy and the weight, NHWC and HWIO, as float32."""
    rng = np.random.default_rng(0)
    shapes = {"x": layer.shape, "dy": layer.output_shape}
    if layer.out_channels:
        shapes["weight"] = (layer.kernel, layer.kernel, layer.shape[3], layer.out_channels)
    else:
        shapes |= {"weight": layer.shape[3:], "bias": layer.shape[3:]}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def jax_layer(layer: Layer, name: Pass, precision: Precision) -> Step:
    """jax_resnet's layer under jit; backward passes alone, the forward pass before them not timed."""
    import jax
    import jax.numpy as jnp

    from jax_resnet import layers

    arrays = {key: jnp.asarray(array) for key, array in operands(layer).items()}
    if layer.kind != "norm+relu":
        arrays = {key: array.astype(precision) for key, array in arrays.items()}
    else:
        arrays |= {key: arrays[key].astype(precision) for key in ("x", "dy")}

    def forward(x, weight):
        match layer.kind:
            case "conv":
                return layers.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2)
            case "dense":
                return layers.dense(x.reshape(len(x), -1), weight[0, 0]).reshape(layer.output_shape)
            case "max_pool":
                return layers.max_pool(x)
        zeros, ones = jnp.zeros_like(weight), jnp.ones_like(weight)
        return layers.relu(layers.batch_norm(x, weight, arrays["bias"], zeros, ones, train=True)[0])

    x, weight, dy = arrays["x"], arrays["weight"], arrays["dy"]
    if name == "forward":
        function = jax.jit(forward)
        return lambda: jax.block_until_ready(function(x, weight))
    # By x or by the weight alone, so that XLA leaves out what nobody asked for; what the forward pass keeps goes in.
    along = (lambda x: forward(x, weight)) if name == "dx" else (lambda weight: forward(x, weight))
    _, gradient = jax.jit(functools.partial(jax.vjp, along))(x if name == "dx" else weight)
    function = jax.jit(lambda gradient, dy: gradient(dy))
    return lambda: jax.block_until_ready(function(gradient, dy))


def torch_layer(layer: Layer, name: Pass, precision: Precision, *, channels_last: bool = False) -> Step:
    """PyTorch's layer, in NCHW or channels_last; backward passes by autograd, the forward pass before it not timed."""
    import torch
    from torch.nn import functional as F

    device, dtype = torch_device(), getattr(torch, precision)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    arrays = {key: torch.from_numpy(array).to(device) for key, array in operands(layer).items()}
    x, dy = (arrays[k].to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for k in ("x", "dy"))
    weight = arrays["weight"]
    if layer.out_channels:
        weight = weight.to(dtype).permute(3, 2, 0, 1).contiguous(memory_format=memory_format)
    x.requires_grad_(name == "dx")
    weight.requires_grad_(name == "dweight")

    def forward():
        match layer.kind:
            case "conv":
                return F.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2)
            case "dense":
                return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
            case "max_pool":
                return F.max_pool2d(x, 3, 2, 1)
        return F.relu(F.batch_norm(x, None, None, weight, arrays["bias"], training=True))

    if name == "forward":
        return finished(device, torch.inference_mode()(forward))
    wanted = x if name == "dx" else weight
    y = forward()
    return finished(device, lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))


def jax_product(precision: Precision) -> Step:
    """One large matrix product."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((SIDE, SIDE), precision)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a))


def torch_product(precision: Precision) -> Step:
    """One large matrix product."""
    import torch

    a = torch.ones((SIDE, SIDE), dtype=getattr(torch, precision), device=torch_device())
    return finished(torch_device(), lambda: a @ a)


CONTESTANTS: dict[str, Callable[..., Step]] = {
    "jax": jax_layer,
    "torch": torch_layer,
    "torch.channels_last": functools.partial(torch_layer, channels_last=True),
}
PRODUCTS = {"jax": jax_product, "torch": torch_product, "torch.channels_last": torch_product}


@dataclasses.dataclass(frozen=True)
class LayersBench(NetworkSettings):
    """Time each distinct layer of a network: forward, input gradient (dx), weight gradient (dweight).

    "share" is of the fastest matrix product of any contestant, 2048 x 2048 x 2048, measured in the same run. The last
    table is how long all layers of the network take together, which leaves out what a compiler gains or loses in
    between. "forward" is in the form for inference; training may take another one (`jax_resnet.cpu`).
    """

    contestants: tuple[Literal["jax", "torch", "torch.channels_last"], ...] = tuple(CONTESTANTS)
    """Who takes part."""
    iterations: int = 5
    """Iterations a turn, after a tenth of them (at least one) to warm up."""


def run_layers_bench(bench: LayersBench) -> Iterator[Table]:
    """A table of the matrix product that is the peak, one for each layer, and one of all layers together."""
    names = available(bench.contestants)
    layers = distinct_layers(bench.case)
    itemsize = 2 if bench.precision == "bfloat16" else 4
    with started(names, bench.threads) as contestants:

        def measure(makers: dict[str, Callable[..., Step]], *arguments: Any) -> dict[str, np.ndarray]:
            make_steps = {name: functools.partial(makers[name], *arguments, bench.precision) for name in names}
            results = compete(contestants, make_steps, bench.rounds, bench.iterations)
            return {name: result.seconds for name, result in results.items()}

        products = measure(PRODUCTS)
        speeds = {name: 2 * SIDE**3 / float(np.median(seconds)) / 1e9 for name, seconds in products.items()}
        yield Table(
            f"matrix product {SIDE}x{SIDE}x{SIDE}, {bench.precision}",
            {name: {"GFLOP/s": speed} for name, speed in speeds.items()},
            ("GFLOP/s",),
            products,
        )
        peak = max(speeds.values())
        totals: dict[str, dict[str, float]] = {name: {} for name in names}
        for layer in layers:
            rows: dict[str, dict[str, Cell]] = {}
            all_seconds = {}
            for name in passes(layer):
                for contestant, times in measure(CONTESTANTS, layer, name).items():
                    all_seconds[f"{contestant}, {name}"] = times
                    seconds = float(np.median(times))
                    row = rows.setdefault(contestant, {})
                    row[f"{name} ms"] = 1e3 * seconds
                    if layer.operations:
                        speed = layer.operations / seconds / 1e9
                        row |= {f"{name} GFLOP/s": speed, f"{name} share": speed / peak}
                    else:
                        row[f"{name} GB/s"] = layer.bytes_moved(name, itemsize) / seconds / 1e9
                    total = totals[contestant]
                    kind = f"{'products' if layer.operations else 'other'} {name} ms"
                    total[kind] = total.get(kind, 0) + 1e3 * layer.count * seconds
            unit = "GFLOP/s" if layer.operations else "GB/s"
            yield Table(f"{layer}, x{layer.count}", rows, [f"{name} {unit}" for name in passes(layer)], all_seconds)
        for total in totals.values():
            total["sum ms"] = sum(total.values())
        yield Table(f"{bench.case}: all layers together, each as often as the network has it", totals, ("sum ms",))
