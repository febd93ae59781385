"""A training step, an evaluation step and the training state: `jax_resnet.train` in PyTorch.

The model can be any nn.Module that maps images (N, C, H, W) to logits, with any optimizer of torch.

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
    """Everything that a step changes: the step count, the module's parameters and buffers by name, and the optimizer,
    which holds its own state. All but the step count change in place."""

    step: int
    params: dict[str, Tensor]
    batch_stats: dict[str, Tensor]
    opt_state: torch.optim.Optimizer


def create_train_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(0, dict(model.named_parameters()), dict(model.named_buffers()), optimizer)


def freeze_backbone(model: nn.Module) -> None:
    """Freezes all parameters except those of the dense layer "fc". Call this before `make_train_step`."""
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
      model: the network. If any parameter is frozen at this call (requires_grad=False), the network runs in evaluation
        mode and keeps its running statistics.
      optimizer: an optimizer of the model's parameters.
      learning_rate: a schedule, step -> learning rate, for all parameter groups. None keeps the optimizer's rates.
      label_smoothing: the share of the target that is spread over all classes.
      preprocess: (images, step) -> images (N, C, H, W) with the module's dtype and device.

    Returns:
      step(state, images, labels) -> (state, metrics). images are the input of `preprocess`; labels are (N,) int64.
      metrics has the scalars "loss" and "top1" (the share of correct predictions) and "prediction", (N,), all from
      before the update. The step changes the tensors and the optimizer of its argument state.
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
    """Builds the evaluation step. Arguments are those of `make_train_step`, but `preprocess` takes only images.

    Returns:
      step(params, batch_stats, images, labels) -> a dict of tensors (N,): "loss", "prediction", "confidence" (the
      prediction's probability) and "top5" (whether the label has one of the five largest logits). With at most five
      classes, "top5" is always true.
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
