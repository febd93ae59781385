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
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contestants import batch
from experiments.bench.processes import bound
from experiments.bench.settings import NetworkSettings
from experiments.bench.tables import Table, times_in_ms
from jax_resnet import resnet
from jax_resnet.train import loss_and_logits


@dataclasses.dataclass(frozen=True)
class RematBench(NetworkSettings):
    """Measure the memory that --remat saves between forward and backward pass of grey pictures, and the time it takes.

    It runs in this process, JAX alone: --threads binds it to as many cores.
    """


def run_remat_bench(bench: RematBench) -> Iterator[Table]:
    """Its table."""
    with bound(bench.threads):
        yield _measure(bench)


def _measure(bench: RematBench) -> Table:
    case = bench.case._replace(channels=1)
    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    arguments = (batch_stats, *map(jnp.asarray, batch(case)))

    def loss(params, batch_stats, images, labels, remat):
        dtype = None if case.precision == "float32" else jnp.dtype(case.precision)
        return loss_and_logits(config, params, batch_stats, images, labels, remat=remat, dtype=dtype)[0]

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
            "kept MB": kept_bytes(vjp, (params, arguments)) / 1e6,
            "products in one program": whole.as_text().count(" dot("),
        }
    seconds = np.empty((bench.rounds, 2))
    for row in seconds:
        for remat, (forward, backward) in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(backward(forward(params, *arguments)[1]))
            row[int(remat)] = time.perf_counter() - start
    for column, row in enumerate(rows.values()):
        row |= times_in_ms(seconds[:, column])
        row["ratio"] = float(np.median(seconds[:, column] / seconds[:, 0]))
    both = {name: seconds[:, [column]] for column, name in enumerate(rows)}
    return Table(f"{case}: forward and backward pass as two programs", rows, ("kept MB",), both)


def kept_bytes(vjp, known) -> int:
    """Of the arrays that a vjp holds, without those that are known anyway: weights, images."""
    bits = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(known)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp) if np.asarray(leaf).tobytes() not in bits)
