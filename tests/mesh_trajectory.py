"""Trains a ResNet-18 on meshes of virtual devices and prints how far they end from one device, as JSON.

    python tests/mesh_trajectory.py float64 20 2 4 8

To be run in a process of its own: XLA wants to know at its start how many devices to pretend.
"""

import json
import os
import sys

if __name__ == "__main__":
    # Eight devices on two cores wait long for one another.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    )

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet import resnet
from jax_resnet.adabound import amsbound
from jax_resnet.train import create_train_state, data_mesh, make_train_step, replicate, shard_batch


def trajectory(dtype, steps, devices):
    """The states after the first and the last step, on so many devices."""
    config = resnet.resnet18(num_classes=5, in_channels=1)
    optimizer = amsbound(1e-3)
    rng = np.random.default_rng(0)
    mesh = data_mesh(jax.devices()[:devices]) if devices > 1 else None
    state = create_train_state(*resnet.init(config, jax.random.key(0), dtype), optimizer)
    state = replicate(state, mesh) if mesh else state
    step = make_train_step(config, optimizer, mesh=mesh)
    states = []
    for _ in range(steps):
        batch = rng.standard_normal((16, 32, 32, 1)).astype(dtype), rng.integers(0, 5, 16).astype(np.int32)
        state, _ = step(state, *(shard_batch(batch, mesh) if mesh else batch))
        states.append(jax.device_get((state.params, state.batch_stats)) if len(states) in (0, steps - 1) else None)
    return states[0], states[-1]


def distance(ours, reference):
    """The largest difference over the largest entry, of the array that is furthest off."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    )


if __name__ == "__main__":
    dtype, steps, *counts = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    reference = trajectory(jnp.dtype(dtype), int(steps), 1)
    found = {}
    for count in counts:
        ours = trajectory(jnp.dtype(dtype), int(steps), int(count))
        found[count] = [distance(a, b) for a, b in zip(ours, reference, strict=True)]
    print(json.dumps(found))
