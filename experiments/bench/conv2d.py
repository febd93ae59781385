"""One convolution, forward and backward, in NumPy, JAX and PyTorch: the classic small one.

    python -m experiments.bench conv2d

"kept" is what the NumPy forms hold from the forward to the backward pass besides x and y, which the caller has anyway.
A ResNet's convolutions are in `python -m experiments.bench layers`.
"""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from experiments.bench.options import BenchSettings
from experiments.bench.results import Table, ratios_to_best_torch, times_in_ms
from experiments.bench.turns import Result, Step, available, compete, started
from experiments.output.tables import Cell


class Case(NamedTuple):
    """A convolution: images (batch_size, height, width, in_channels), kernel x kernel taps; float32."""

    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    batch_size: int = 8

    def __str__(self) -> str:
        return (
            f"{self.kernel}x{self.kernel} stride {self.stride} padding {self.padding}, {self.in_channels} -> "
            f"{self.out_channels} channels, batch {self.batch_size} of {self.height}x{self.width}"
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = ((s + 2 * self.padding - self.kernel) // self.stride + 1 for s in (self.height, self.width))
        return height, width

    @property
    def operations(self) -> int:
        """Multiplications and additions of one product (y, dx and dweight need as many each), padding included."""
        taps = self.kernel**2 * self.in_channels
        return int(2 * self.batch_size * np.prod(self.output_size) * taps * self.out_channels)


CLASSIC = Case(3, 5, 4, 2, kernel=3, stride=1, padding=3)
SHOWN = 1000  # convolutions whose time the table gives


class Operands(NamedTuple):
    """x NHWC, weight HWIO, bias and the gradient of the output, dy."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    dy: np.ndarray


def operands(case: Case) -> Operands:
    """Random ones, float32."""
    rng = np.random.default_rng(0)
    shapes = Operands(
        x=(case.batch_size, case.height, case.width, case.in_channels),
        weight=(case.kernel, case.kernel, case.in_channels, case.out_channels),
        bias=(case.out_channels,),
        dy=(case.batch_size, *case.output_size, case.out_channels),
    )
    return Operands(*(rng.standard_normal(shape, np.float32) for shape in shapes))


def numpy_conv2d(function: str, case: Case) -> Step:
    """A convolution of numpy_ref.layers, by its name. Returns (y, dx, dweight, dbias), as all of them do."""
    from numpy_ref import layers

    conv2d = getattr(layers, function)
    x, weight, bias, dy = operands(case)

    def step():
        y, vjp = conv2d(x, weight, bias, stride=case.stride, padding=case.padding)
        return y, *vjp(dy)

    return step


def jax_conv2d(case: Case) -> Step:
    """jax_resnet.layers.conv2d under jit."""
    import jax
    import jax.numpy as jnp

    from jax_resnet import layers

    conv2d = functools.partial(layers.conv2d, stride=case.stride, padding=case.padding)

    @jax.jit
    def forward_backward(x, weight, bias, dy):
        y, vjp = jax.vjp(conv2d, x, weight, bias)
        return y, *vjp(dy)

    arrays = [jnp.asarray(a) for a in operands(case)]
    return lambda: jax.block_until_ready(forward_backward(*arrays))


def torch_conv2d(case: Case, *, channels_last: bool = False) -> Step:
    """torch.nn.functional.conv2d with autograd, eager: NCHW and OIHW, contiguous or in channels_last's layout."""
    import torch

    x, weight, bias, dy = operands(case)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, dy = (
        torch.from_numpy(a).permute(axes).contiguous(memory_format=memory_format)
        for a, axes in ((x, (0, 3, 1, 2)), (weight, (3, 2, 0, 1)), (dy, (0, 3, 1, 2)))
    )
    inputs = [a.requires_grad_() for a in (x, weight, torch.from_numpy(bias))]

    def step():
        y = torch.nn.functional.conv2d(*inputs, stride=case.stride, padding=case.padding)
        return y, *torch.autograd.grad(y, inputs, dy)

    return step


NUMPY_FORMS = {"numpy.loops": "conv2d_loops", "numpy": "conv2d", "numpy.unfolded": "conv2d_unfolded"}
CONTESTANTS: dict[str, Callable[[Case], Step]] = {
    **{name: functools.partial(numpy_conv2d, function) for name, function in NUMPY_FORMS.items()},
    "jax": jax_conv2d,
    "torch": torch_conv2d,
    "torch.channels_last": functools.partial(torch_conv2d, channels_last=True),
}


@dataclasses.dataclass(frozen=True)
class Conv2dBench(BenchSettings):
    """Time the classic convolution, forward and backward, plain loops included: 3x3, padding 3, 4 -> 2 channels.

    Ratios are to the fastest form of PyTorch in the table.
    """

    contestants: tuple[
        Literal["numpy.loops", "numpy", "numpy.unfolded", "jax", "torch", "torch.channels_last"], ...
    ] = tuple(CONTESTANTS)
    """Who takes part."""
    rounds: int = 10
    """The contestants take turns this often."""
    iterations: int = 100
    """Convolutions a turn, after a tenth of them (at least one) to warm up."""


def run_conv2d_bench(bench: Conv2dBench) -> Iterator[Table]:
    """The table of the classic convolution: the time of 1,000 of them."""
    names = available(bench.contestants)
    make_steps = {name: functools.partial(CONTESTANTS[name], CLASSIC) for name in names}
    with started(names, bench.threads) as contestants:
        results = compete(contestants, make_steps, bench.rounds, bench.iterations)
    title = f"{CLASSIC}, float32; forward and backward (gradients of x, weight and bias), {SHOWN:,} times"
    yield Table(title, rows(CLASSIC, results), ("median ms",), {name: r.seconds for name, r in results.items()})


def rows(case: Case, results: dict[str, Result]) -> dict[str, dict[str, Cell]]:
    """The rows of the table, from the mean of each turn."""
    seconds = {name: result.seconds.mean(1) for name, result in results.items()}
    ratios = ratios_to_best_torch(seconds)
    rows = {}
    for name, times in seconds.items():
        rows[name] = {"ratio": ratios[name]} if ratios else {}
        rows[name] |= times_in_ms(SHOWN * times)
        rows[name]["GFLOP/s"] = 3 * case.operations / float(np.median(times)) / 1e9
        if name in NUMPY_FORMS:
            rows[name]["kept kB"] = kept_memory(NUMPY_FORMS[name], case) / 1e3
    return rows


def kept_memory(function: str, case: Case) -> int:
    """The bytes that a convolution of numpy_ref.layers keeps for its backward pass: without y, x, weight and bias."""
    from numpy_ref import layers

    conv2d = functools.partial(getattr(layers, function), stride=case.stride, padding=case.padding)
    x, weight, bias, _ = operands(case)
    tracemalloc.start()
    try:
        y, _vjp = conv2d(x, weight, bias)
        return tracemalloc.get_traced_memory()[0] - y.nbytes
    finally:
        tracemalloc.stop()
