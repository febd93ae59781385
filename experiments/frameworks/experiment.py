"""The settings that decide the result of a training, for any data and network; imports no framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

FrameworkName = Literal["jax", "numpy", "torch", "torchvision"]
Precision = Literal["float32", "float64", "bfloat16"]
OptimizerName = Literal["adabound", "amsbound", "adaboundw", "adam", "adamw", "amsgrad", "sgd"]
CommonOptimizerName = Literal["adam", "adamw", "sgd", "adabound", "amsbound"]  # in all frameworks
ScheduleName = Literal["constant", "cosine", "step", "onecycle"]

TITLES = {"jax": "JAX", "numpy": "NumPy", "torch": "PyTorch"}
LEARNING_RATES: dict[str, float] = dict.fromkeys(get_args(OptimizerName), 1e-3) | {"sgd": 0.05}
BOUNDED = ("adabound", "amsbound", "adaboundw")
MAX_EPOCHS = 1_000_000  # a larger number is taken for a typing error


def jax_only(default: Any) -> Any:
    """A field for --framework jax only; other frameworks accept only its default."""
    return dataclasses.field(default=default, metadata={"jax_only": True})


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Settings that decide the result. A run can only be resumed with the same ones."""

    # Settings that only some programs have; without types, these are no fields. pad: pixels around a picture; bounds:
    # the arguments of `experiments.training.step_sizes`, for a run that reports step sizes.
    augmentation, normalize, freeze, pad, bounds = "none", True, "none", 0, None

    opt: OptimizerName = "adabound"
    """The optimizer. adabound, amsbound, adam, amsgrad, sgd: L2 decay; adaboundw, adamw: decoupled decay."""
    framework: FrameworkName = "jax"
    """The framework that computes; all compute the same, up to rounding. torch uses the network of torch_ref,
    torchvision its own."""
    epochs: int = 1
    """Passes over the training pictures."""
    batch_size: int = 32
    """Pictures per step; the last, partial batch of an epoch is left out."""
    learning_rate: float | None = None
    """The peak of the schedule [default: 1e-3, for sgd 0.05]."""
    schedule: ScheduleName = "cosine"
    """The learning rate: cosine to 0, step (a tenth after one half and after three quarters), onecycle, constant."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the schedule."""
    final_lr: float = 0.1
    """AdaBound: the step size to which its bounds converge."""
    gamma: float = 1e-3
    """AdaBound: how fast its bounds close."""
    momentum: float = 0.9
    """SGD's momentum; b1 of the other optimizers."""
    dampening: float = 0.0
    """SGD adds (1 - dampening) of the gradient to its momentum; if equal to --momentum, this is AdaBound's limit."""
    weight_decay: float = 0.0
    """Weight decay of kernels, not of biases and BatchNorm."""
    label_smoothing: float = 0.0
    """The share of each target that is spread over all classes."""
    loss_scale: float = jax_only(1.0)
    """Multiply all gradients by this, as if it scaled the loss: changes AdaBound's steps at its bounds, not Adam's."""
    clip_norm: float | None = jax_only(None)
    """Clip the global norm of the gradients to this value."""
    ema: float | None = jax_only(None)
    """Keep moving averages of the weights with this decay, such as 0.999; they are tested and saved as well."""
    accumulate: int = jax_only(1)
    """Compute each batch in this many parts, for less memory. BatchNorm then sees the parts, not the batch."""
    remat: bool = jax_only(False)
    """Recompute each block in the backward pass: less memory, more time."""
    precision: Precision = "float32"
    """The type of weights and computations; float64 is for comparisons. bfloat16 is for activations only: weights,
    BatchNorm's statistics and the loss stay float32."""
    seed: int = 0
    """Decides all that is random: the weights, the order of the pictures and their augmentation, --limit."""
    limit: int | None = None
    """Train on this many pictures only, drawn by --seed, balanced by class."""
    test_limit: int | None = None
    """Test on this many pictures only, balanced by class: always the same ones."""
    test_every: int = 1
    """Epochs between two tests; the last epoch is always tested."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl within an epoch."""

    @property
    def weights_dtype(self) -> str:
        """The type of the weights, and of the pictures that go into the network."""
        return "float32" if self.precision == "bfloat16" else self.precision

    def check(self) -> None:
        """Raises a ValueError for values that are out of range or contradict one another."""
        counts = ("epochs", "log_every", "test_every", "limit", "test_limit", "accumulate")
        require(self, "be at least 1", lambda value: value >= 1, *counts)
        require(self, "be at least 2", lambda value: value >= 2, "batch_size")
        require(self, "be at least 0", lambda value: value >= 0, "seed")
        require(self, f"be at most {MAX_EPOCHS:,}", lambda value: value <= MAX_EPOCHS, "epochs")
        require(self, "be below 2^32", lambda value: value < 2**32, "seed")
        require(
            self, "be positive and finite", is_positive, "learning_rate", "clip_norm", "final_lr", "gamma", "loss_scale"
        )
        require(self, "be between 0 and 1, such as 0.999", lambda value: 0 < value < 1, "ema")
        require(self, "be below 1: at 1 no gradient would be forgotten", lambda value: value != 1, "momentum")
        require(self, "be between 0 and 1", lambda value: 0 <= value <= 1, "momentum", "dampening", "label_smoothing")
        finite = ("weight_decay", "warmup_epochs")
        require(self, "not be negative or infinite", lambda value: 0 <= value < math.inf, *finite)
        if self.batch_size % self.accumulate:
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --accumulate {self.accumulate}")
        if self.dampening and self.opt != "sgd":
            raise ValueError(f"--dampening is only for SGD: it does nothing for {self.opt}")
        if self.precision == "bfloat16" and self.framework != "jax":
            raise ValueError(f"--precision bfloat16 is for --framework jax, not for {self.framework}")


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def require(settings: Any, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises a ValueError with the rule if one of the named settings is given and breaks it."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag(name)} must {rule}, got {value}")


def is_positive(value: float) -> bool:
    return 0 < value < math.inf
