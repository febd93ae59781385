"""torch_ref.train's evaluation; tests/experiments/frameworks/test_common.py compares its training with JAX's."""

import pytest
import torch

from torch_ref import resnet
from torch_ref.train import create_train_state, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluation_uses_the_weights_that_are_passed_and_the_next_step_trains():
    """With fewer than five classes each label is among the five best."""
    model = resnet.resnet18(num_classes=3, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters())
    state = create_train_state(model, optimizer)
    images, labels = torch.ones(3, 1, 32, 32), torch.arange(3)
    uniform = {name: torch.zeros_like(value) for name, value in state.params.items()}
    results = make_eval_step(model)(uniform, state.batch_stats, images, labels)
    torch.testing.assert_close(results["confidence"], torch.full((3,), 1 / 3))
    assert results["top5"].all()
    make_train_step(model, optimizer)(state, images, labels)
    assert model.bn1.num_batches_tracked == 1
