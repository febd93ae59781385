"""Trains a small ResNet on meshes of virtual devices and prints its distance from one device's training as JSON.

    export PYTHONPATH=.
    python tests/mesh_trajectory.py float64 20 2 4 8

The script needs a process of its own: XLA reads the number of virtual devices at its start.

In float64 an error is an array's largest difference over its largest entry. float32 needs another measure and other
settings. Where the input of a ReLU is within rounding of zero, its gate may open on one mesh only; this happens every
few steps. In a ResNet-18 with 16 pictures of 32x32, the first such gate was in layer4, whose map is 1x1, in step 3. One
bias was 4% off after that step, and the next step had a hundred such gates. A single array then says little. So in
float32 an error is the length of the difference of all parameters (or of all statistics) over their length. The batch
is also larger and the learning rate smaller: with 1e-3, that ResNet-18 was 3.5% off after 20 steps on 2 and on 4
devices. For comparison, one wrong label among the 64 pictures gives 8.4e-5 after one step and 2.1e-3 after 20;
test_train.py allows 1e-5 and 1e-3.
"""

import argparse
import json
import os

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dtype", choices=("float64", "float32"))
    parser.add_argument("steps", type=int)
    parser.add_argument("devices", type=int, nargs="+")
    arguments = parser.parse_args()
    # Eight devices on two cores wait long for one another.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=900 "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=900"
    )

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.errors import length_of_difference, relative_errors
from jax_resnet import resnet
from jax_resnet.adabound import amsbound
from jax_resnet.train import create_train_state, data_mesh, make_train_step, replicate, shard_batch


def trajectory(dtype, steps, mesh=None):
    """(parameters, statistics) after the first and the last step, by name; on one device or a mesh."""
    optimizer, pictures = (amsbound(1e-3), 16) if dtype == "float64" else (amsbound(1e-5), 64)
    config = resnet.ResNetConfig(block="basic", stage_sizes=(1, 1, 1, 1), num_classes=5, in_channels=1)
    rng = np.random.default_rng(0)
    state = create_train_state(*resnet.init(config, jax.random.key(0), jnp.dtype(dtype)), optimizer)
    state = replicate(state, mesh) if mesh else state
    step = make_train_step(config, optimizer, mesh=mesh)
    states = []
    for _ in range(steps):
        batch = (
            rng.standard_normal((pictures, 32, 32, 1)).astype(dtype),
            rng.integers(0, 5, pictures).astype(np.int32),
        )
        state, _ = step(state, *(shard_batch(batch, mesh) if mesh else batch))
        states.append([by_name(state.params), by_name(state.batch_stats)])
        del states[1:-1]
    return states[0], states[-1]


def by_name(tree):
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def largest_error(ours, reference):
    """The largest error of an array."""
    return max(max(relative_errors(*both).values()) for both in zip(ours, reference, strict=True))


def largest_length(ours, reference):
    """The larger of the errors of all parameters and of all statistics."""
    return max(length_of_difference(*both) for both in zip(ours, reference, strict=True))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", arguments.dtype == "float64")
    one = trajectory(arguments.dtype, arguments.steps)
    error = largest_error if arguments.dtype == "float64" else largest_length
    found = {}
    for count in arguments.devices:
        ours = trajectory(arguments.dtype, arguments.steps, data_mesh(jax.devices()[:count]))
        found[count] = [error(*both) for both in zip(ours, one, strict=True)]
    print(json.dumps(found))
