"""What --remat saves and costs: `python -m experiments.bench remat`.

Forward and backward pass are two programs here, and "kept" is what the first hands to the second: the activations,
without the weights. In one program, as a training step is, XLA:CPU sees that the backward pass repeats matrix products
of the forward pass and merges them again, so that on a CPU --remat saves nothing there; the table's last column counts
the products of that one program.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contestants import Case, batch
from experiments.bench.tables import describe_machine, print_table, time_columns
from experiments.settings import parse_image_size
from jax_resnet import resnet
from jax_resnet.train import loss_and_logits


@dataclasses.dataclass(frozen=True)
class RematBench:
    """Measure the memory that --remat saves between forward and backward pass, and the time it takes."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet101"
    """The network."""
    batch_size: int = 8
    """Images at a time."""
    image_size: str = "96"
    """A side, or HEIGHTxWIDTH."""
    rounds: int = 7
    """The two take turns this often."""


def run_remat_bench(bench: RematBench) -> None:
    """Runs the benchmark and prints its table.

    Raises:
      ValueError: for settings that make no sense.
    """
    if min(bench.rounds, bench.batch_size) < 1:
        raise ValueError("--rounds and --batch-size must be at least 1")
    case = Case(bench.arch, bench.batch_size, *parse_image_size(bench.image_size), channels=1)
    print(describe_machine())
    print(f"{case}: forward and backward pass as two programs, {bench.rounds} rounds in turns; ms, MB")
    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    arguments = (batch_stats, *map(jnp.asarray, batch(case)))

    def loss(params, batch_stats, images, labels, remat):
        return loss_and_logits(config, params, batch_stats, images, labels, remat=remat)[0]

    passes, rows = {}, {}
    for remat in (False, True):
        of_params = functools.partial(loss, remat=remat)
        forward = jax.jit(lambda params, *rest, f=of_params: jax.vjp(lambda params: f(params, *rest), params))
        backward = jax.jit(lambda vjp: vjp(jnp.ones(())))
        _, vjp = jax.block_until_ready(forward(params, *arguments))
        jax.block_until_ready(backward(vjp))
        passes[remat] = forward, backward
        whole = jax.jit(jax.value_and_grad(of_params)).lower(params, *arguments).compile()
        rows["--remat" if remat else "without"] = {
            "kept": f"{kept_bytes(vjp, (params, arguments)) / 1e6:.0f}",
            "products in one program": str(whole.as_text().count(" dot(")),
        }
    seconds = np.empty((bench.rounds, 2))
    for row in seconds:
        for remat, (forward, backward) in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(backward(forward(params, *arguments)[1]))
            row[int(remat)] = time.perf_counter() - start
    for column, row in enumerate(rows.values()):
        row |= time_columns(seconds[:, column], decimals=0)
        row["ratio"] = f"{np.median(seconds[:, column] / seconds[:, 0]):.2f}"
    print_table(rows)


def kept_bytes(vjp, known) -> int:
    """Of the arrays that a vjp holds, without those that are known anyway: weights, images."""
    bits = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(known)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp) if np.asarray(leaf).tobytes() not in bits)
