"""One training step, one evaluation step, and the state they pass on: `jax_resnet.train` in PyTorch.

Module and optimizer are PyTorch's own, so any nn.Module will do that maps images (N, C, H, W) to logits.

>>> from torch_ref import resnet
>>> model = resnet.resnet18(num_classes=10, in_channels=1)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
>>> state = create_train_state(model, optimizer)
>>> step = make_train_step(model, optimizer)
>>> state, metrics = step(state, torch.zeros(8, 1, 32, 32), torch.arange(8))
>>> state.step, metrics["prediction"].shape
(1, torch.Size([8]))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainState(NamedTuple):
    """Everything a step changes: the count of steps and, in place, the module's parameters and buffers by name, and the
    optimizer, which holds its own state."""

    step: int
    params: dict[str, Tensor]
    batch_stats: dict[str, Tensor]
    opt_state: torch.optim.Optimizer


def create_train_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """The state before the first step."""
    return TrainState(0, dict(model.named_parameters()), dict(model.named_buffers()), optimizer)


def freeze_backbone(model: nn.Module) -> None:
    """Leaves the dense layer "fc" alone to be trained; see `make_train_step`."""
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("fc."))


def make_train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: Callable[[int], float] | None = None,
    label_smoothing: float = 0.0,
    preprocess: Callable[[Any, int], Tensor] = lambda images, step: images,
) -> Callable[[TrainState, Any, Tensor], tuple[TrainState, dict[str, Tensor]]]:
    """Builds the training step.

    Args:
      model: the network; one with frozen parameters (requires_grad False) runs as in evaluation, and its running
        statistics stay.
      optimizer: of its parameters.
      learning_rate: a schedule, set in all groups before each update; None leaves the optimizer's.
      label_smoothing: the share of the target spread over all classes.
      preprocess: (images, step) -> images (N, C, H, W) of the module's dtype and on its device.

    Returns:
      step(state, images, labels) -> (state, metrics): images as `preprocess` takes them, labels (N,) int64; metrics, of
      the batch before the update, are "loss" and "top1" (the share of right answers), scalars, and "prediction", (N,).
      The state that goes in is changed.
    """
    train = all(param.requires_grad for param in model.parameters())

    def step(state: TrainState, images: Any, labels: Tensor) -> tuple[TrainState, dict[str, Tensor]]:
        model.train(train)
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step)
        optimizer.zero_grad()
        logits = model(preprocess(images, state.step))
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        loss.backward()
        optimizer.step()
        prediction = logits.detach().argmax(-1)
        top1 = (prediction == labels).double().mean()
        return state._replace(step=state.step + 1), {"loss": loss.detach(), "top1": top1, "prediction": prediction}

    return step


def make_eval_step(
    model: nn.Module, *, preprocess: Callable[[Any], Tensor] = lambda images: images
) -> Callable[[Any, Any, Any, Tensor], dict[str, Tensor]]:
    """Builds the evaluation step; arguments as for `make_train_step`, but `preprocess` takes images alone.

    Returns:
      step(params, batch_stats, images, labels) -> per example, each (N,): "loss", "prediction", "confidence" (the
      prediction's probability) and "top5" (whether the label is among the five largest logits, or all if there are
      fewer).
    """

    @torch.inference_mode()
    def step(
        params: dict[str, Tensor], batch_stats: dict[str, Tensor], images: Any, labels: Tensor
    ) -> dict[str, Tensor]:
        model.eval()
        logits = torch.func.functional_call(model, params | batch_stats, (preprocess(images),))
        best = logits.topk(min(5, logits.shape[1])).indices
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "prediction": best[:, 0],
            "confidence": logits.softmax(-1).amax(-1),
            "top5": (best == labels[:, None]).any(1),
        }

    return step
