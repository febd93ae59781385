"""What `bench step` compares: one network in NumPy, JAX, Flax, Keras and PyTorch, in training and inference."""

from __future__ import annotations

import functools
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
    """A network, its input images (batch_size, height, width, channels), and the task."""

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


def dtype_of(case: Case) -> Any:
    """The dtype of activations in JAX; None keeps that of the images."""
    import jax.numpy as jnp

    return jnp.bfloat16 if case.precision == "bfloat16" else None


def refuse_in_numpy(precision: Precision) -> None:
    """Raises a ValueError for bfloat16."""
    if precision != "float32":
        raise ValueError(f"NumPy has no {precision}")


def numpy_step(case: Case) -> Step:
    """numpy_ref's network. Training returns (loss, running statistics, gradients), inference the logits."""
    refuse_in_numpy(case.precision)
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


def jax_program(
    case: Case, forward: Callable[..., Any], params: Any, others: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A network as a jitted function, whose results are those of `numpy_step`, and its arguments.

    Args:
      case: gives the images, labels and task.
      forward: (params, others, images, train) -> (logits, others after this batch).
      params, others: what is trained, and what is not, such as running statistics.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def training(params: Any, others: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = forward(params, others, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new, grads

    def inference(params: Any, others: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return forward(params, others, images, False)[0]

    arguments = jax.tree.map(jnp.asarray, (params, others, *batch(case)))
    return jax.jit({"training": training, "inference": inference}[case.task]), arguments


def jax_done(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Step:
    """A step of JAX that returns when the work is done."""
    import jax

    return lambda: jax.block_until_ready(function(*arguments))


def our_program(case: Case, *, remat: bool = False) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """jax_resnet's network as a `jax_program`; remat recomputes each block in the backward pass."""
    import jax

    from experiments.frameworks.jax import make_resnet, resnet

    config = make_resnet(case.network)

    def forward(params: Any, batch_stats: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        options = dict(train=train, dtype=dtype_of(case), remat=remat)
        out = resnet.apply(config, params, batch_stats, images, **options)
        return out.logits, out.batch_stats

    return jax_program(case, forward, *resnet.init(config, jax.random.key(0)))


def jax_step(case: Case, *, remat: bool = False) -> Step:
    """jax_resnet's network; remat as for `our_program`."""
    return jax_done(*our_program(case, remat=remat))


def flax_step(case: Case) -> Step:
    """flax's network (`experiments.frameworks.linen`), under flax's names."""
    import jax

    from experiments.frameworks import linen

    model = linen.ResNet(case.arch, case.num_classes, dtype_of(case))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), batch(case)[0])

    def forward(params: Any, batch_stats: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = model.apply(variables, images, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return jax_done(*jax_program(case, forward, variables["params"], variables["batch_stats"]))


def keras_step(case: Case) -> Step:
    """The network of keras.applications (v1, biases in its convolutions) with Keras on JAX, by its stateless calls."""
    import keras

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
    return jax_done(*jax_program(case, forward, *([v.value for v in variables] for variables in found)))


def torch_step(case: Case, *, channels_last: bool = False, compiled: bool = False) -> Step:
    """torchvision's network, on a GPU if there is one, bfloat16 by autocast; results as for `numpy_step`.

    channels_last is the layout of kernels and images in memory; their shapes are OIHW and NCHW either way.
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

    return torch_done({"training": training, "inference": torch.inference_mode()(forward)}[case.task])


def torch_done(step: Callable[[], Any]) -> Step:
    """A step of PyTorch that returns when the work is done: a GPU works asynchronously."""
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
