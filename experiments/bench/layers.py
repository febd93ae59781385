"""Each distinct layer of a network by itself: `python -m experiments.bench layers`.

Convolutions and the dense layer are matrix products, so their speed is given in GFLOP/s and as a share of what the best
contestant reaches with one large product in the same run. BatchNorm, ReLU and pooling mainly move data: their speed is
in GB/s, and counts the input and the output (backward: the input and both gradients) once each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments.bench.benchmark import BenchSettings, Table, times
from experiments.bench.contestants import Case, Precision, jax_done, refuse_in_numpy, torch_done
from experiments.bench.turns import Contestant, Step, available, compete, started
from experiments.output.tables import Cell

Pass = Literal["forward", "dx", "dweight"]


class Layer(NamedTuple):
    """A layer.

    shape: of its input, (N, H, W, C).
    out_channels: 0 if the layer is not a matrix product.
    kernel: its side; the padding is kernel // 2.
    """

    kind: Literal["conv", "dense", "norm+relu", "max_pool"]
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
        n, *sides, c = self.shape
        h, w = ((side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1 for side in sides)
        return n, h, w, self.out_channels or c

    @property
    def operations(self) -> int:
        """Multiplications and additions of each pass, padding included; 0 if the layer is not a product."""
        return 2 * self.kernel**2 * self.shape[3] * int(np.prod(self.output_shape)) if self.out_channels else 0

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("forward", "dx", "dweight") if self.operations else ("forward", "dx")

    def bytes_moved(self, name: Pass, itemsize: int) -> int:
        x, y = int(np.prod(self.shape)), int(np.prod(self.output_shape))
        return itemsize * (x + y if name == "forward" else 2 * x + y)


PEAK = Layer("dense", (2048, 1, 1, 2048), 2048)  # the product of two square matrices
SMALL = Layer("conv", (8, 3, 5, 4), 2, kernel=3)


def distinct_layers(case: Case) -> dict[Layer, int]:
    """The layers of a network from stem to head, and how often each occurs."""
    from experiments.frameworks.jax import layer_sizes, make_resnet, resnet

    config, count = make_resnet(case.network), case.batch_size
    found: Counter[Layer] = Counter()
    for conv, size, output in layer_sizes(config, case.height, case.width):
        if conv is None:
            found[Layer("max_pool", (count, *size, resnet.stem(config).out_channels), kernel=3, stride=2)] += 1
        else:
            found[Layer("conv", (count, *size, conv.in_channels), conv.out_channels, conv.size, conv.stride)] += 1
            found[Layer("norm+relu", (count, *output, conv.out_channels))] += 1
    found[Layer("dense", (count, 1, 1, resnet.feature_channels(config)), case.num_classes)] += 1
    return found


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
    """The forward pass of a convolution, a function of numpy_ref.layers by name."""
    from numpy_ref import layers

    refuse_in_numpy(precision)
    arrays, options = operands(layer), dict(stride=layer.stride, padding=layer.kernel // 2)
    return lambda: getattr(layers, function)(arrays["x"], arrays["weight"], **options)[0]


def jax_layer(layer: Layer, name: Pass, precision: Precision) -> Step:
    """jax_resnet's layer under jit; dx and dweight are timed without the forward pass before them."""
    import jax
    import jax.numpy as jnp

    from jax_resnet import layers

    arrays = {key: jnp.asarray(array) for key, array in operands(layer).items()}
    cast = arrays if layer.kind != "norm+relu" else ("x", "dy")
    arrays |= {key: arrays[key].astype(precision) for key in cast}
    x, weight, dy = arrays["x"], arrays["weight"], arrays["dy"]

    def forward(x: jax.Array, weight: jax.Array) -> jax.Array:
        match layer.kind:
            case "conv":
                return layers.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2)
            case "dense":
                return layers.dense(x.reshape(len(x), -1), weight[0, 0]).reshape(layer.output_shape)
            case "max_pool":
                return layers.max_pool(x)
        zeros, ones = jnp.zeros_like(weight), jnp.ones_like(weight)
        return layers.relu(layers.batch_norm(x, weight, arrays["bias"], zeros, ones, train=True)[0])

    if name == "forward":
        return jax_done(jax.jit(forward), (x, weight))
    # Differentiates by x or by the weight only, so that XLA omits the other gradient. The residuals are arguments.
    along, at = {"dx": (lambda x: forward(x, weight), x), "dweight": (lambda weight: forward(x, weight), weight)}[name]
    _, gradient = jax.jit(functools.partial(jax.vjp, along))(at)
    return jax_done(jax.jit(lambda gradient, dy: gradient(dy)), (gradient, dy))


def torch_layer(layer: Layer, name: Pass, precision: Precision, *, channels_last: bool = False) -> Step:
    """PyTorch's layer, in NCHW or channels_last; dx and dweight by autograd, without the forward pass before them."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from experiments.frameworks.torch import device

    dtype = getattr(torch, precision)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    arrays = {key: torch.from_numpy(array).to(device()) for key, array in operands(layer).items()}
    x, dy = (arrays[k].to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for k in ("x", "dy"))
    weight = arrays["weight"]
    if layer.out_channels:
        weight = weight.to(dtype).permute(3, 2, 0, 1).contiguous(memory_format=memory_format)

    def forward() -> Tensor:
        match layer.kind:
            case "conv":
                return F.conv2d(x, weight, stride=layer.stride, padding=layer.kernel // 2)
            case "dense":
                return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
            case "max_pool":
                return F.max_pool2d(x, 3, 2, 1)
        return F.relu(F.batch_norm(x, None, None, weight, arrays["bias"], training=True))

    if name == "forward":
        return torch_done(torch.inference_mode()(forward))
    wanted = (x if name == "dx" else weight).requires_grad_()
    y = forward()
    return torch_done(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))


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
    "forward" has the form for inference; training may use another one (`jax_resnet.cpu`). The first table is of a small
    convolution and includes NumPy. The last table adds up the times of all layers in the network. It does not show what
    a compiler gains or loses between them.
    """

    contestants: tuple[Literal["jax", "torch", "torch.channels_last"], ...] = tuple(CONTESTANTS)
    """Who takes part."""
    iterations: int = 5
    """Iterations per turn, after a tenth of them to warm up, at least one; twenty times as many for the small layer."""

    def run(self) -> Iterator[Table]:
        """Yields tables of the small convolution, the large product (the peak), each layer, and all layers together."""
        names = available(self.contestants)
        with started(list(NUMPY_FORMS), self.threads) as forms, started(names, self.threads) as contestants:
            title = f"{SMALL}, {self.precision}"
            yield self._product_table(title, SMALL, [*forms, *contestants], 20 * self.iterations)
            title = f"matrix product 2048x2048x2048, {self.precision}"
            yield (peak := self._product_table(title, PEAK, contestants, self.iterations))
            speed = max(row["GFLOP/s"] for row in peak.rows.values())
            totals: dict[str, dict[str, float]] = {name: {} for name in names}
            for layer, count in distinct_layers(self.case).items():
                measured = {name: self._seconds(layer, name, contestants, self.iterations) for name in layer.passes}
                yield self._layer_table(layer, count, measured, speed, totals)
        for total in totals.values():
            total["sum ms"] = sum(total.values())
        yield Table(f"{self.case}: all layers together, each as often as the network has it", totals)

    def _seconds(
        self, layer: Layer, name: Pass, contestants: Sequence[Contestant], steps: int
    ) -> dict[str, np.ndarray]:
        """Seconds (rounds, steps) of one pass of a layer, by contestant."""
        makers = NUMPY_FORMS | CONTESTANTS
        make_steps = {c.name: functools.partial(makers[c.name], layer, name, self.precision) for c in contestants}
        results = compete(contestants, make_steps, self.rounds, steps)
        return {name: result.seconds for name, result in results.items()}

    def _product_table(self, title: str, layer: Layer, contestants: Sequence[Contestant], steps: int) -> Table:
        """The table of the forward pass of one layer."""
        seconds = self._seconds(layer, "forward", contestants, steps)
        rows = {
            name: {"GFLOP/s": layer.operations / float(np.median(taken)) / 1e9} | times(taken)
            for name, taken in seconds.items()
        }
        return Table(title, rows, seconds)

    def _layer_table(
        self,
        layer: Layer,
        count: int,
        measured: dict[Pass, dict[str, np.ndarray]],
        peak: float,
        totals: dict[str, dict[str, float]],
    ) -> Table:
        """The table of a layer, from seconds by pass and contestant; adds the times to the totals."""
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
                totals[contestant][kind] = totals[contestant].get(kind, 0) + 1e3 * count * seconds
        all_seconds = {f"{contestant}, {name}": t for name, of in measured.items() for contestant, t in of.items()}
        return Table(f"{layer}, x{count}", rows, all_seconds)
