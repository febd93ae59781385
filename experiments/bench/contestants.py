"""What is compared in a benchmark: the same training step in JAX and in PyTorch, each in a process of its own.

Processes of their own, since thread pools and malloc's settings would get into one another's way. A contestant measures
when it is told to, so that the contestants take turns.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

Step = Callable[[], None]


class Case(NamedTuple):
    """A network and its input: images (batch_size, height, width, channels), float32."""

    arch: str
    batch_size: int
    height: int
    width: int
    channels: int = 3
    num_classes: int = 196

    def __str__(self) -> str:
        return f"{self.arch}, batch {self.batch_size} of {self.height}x{self.width}x{self.channels}, float32"


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images, NHWC, and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case.batch_size, case.height, case.width, case.channels), np.float32)
    return images, rng.integers(0, case.num_classes, case.batch_size)


def jax_step(case: Case) -> Step:
    """This project's network under jit: loss, gradients and running statistics."""
    from experiments.malloc import keep_freed_memory

    keep_freed_memory()  # as experiments.cars does
    import jax
    import jax.numpy as jnp

    from jax_resnet import resnet
    from jax_resnet.train import loss_and_logits

    config = getattr(resnet, case.arch)(num_classes=case.num_classes, in_channels=case.channels)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    images, labels = (jnp.asarray(a) for a in batch(case))

    @jax.jit
    def step(params, batch_stats, images, labels):
        def loss(params):
            return loss_and_logits(config, params, batch_stats, images, labels)

        (value, (_, new_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new_stats, grads

    return lambda: jax.block_until_ready(step(params, batch_stats, images, labels))


def torch_step(case: Case, *, compiled: bool = False) -> Step:
    """torchvision's network, eager or by torch.compile: loss, gradients and running statistics."""
    import torch
    import torchvision

    model = getattr(torchvision.models, case.arch)(num_classes=case.num_classes)
    if case.channels != 3:
        model.conv1 = torch.nn.Conv2d(case.channels, 64, 7, 2, 3, bias=False)
    model.train()
    images, labels = batch(case)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(labels)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(forward(images), labels).backward()

    return step


CONTESTANTS: dict[str, Callable[[Case], Step]] = {
    "jax": jax_step,
    "torch": torch_step,
    "torch.compile": lambda case: torch_step(case, compiled=True),
}


def available() -> list[str]:
    """The contestants that can run here: PyTorch's only where torch and torchvision are installed."""
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))
    return [name for name in CONTESTANTS if has_torch or not name.startswith("torch")]


class Contestant:
    """A contestant in its process.

    first_seconds: what the first step took, compilation included.

    Raises:
      RuntimeError: if it fails, with its message.
    """

    def __init__(self, name: str, case: Case):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case), daemon=True)
        self._process.start()
        theirs.close()
        self.name = name
        self.first_seconds = self._receive()

    def measure(self, steps: int) -> list[float]:
        """Runs one step to warm up again after the others' turns, then some; returns the seconds of each of those."""
        self._connection.send(steps)
        return self._receive()

    def _receive(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended without a word") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()  # which ends the process by itself, unless it hangs
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, name: str, case: Case) -> None:
    try:
        step = CONTESTANTS[name](case)
        connection.send(_seconds(step))
        while True:
            steps = connection.recv()
            step()
            connection.send([_seconds(step) for _ in range(steps)])
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
