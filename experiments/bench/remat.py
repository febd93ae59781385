"""What --remat saves and costs: `python -m experiments.bench remat`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contestants import batch
from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table, times_in_ms
from experiments.bench.turns import bound
from jax_resnet import resnet
from jax_resnet.train import loss_and_logits


@dataclasses.dataclass(frozen=True)
class RematBench(NetworkSettings):
    """Measure the memory that --remat saves a training step, and the time that it takes.

    Memory is what XLA sets aside for the step besides weights and gradients. It runs in this process, JAX alone:
    --threads binds it to as many cores.
    """


def run_remat_bench(bench: RematBench) -> Iterator[Table]:
    """Its table."""
    with bound(bench.threads):
        yield _measure(bench)


def _measure(bench: RematBench) -> Table:
    case = bench.case
    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    arguments = (params, batch_stats, *map(jnp.asarray, batch(case)))

    def loss(params, batch_stats, images, labels, remat):
        dtype = None if case.precision == "float32" else jnp.dtype(case.precision)
        return loss_and_logits(config, params, batch_stats, images, labels, remat=remat, dtype=dtype)[0]

    steps, rows = [], {}
    for name, remat in (("without", False), ("--remat", True)):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat))).lower(*arguments).compile()
        jax.block_until_ready(step(*arguments))
        steps.append(step)
        memory = step.memory_analysis()
        rows[name] = {"MB": memory.temp_size_in_bytes / 1e6 if memory else float("nan")}
    seconds = np.empty((bench.rounds, len(steps)))
    for row in seconds:
        for column, step in enumerate(steps):
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            row[column] = time.perf_counter() - start
    for column, row in enumerate(rows.values()):
        row |= times_in_ms(seconds[:, column])
        row["ratio"] = float(np.median(seconds[:, column] / seconds[:, 0]))
    return Table(f"{case}: training step", rows, ("MB",), {name: seconds[:, [i]] for i, name in enumerate(rows)})
