"""What `bench step` compares: a network in NumPy, in JAX, flax and Keras, and in PyTorch, in training and inference."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.bench.turns import Step
from experiments.frameworks.common import ResNet

Precision = Literal["float32", "bfloat16"]
Task = Literal["training", "inference"]
ContestantName = Literal["jax", "jax.remat", "flax", "keras", "numpy", "torch", "torch.channels_last", "torch.compile"]
TASKS: dict[Task, str] = {
    "training": "training step: loss, gradients, running statistics",
    "inference": "inference: logits",
}


class Case(NamedTuple):
    """A network, its input, images (batch_size, height, width, channels), and what is done with it."""

    arch: str
    batch_size: int
    height: int
    width: int
    task: Task = "training"
    channels: int = 3
    num_classes: int = 196
    precision: Precision = "float32"

    def __str__(self) -> str:
        return f"{self.arch}, batch {self.batch_size} of {self.height}x{self.width}x{self.channels}, {self.precision}"

    @property
    def network(self) -> ResNet:
        return ResNet(self.arch, num_classes=self.num_classes, in_channels=self.channels)


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images, NHWC, and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case.batch_size, case.height, case.width, case.channels), np.float32)
    return images, rng.integers(0, case.num_classes, case.batch_size)


def numpy_step(case: Case) -> Step:
    """numpy_ref's network. Training returns (loss, running statistics, gradients), inference the logits.

    Raises:
      ValueError: for bfloat16, which NumPy does not have.
    """
    if case.precision != "float32":
        raise ValueError(f"NumPy has no {case.precision}")
    from experiments.frameworks.numpy import fast, forward_backward, make_resnet

    config = make_resnet(case.network)
    params, batch_stats = fast.init(config, np.random.default_rng(0))
    images, labels = batch(case)

    def training():
        options = dict(train=True, image_gradient=False)
        (loss, out), (grads, _) = forward_backward(config, params, images, batch_stats, labels, **options)
        return loss, out.batch_stats, grads

    def inference():
        return fast.apply(config, params, batch_stats, images, train=False)[0].logits

    return {"training": training, "inference": inference}[case.task]


def jax_program(case: Case, devices: int | None = None, *, remat: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """jax_resnet's network as a jitted function, and its arguments.

    Args:
      case: what to build.
      devices: how many share the batch; None leaves everything on the first one.
      remat: recompute each block in the backward pass.

    Raises:
      ValueError: if there are fewer devices.
    """
    import jax
    import jax.numpy as jnp

    from experiments.frameworks.jax import make_gradients, make_resnet, resnet, train

    config = make_resnet(case.network)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    images, labels = (jnp.asarray(a) for a in batch(case))
    if devices is not None:
        if devices > jax.device_count():
            raise ValueError(f"{devices} devices: there are {jax.device_count()}")
        mesh = train.data_mesh(jax.devices()[:devices])
        params, batch_stats = train.replicate((params, batch_stats), mesh)
        images, labels = train.shard_batch((images, labels), mesh)
    dtype = jnp.dtype(case.precision) if case.precision != "float32" else None
    if case.task == "training":
        gradients = make_gradients(config, train=True, dtype=dtype, remat=remat)
        return gradients, (params, images, batch_stats, labels)

    @jax.jit
    def inference(params, images, batch_stats):
        return resnet.apply(config, params, batch_stats, images, train=False, dtype=dtype).logits

    return inference, (params, images, batch_stats)


def jax_step(case: Case, devices: int | None = None, *, remat: bool = False) -> Step:
    """jax_resnet's network under jit; arguments as for `jax_program`, results as for `numpy_step`."""
    import jax

    function, arguments = jax_program(case, devices, remat=remat)

    def step():
        results = jax.block_until_ready(function(*arguments))
        if case.task == "inference":
            return results
        (loss, out), grads = results
        return loss, out.batch_stats, grads

    return step


def library_step(case: Case, forward: Callable[..., Any], params: Any, others: Any) -> Step:
    """A network of another library under jit. Returns (loss, what is not trained, gradients), or the logits.

    Args:
      case: its images and labels are taken.
      forward: (params, others, images, train) -> (logits, others after this batch).
      params: what is trained.
      others: what is not, such as running statistics.
    """
    import jax
    import jax.numpy as jnp
    import optax

    images, labels = (jnp.asarray(a) for a in batch(case))

    @jax.jit
    def training(params, others, images, labels):
        def loss(params):
            logits, new = forward(params, others, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new, grads

    @jax.jit
    def inference(params, others, images, labels):
        return forward(params, others, images, False)[0]

    function = {"training": training, "inference": inference}[case.task]
    return lambda: jax.block_until_ready(function(params, others, images, labels))


def flax_step(case: Case) -> Step:
    """flax's network (`experiments.frameworks.linen`), under flax's names."""
    import jax
    import jax.numpy as jnp

    from experiments.frameworks import linen

    dtype = jnp.dtype(case.precision) if case.precision != "float32" else None
    model = linen.ResNet(case.arch, case.num_classes, dtype)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.asarray(batch(case)[0]))

    def forward(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = model.apply(variables, images, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return library_step(case, forward, variables["params"], variables["batch_stats"])


def keras_step(case: Case) -> Step:
    """The network of keras.applications (v1, biases in its convolutions) with Keras on JAX, by its stateless calls.

    Raises:
      ValueError: for a network that keras.applications does not have.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")  # in the bench's processes it is set before anything is imported
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    name = f"ResNet{case.arch.removeprefix('resnet')}"
    if not hasattr(keras.applications, name):
        raise ValueError(f"keras.applications has no {name}")
    keras.config.set_dtype_policy("mixed_bfloat16" if case.precision == "bfloat16" else "float32")
    model = getattr(keras.applications, name)(
        weights=None,
        input_shape=(case.height, case.width, case.channels),
        classes=case.num_classes,
        classifier_activation=None,
    )

    def forward(params, others, images, train):
        return model.stateless_call(params, others, images, training=train)

    found = (model.trainable_variables, model.non_trainable_variables)
    return library_step(case, forward, *([variable.value for variable in variables] for variables in found))


def torch_step(case: Case, *, channels_last: bool = False, compiled: bool = False) -> Step:
    """torchvision's network, on a GPU if there is one, bfloat16 by autocast; results as for `numpy_step`.

    Args:
      case: what to build.
      channels_last: the layout of kernels and images in memory; their shapes are OIHW and NCHW either way.
      compiled: by torch.compile in place of eager.
    """
    import torch

    from experiments.frameworks.torch import channels_first, device, make_resnet

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = make_resnet(case.network, "torchvision").train(case.task == "training")
    model = model.to(device(), memory_format=memory_format)
    images, labels = batch(case)
    images = channels_first(images).to(device()).contiguous(memory_format=memory_format)
    labels = torch.from_numpy(labels).to(device())
    network = torch.compile(model) if compiled else model

    def forward():
        with torch.autocast(device(), torch.bfloat16, enabled=case.precision == "bfloat16"):
            return network(images)

    def training():
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(), labels)
        loss.backward()
        return loss.detach(), dict(model.named_buffers()), {name: p.grad for name, p in model.named_parameters()}

    return finished({"training": training, "inference": torch.inference_mode()(forward)}[case.task])


def finished(step: Callable[[], Any]) -> Step:
    """A step of torch that returns when the work is done: a GPU runs behind."""
    import torch

    if not torch.cuda.is_available():
        return step

    def synchronized():
        result = step()
        torch.cuda.synchronize()
        return result

    return synchronized


CONTESTANTS: dict[ContestantName, Callable[..., Step]] = {
    "jax": jax_step,
    "jax.remat": functools.partial(jax_step, remat=True),
    "flax": flax_step,
    "keras": keras_step,
    "numpy": numpy_step,
    "torch": torch_step,
    "torch.channels_last": functools.partial(torch_step, channels_last=True),
    "torch.compile": functools.partial(torch_step, compiled=True),
}
