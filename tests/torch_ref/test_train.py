"""torch_ref.train against PyTorch by hand; JAX and NumPy are compared in tests/experiments/frameworks."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch")

import torch.nn.functional as F  # noqa: E402 (it is torch)

from torch_ref import resnet  # noqa: E402
from torch_ref.train import create_train_state, freeze_backbone, make_eval_step, make_train_step  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet.resnet18(num_classes=7, in_channels=1).double()


def batch(n=8, size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 7, (n,), generator=generator)


def test_steps_by_hand(model):
    """Three steps agree to the bit, with preprocessing and a rate by the step's number, and smoothed labels."""
    theirs = copy.deepcopy(model).train()
    images, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    state = create_train_state(model, optimizer)
    step = make_train_step(
        model,
        optimizer,
        learning_rate=lambda number: 0.1 / (1 + number),
        label_smoothing=0.1,
        preprocess=lambda images, number: images * (1 + number),
    )
    expected = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9)
    for number in range(3):
        state, metrics = step(state, images, labels)
        expected.param_groups[0]["lr"] = 0.1 / (1 + number)
        expected.zero_grad()
        logits = theirs(images * (1 + number))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        expected.step()
        assert metrics["loss"] == loss
        assert torch.equal(metrics["prediction"], logits.argmax(1))
        assert metrics["top1"] == (logits.argmax(1) == labels).double().mean()
    assert state.step == 3
    held = state.params | state.batch_stats
    for name, value in theirs.state_dict().items():
        assert torch.equal(held[name], value), name


def test_a_frozen_backbone_stays(model):
    before = copy.deepcopy(model.state_dict())
    freeze_backbone(model)
    optimizer = torch.optim.Adam([param for param in model.parameters() if param.requires_grad])
    state, _ = make_train_step(model, optimizer)(create_train_state(model, optimizer), *batch())
    for name, value in (state.params | state.batch_stats).items():
        assert torch.equal(value, before[name]) == (not name.startswith("fc.")), name


def test_evaluation_by_hand(model):
    """Evaluation uses the weights that are passed, not the module's own; the next step runs in training mode."""
    images, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = create_train_state(model, optimizer)
    params = {name: 1.1 * value.detach() for name, value in state.params.items()}
    results = make_eval_step(model, preprocess=lambda images: 2 * images)(params, state.batch_stats, images, labels)
    theirs = copy.deepcopy(model).eval()
    theirs.load_state_dict(params | state.batch_stats)
    logits = theirs(2 * images).detach()
    assert torch.equal(results["loss"], F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(results["prediction"], logits.argmax(1))
    assert torch.equal(results["confidence"], logits.softmax(1).max(1).values)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert torch.equal(results["top5"], rank < 5)
    assert not results["top5"].all()
    make_train_step(model, optimizer)(state, images, labels)
    assert model.bn1.num_batches_tracked == 1


def test_fewer_than_five_classes_have_a_top5():
    model = resnet.resnet18(num_classes=3, in_channels=1)
    state = create_train_state(model, torch.optim.SGD(model.parameters()))
    results = make_eval_step(model)(state.params, state.batch_stats, torch.zeros(3, 1, 32, 32), torch.arange(3))
    assert results["top5"].all()
