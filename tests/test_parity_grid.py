"""The full grid of parity: five depths, train and eval, colour and grey, three sizes; optimizers on deeper networks.

Every depth runs in colour on 64x64 in training and in evaluation, in grey on 64x96 in training, and in colour on
224x224 in evaluation. Only ResNet-18 runs the other combinations of channels and size, since they do not depend on the
depth.

`python -m experiments.parity` runs all five optimizers on ResNet-18; this file runs three. On deeper networks all five
take half an hour on two cores; this file runs two on ResNet-50 and one on ResNet-101. These commands run all five:

    python -m experiments.parity --sections trajectories --trajectory-arch resnet50
    python -m experiments.parity --sections trajectories --trajectory-arch resnet101 --frameworks torch_ref
"""

import numpy as np
import pytest

import numpy_ref.resnet
import numpy_ref.weights

pytest.importorskip("torchvision", reason="needs the extra torch")

from experiments.frameworks.common import ResNet
from experiments.parity import __main__ as parity
from experiments.parity import cases, errors, in_torch
from experiments.parity import checks as compare
from experiments.parity.comparison import TRAINING_BATCH
from numpy_ref import fast, layers

pytestmark = pytest.mark.slow

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FRAMEWORKS = ["numpy", "torch_ref", "torchvision"]

GRID = [  # network, channels, (N, H, W), mode
    *((depth, 3, (8, 64, 64), mode) for depth in DEPTHS for mode in ("train", "eval")),
    *((depth, 1, (8, 64, 96), "train") for depth in DEPTHS),
    ("resnet101", 3, (8, 45, 67), "train"),
    *((depth, 3, (1, 224, 224), "eval") for depth in DEPTHS),
    ("resnet18", 1, (8, 64, 96), "eval"),
    *(("resnet18", 1, (8, 64, 64), mode) for mode in ("train", "eval")),
    *(("resnet18", 3, (8, 64, 96), mode) for mode in ("train", "eval")),
    ("resnet18", 1, (1, 224, 224), "eval"),
]


@pytest.fixture(autouse=True)
def one_thread():
    with in_torch.exact_on_one_thread():
        yield


@pytest.mark.parametrize(("arch", "channels", "shape", "mode"), GRID, ids=str)
def test_network_is_the_same_in_all_frameworks(arch, channels, shape, mode, x64):
    """float64; 1e-10, the target of the design, on logits, loss, activations, statistics and every gradient."""
    network = ResNet(arch, in_channels=channels)
    weights = cases.draw_weights(network, seed=0)
    batch = cases.draw_batch(network, shape, np.random.default_rng(1))
    compared = compare.compare_network(network, weights, batch, ["float64"], mode, FRAMEWORKS)
    rows = [row for rows, _ in compared for row in rows]
    assert len(rows) == len(FRAMEWORKS) * 6
    assert [row for row in rows if row.verdict != "ok"] == []


def test_the_plain_numpy_network_is_the_fast_one_at_full_width():
    """ResNet-101 in float64, on pictures whose sides no stride divides; the grid compares the fast one with JAX."""
    network = ResNet("resnet101")
    trees = numpy_ref.weights.from_torch(cases.draw_weights(network, seed=0))
    images, labels = cases.draw_batch(network, (8, 45, 67), np.random.default_rng(1))
    results = []
    for module in (numpy_ref.resnet, fast):
        out, vjp = module.apply(module.resnet101(), *trees, images, train=True)
        (dlogits,) = layers.softmax_cross_entropy(out.logits, labels)[1](np.full(8, 1 / 8))
        dparams, dimages = vjp(dlogits)
        results.append(numpy_ref.weights.to_torch(dparams, out.batch_stats) | {"logits": out.logits, "images": dimages})
    assert errors.largest(errors.relative_errors(*results))[0] <= 1e-12


OTHER_NETWORKS = [["--stride-in", "conv1"], ["--no-batch-norm"], ["--seed", "1"]]


@pytest.mark.parametrize("options", OTHER_NETWORKS, ids=str)
def test_other_networks(options):
    """The program compares both dtypes, with its own bounds."""
    assert parity.main(["--sections", "network", "--arch", "resnet50", *options]) == 0


STEPS = range(1, 21)
# The deeper trainings take 8 to 10 GB each; in one group, they run one after the other.
TRAININGS = [
    *(("resnet18", optimizer, ("numpy", "torch_ref")) for optimizer in ("adam", "adamw", "adabound")),
    ("resnet50", "sgd", ("numpy", "torch_ref")),
    ("resnet50", "amsbound", ("numpy", "torch_ref")),
    ("resnet101", "adabound", ("torch_ref",)),
]


@pytest.mark.xdist_group("trainings")
@pytest.mark.parametrize(("arch", "optimizer", "frameworks"), TRAININGS, ids=str)
def test_trainings(arch, optimizer, frameworks, x64):
    """20 steps in float64 meet the design's targets: 1e-9 for a step from the same state, and for a free run ten times
    the effect of one unit in the last place of the weights."""
    network = ResNet(arch)
    weights = cases.draw_weights(network, seed=0)
    rows, growth = compare.compare_trainings(network, weights, optimizer, STEPS, TRAINING_BATCH, frameworks, seed=0)
    assert len(growth.yardstick) == 20
    assert [row for row in rows if row.verdict != "ok"] == []
