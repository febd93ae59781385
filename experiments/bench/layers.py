"""Each distinct layer of a network by itself: `python -m experiments.bench layers`.

Convolutions and the dense layer are matrix products, so their speed is given in GFLOP/s and as a share of what the best
contestant reaches with one large product in the same run. BatchNorm, ReLU and pooling move memory: their speed is in
GB/s, for reading the input and writing the output (backward: the gradients too), as if each were touched once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from experiments.bench.benchmark import BenchSettings, Table, ratios_to_best_torch, times
from experiments.bench.contestants import Case, Precision, finished
from experiments.bench.turns import Step, available, compete, measure, started
from experiments.output.tables import Cell

Pass = Literal["forward", "dx", "dweight", "all"]  # all: forward and both gradients at once


class Layer(NamedTuple):
    """A layer.

    count: how often the network has it.
    shape: of its input, (N, H, W, C).
    out_channels: 0 if the layer is no product.
    padding: None stands for half the kernel.
    """

    kind: Literal["conv", "dense", "norm+relu", "max_pool"]
    count: int
    shape: tuple[int, int, int, int]
    out_channels: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int | None = None

    @property
    def pads(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    def __str__(self) -> str:
        n, h, w, c = self.shape
        size = f"{n} of {h}x{w}"
        if self.kind in ("conv", "dense"):
            name = f"{self.kernel}x{self.kernel}" if self.kind == "conv" else "dense"
            padding = "" if self.padding is None else f" padding {self.padding}"
            return f"{name}{'/2' if self.stride == 2 else ''}{padding} {c}->{self.out_channels}, {size}"
        return f"{self.kind} {c}, {size}"

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        n, *sides, c = self.shape
        h, w = ((side + 2 * self.pads - self.kernel) // self.stride + 1 for side in sides)
        return n, h, w, self.out_channels or c

    @property
    def operations(self) -> int:
        """Multiplications and additions of each pass, padding included; 0 if the layer is no product."""
        return 2 * self.kernel**2 * self.shape[3] * int(np.prod(self.output_shape)) if self.out_channels else 0

    def bytes_moved(self, name: Pass, itemsize: int) -> int:
        x, y = int(np.prod(self.shape)), int(np.prod(self.output_shape))
        return itemsize * (x + y if name == "forward" else 2 * x + y)


PEAK = Layer("dense", 1, (2048, 1, 1, 2048), 2048)  # the product of two square matrices
CLASSIC = Layer("conv", 1, (8, 3, 5, 4), 2, kernel=3, padding=3)  # the small convolution of the project's origins


def distinct_layers(case: Case) -> list[Layer]:
    """The layers of a network from stem to head, equal ones counted."""
    from experiments.frameworks.jax import make_resnet, resnet

    config = make_resnet(case.network)
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
    """What is measured of a layer of a network."""
    return ("forward", "dx", "dweight") if layer.operations else ("forward", "dx")


def operands(layer: Layer) -> dict[str, np.ndarray]:
    """x, dy and the weight, NHWC and HWIO, as float32."""
    rng = np.random.default_rng(0)
    shapes = {"x": layer.shape, "dy": layer.output_shape}
    if layer.out_channels:
        shapes["weight"] = (layer.kernel, layer.kernel, layer.shape[3], layer.out_channels)
    else:
        shapes |= {"weight": layer.shape[3:], "bias": layer.shape[3:]}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def numpy_layer(layer: Layer, name: Pass, precision: Precision, *, function: str = "conv2d") -> Step:
    """A convolution of numpy_ref.layers, by the function's name; its vjp computes both gradients at once.

    Raises:
      ValueError: for bfloat16, which NumPy does not have.
    """
    from numpy_ref import layers

    if precision != "float32":
        raise ValueError(f"NumPy has no {precision}")
    arrays = operands(layer)

    def step():
        y, vjp = getattr(layers, function)(arrays["x"], arrays["weight"], stride=layer.stride, padding=layer.pads)
        return y, *vjp(arrays["dy"])[:2]

    return step


def jax_layer(layer: Layer, name: Pass, precision: Precision) -> Step:
    """jax_resnet's layer under jit; dx and dweight are timed without the forward pass before them."""
    import jax
    import jax.numpy as jnp

    from jax_resnet import layers

    arrays = {key: jnp.asarray(array) for key, array in operands(layer).items()}
    cast = arrays if layer.kind != "norm+relu" else ("x", "dy")
    arrays |= {key: arrays[key].astype(precision) for key in cast}
    x, weight, dy = arrays["x"], arrays["weight"], arrays["dy"]

    def forward(x, weight):
        match layer.kind:
            case "conv":
                return layers.conv2d(x, weight, stride=layer.stride, padding=layer.pads)
            case "dense":
                return layers.dense(x.reshape(len(x), -1), weight[0, 0]).reshape(layer.output_shape)
            case "max_pool":
                return layers.max_pool(x)
        zeros, ones = jnp.zeros_like(weight), jnp.ones_like(weight)
        return layers.relu(layers.batch_norm(x, weight, arrays["bias"], zeros, ones, train=True)[0])

    def all_at_once(x, weight, dy):
        y, vjp = jax.vjp(forward, x, weight)
        return y, *vjp(dy)

    if name in ("forward", "all"):
        function, arguments = (forward, (x, weight)) if name == "forward" else (all_at_once, (x, weight, dy))
    else:
        # By x or by the weight alone, so that XLA omits the other gradient; what the forward pass keeps is an argument.
        along = (lambda x: forward(x, weight)) if name == "dx" else (lambda weight: forward(x, weight))
        _, gradient = jax.jit(functools.partial(jax.vjp, along))(x if name == "dx" else weight)
        function, arguments = (lambda gradient, dy: gradient(dy)), (gradient, dy)
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def torch_layer(layer: Layer, name: Pass, precision: Precision, *, channels_last: bool = False) -> Step:
    """PyTorch's layer, in NCHW or channels_last; dx and dweight by autograd, the forward pass before them not timed."""
    import torch
    from torch.nn import functional as F

    from experiments.frameworks.torch import device

    dtype = getattr(torch, precision)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    arrays = {key: torch.from_numpy(array).to(device()) for key, array in operands(layer).items()}
    x, dy = (arrays[k].to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for k in ("x", "dy"))
    weight = arrays["weight"]
    if layer.out_channels:
        weight = weight.to(dtype).permute(3, 2, 0, 1).contiguous(memory_format=memory_format)
    x.requires_grad_(name in ("dx", "all"))
    weight.requires_grad_(name in ("dweight", "all"))

    def forward():
        match layer.kind:
            case "conv":
                return F.conv2d(x, weight, stride=layer.stride, padding=layer.pads)
            case "dense":
                return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
            case "max_pool":
                return F.max_pool2d(x, 3, 2, 1)
        return F.relu(F.batch_norm(x, None, None, weight, arrays["bias"], training=True))

    def all_at_once():
        y = forward()
        return y, *torch.autograd.grad(y, (x, weight), dy)

    if name in ("forward", "all"):
        return finished(torch.inference_mode()(forward) if name == "forward" else all_at_once)
    wanted = x if name == "dx" else weight
    y = forward()
    return finished(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))


CONTESTANTS: dict[str, Callable[..., Step]] = {
    "jax": jax_layer,
    "torch": torch_layer,
    "torch.channels_last": functools.partial(torch_layer, channels_last=True),
}
NUMPY_FORMS: dict[str, Callable[..., Step]] = {
    "numpy.loops": functools.partial(numpy_layer, function="conv2d_loops"),
    "numpy": numpy_layer,
    "numpy.unfolded": functools.partial(numpy_layer, function="conv2d_unfolded"),
}


@dataclasses.dataclass(frozen=True)
class LayersBench(BenchSettings):
    """Time each distinct layer of a network: forward, input gradient (dx), weight gradient (dweight).

    "share" is relative to the fastest matrix product of any contestant, 2048 x 2048 x 2048, measured in the same run.
    "forward" is in the form for inference; training may take another one (`jax_resnet.cpu`). The table before
    the layers is a small convolution, forward and backward, in which NumPy takes part. The last table is how long all
    layers of the network take together, without what a compiler gains or loses between them.
    """

    contestants: tuple[Literal["jax", "torch", "torch.channels_last"], ...] = tuple(CONTESTANTS)
    """Who takes part."""
    iterations: int = 5
    """Iterations a turn, after a tenth of them (at least one) to warm up; twenty times as many of the small one."""

    def run(self) -> Iterator[Table]:
        """A table of the matrix product that is the peak, one for each layer, and one of all layers together."""
        names = available(self.contestants)
        yield self._small_convolution(names)
        with started(names, self.threads) as contestants:

            def seconds_of(layer: Layer, which: Pass) -> dict[str, np.ndarray]:
                arguments = (layer, which, self.precision)
                make_steps = {name: functools.partial(CONTESTANTS[name], *arguments) for name in names}
                results = compete(contestants, make_steps, self.rounds, self.iterations)
                return {name: result.seconds for name, result in results.items()}

            products = seconds_of(PEAK, "forward")
            speeds = {name: PEAK.operations / float(np.median(t)) / 1e9 for name, t in products.items()}
            rows = {name: {"GFLOP/s": speed} for name, speed in speeds.items()}
            yield Table(f"matrix product 2048x2048x2048, {self.precision}", rows, ("GFLOP/s",), products)
            totals: dict[str, dict[str, float]] = {name: {} for name in names}
            for layer in distinct_layers(self.case):
                measured = {name: seconds_of(layer, name) for name in passes(layer)}
                yield self._layer_table(layer, measured, max(speeds.values()), totals)
        for total in totals.values():
            total["sum ms"] = sum(total.values())
        yield Table(f"{self.case}: all layers together, each as often as the network has it", totals, ("sum ms",))

    def _layer_table(
        self,
        layer: Layer,
        measured: dict[Pass, dict[str, np.ndarray]],
        peak: float,
        totals: dict[str, dict[str, float]],
    ) -> Table:
        """The table of a layer, from seconds by pass and contestant; adds them to the totals."""
        itemsize = 2 if self.precision == "bfloat16" else 4
        unit = "GFLOP/s" if layer.operations else "GB/s"
        rows: dict[str, dict[str, Cell]] = {}
        for name, of_contestants in measured.items():
            work = layer.operations or layer.bytes_moved(name, itemsize)
            for contestant, times_taken in of_contestants.items():
                seconds = float(np.median(times_taken))
                row = rows.setdefault(contestant, {})
                row |= {f"{name} ms": 1e3 * seconds, f"{name} {unit}": work / seconds / 1e9}
                if layer.operations:
                    row[f"{name} share"] = work / seconds / 1e9 / peak
                kind = f"{'products' if layer.operations else 'other'} {name} ms"
                totals[contestant][kind] = totals[contestant].get(kind, 0) + 1e3 * layer.count * seconds
        all_seconds = {f"{contestant}, {name}": t for name, of in measured.items() for contestant, t in of.items()}
        return Table(f"{layer}, x{layer.count}", rows, [f"{name} {unit}" for name in measured], all_seconds)

    def _small_convolution(self, names: list[str]) -> Table:
        """A convolution that takes microseconds; ratios are to the fastest form of PyTorch."""
        makers = NUMPY_FORMS | {name: CONTESTANTS[name] for name in names}
        make_steps = {name: functools.partial(make, CLASSIC, "all", self.precision) for name, make in makers.items()}
        results = measure(make_steps, self.rounds, 20 * self.iterations, self.threads)
        seconds = {name: result.seconds.mean(1) for name, result in results.items()}
        ratios = ratios_to_best_torch(seconds)
        rows: dict[str, dict[str, Cell]] = {}
        for name, of_turns in seconds.items():
            rows[name] = {"ratio": ratios[name]} if ratios else {}
            rows[name] |= times(of_turns, "us")
            rows[name]["GFLOP/s"] = 3 * CLASSIC.operations / float(np.median(of_turns)) / 1e9
        title = f"{CLASSIC}, {self.precision}; forward and backward (gradients of x and weight)"
        return Table(title, rows, ("median us",), {name: result.seconds for name, result in results.items()})
