"""One convolution, forward and backward, in NumPy, JAX and PyTorch: the classic small one and a ResNet-101's.

    python -m experiments.bench conv2d

"kept" is what the NumPy forms hold from the forward to the backward pass besides x and y, which the caller has anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments.bench.processes import Contestant, Result, Step, available, compete, started
from experiments.bench.tables import describe_machine, print_table, ratios_to_best_torch, time_columns


class Case(NamedTuple):
    """A convolution: images (batch_size, height, width, in_channels) in float32, kernel x kernel taps."""

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
        """Multiplications and additions, padding included: three products, for y, dx and dweight."""
        taps = self.kernel**2 * self.in_channels
        return 3 * 2 * self.batch_size * np.prod(self.output_size) * taps * self.out_channels


CLASSIC = Case(3, 5, 4, 2, kernel=3, stride=1, padding=3)
RESNET101 = (  # at 96x96, from the stem down
    Case(96, 96, 3, 64, kernel=7, stride=2, padding=3),
    Case(24, 24, 64, 64, kernel=3, stride=1, padding=1),
    Case(24, 24, 64, 256, kernel=1, stride=1, padding=0),
    Case(24, 24, 128, 128, kernel=3, stride=2, padding=1),
    Case(24, 24, 256, 512, kernel=1, stride=2, padding=0),
    Case(6, 6, 256, 256, kernel=3, stride=1, padding=1),
    Case(6, 6, 1024, 256, kernel=1, stride=1, padding=0),
    Case(3, 3, 512, 512, kernel=3, stride=1, padding=1),
)


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
class Conv2dBench:
    """Time a convolution, forward and backward: the classic small one, plain loops included, and those of a ResNet-101.

    Ratios are to the fastest form of PyTorch in the table.
    """

    contestants: tuple[
        Literal["numpy.loops", "numpy", "numpy.unfolded", "jax", "torch", "torch.channels_last"], ...
    ] = ()
    """Who takes part [default: all]."""
    rounds: int = 10
    """The contestants take turns this often."""
    iterations: int = 100
    """Iterations a turn, after a tenth of them (at least one) to warm up; a tenth of that for ResNet-101."""


def run_conv2d_bench(bench: Conv2dBench) -> None:
    """Runs the benchmark and prints a table per convolution.

    Raises:
      ValueError: for settings that make no sense.
    """
    if min(bench.rounds, bench.iterations) < 1:
        raise ValueError("--rounds and --iterations must be at least 1")
    print(describe_machine())
    names = available(bench.contestants or tuple(CONTESTANTS))
    print("forward and backward (gradients of x, weight and bias), float32; times in ms, ratio to the best torch")
    with started(names) as contestants:
        print(f"\n{CLASSIC}: 1,000 iterations, measured in {bench.rounds} turns of {bench.iterations}")
        results = measure(CLASSIC, contestants, bench.rounds, bench.iterations)
        print_table(table(CLASSIC, results, shown_iterations=1000, decimals=0))
        contestants = [contestant for contestant in contestants if contestant.name != "numpy.loops"]
        iterations = max(1, bench.iterations // 10)
        for case in RESNET101 if contestants else ():
            print(f"\n{case}: one iteration, measured in {bench.rounds} turns of {iterations}")
            results = measure(case, contestants, bench.rounds, iterations)
            print_table(table(case, results, shown_iterations=1, decimals=2))


def measure(case: Case, contestants: Sequence[Contestant], rounds: int, iterations: int) -> dict[str, Result]:
    """Lets the contestants take turns at one convolution."""
    make_steps = {c.name: functools.partial(CONTESTANTS[c.name], case) for c in contestants}
    return compete(contestants, make_steps, rounds, iterations)


def table(case: Case, results: dict[str, Result], *, shown_iterations: int, decimals: int) -> dict[str, dict[str, str]]:
    """The rows of a table: the time of so many iterations, from the mean of each turn."""
    seconds = {name: result.seconds.mean(1) for name, result in results.items()}
    ratios = ratios_to_best_torch(seconds)
    rows = {}
    for name, times in seconds.items():
        rows[name] = {"ratio": f"{ratios[name]:.2f}"} if ratios else {}
        rows[name] |= time_columns(shown_iterations * times, decimals)
        rows[name]["GFLOP/s"] = f"{case.operations / np.median(times) / 1e9:.2f}"
        if name in NUMPY_FORMS:
            rows[name]["kept"] = f"{kept_memory(NUMPY_FORMS[name], case) / 1e3:,.0f} kB"
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
