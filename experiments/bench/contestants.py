"""What `bench step` compares: the same network in NumPy, in JAX and in PyTorch, in training and in inference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from experiments.bench.processes import Step

Task = Literal["training", "inference"]


class Case(NamedTuple):
    """A network, its input, images (batch_size, height, width, channels) in float32, and what is done with it."""

    arch: str
    batch_size: int
    height: int
    width: int
    task: Task = "training"
    channels: int = 3
    num_classes: int = 196

    def __str__(self) -> str:
        return f"{self.arch}, batch {self.batch_size} of {self.height}x{self.width}x{self.channels}, float32"


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images, NHWC, and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case.batch_size, case.height, case.width, case.channels), np.float32)
    return images, rng.integers(0, case.num_classes, case.batch_size)


def numpy_step(case: Case) -> Step:
    """numpy_ref's network. Training returns (loss, running statistics, gradients), inference the logits."""
    from numpy_ref import layers, resnet

    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images, labels = batch(case)

    def training():
        out, vjp = resnet.apply(config, params, batch_stats, images, train=True)
        losses, loss_vjp = layers.softmax_cross_entropy(out.logits, labels)
        (dlogits,) = loss_vjp(np.full_like(losses, 1 / len(losses)))
        grads, _ = vjp(dlogits)
        return losses.mean(), out.batch_stats, grads

    def inference():
        out, _ = resnet.apply(config, params, batch_stats, images, train=False)
        return out.logits

    return {"training": training, "inference": inference}[case.task]


def jax_step(case: Case) -> Step:
    """jax_resnet's network under jit. Training returns (loss, running statistics, gradients), inference the logits."""
    import jax
    import jax.numpy as jnp

    from jax_resnet import resnet
    from jax_resnet.train import loss_and_logits

    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    images, labels = (jnp.asarray(a) for a in batch(case))

    @jax.jit
    def training(params, batch_stats, images, labels):
        def loss(params):
            return loss_and_logits(config, params, batch_stats, images, labels)

        (value, (_, new_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new_stats, grads

    @jax.jit
    def inference(params, batch_stats, images, labels):
        return resnet.apply(config, params, batch_stats, images, train=False).logits

    function = {"training": training, "inference": inference}[case.task]
    return lambda: jax.block_until_ready(function(params, batch_stats, images, labels))


def torch_step(case: Case, *, channels_last: bool = False, compiled: bool = False) -> Step:
    """torchvision's network. Training returns (loss, running statistics, gradients), inference the logits.

    Args:
      case: what to build.
      channels_last: the layout of kernels and images in memory; their shapes are OIHW and NCHW either way.
      compiled: by torch.compile in place of eager.
    """
    import torch
    import torchvision

    model = getattr(torchvision.models, case.arch)(num_classes=case.num_classes)
    if case.channels != 3:
        model.conv1 = torch.nn.Conv2d(case.channels, 64, 7, 2, 3, bias=False)
    model.train(case.task == "training")
    images, labels = batch(case)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=memory_format)
    labels = torch.from_numpy(labels)
    forward = torch.compile(model) if compiled else model

    def training():
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        return loss.detach(), dict(model.named_buffers()), {name: p.grad for name, p in model.named_parameters()}

    @torch.inference_mode()
    def inference():
        return forward(images)

    return {"training": training, "inference": inference}[case.task]


CONTESTANTS: dict[str, Callable[..., Step]] = {
    "numpy": numpy_step,
    "jax": jax_step,
    "torch": torch_step,
    "torch.channels_last": functools.partial(torch_step, channels_last=True),
    "torch.compile": functools.partial(torch_step, compiled=True),
}
