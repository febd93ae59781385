"""torch_ref.resnet against torchvision: names, weights, outputs, every gradient; and what torchvision does not have."""

import pytest
import torch
import torchvision

from torch_ref import resnet

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE_SIZES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}

every_depth = pytest.mark.parametrize("name", STAGE_SIZES)
SLOW = ("resnet34", "resnet152")  # they only have more of the blocks of resnet18 and resnet101
run_every_depth = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STAGE_SIZES]
)


def make(module, name, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(module, name)(**options)


def theirs(name, **options):
    return make(torchvision.models, name, **options)


def ours(name, **options):
    return make(resnet, name, **options)


@torch.no_grad()
def randomize(model):
    """Makes the model float64 and draws its vectors: BatchNorm's initial 0s and 1s would hide many mistakes."""
    generator = torch.Generator().manual_seed(1)
    model.double()
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.3, 1.3, generator=generator)
    return model


def batch(*shape):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    return images, torch.randint(0, 7, shape[:1], generator=generator)


def run(model, images, labels):
    """Everything that a training step computes, by name."""
    logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    wanted = {"images": images, **dict(model.named_parameters())}
    grads = torch.autograd.grad(loss, wanted.values())
    gradients = {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"logits": logits, "loss": loss, **gradients, **dict(model.named_buffers())}


# torchvision's network.


@every_depth
def test_state_dict_is_torchvisions(name):
    """Names, order, shapes and dtypes agree."""
    own, other = ours(name), theirs(name)
    described = [[(key, value.shape, value.dtype) for key, value in m.state_dict().items()] for m in (own, other)]
    assert described[0] == described[1]
    assert [key for key, _ in own.named_parameters()] == [key for key, _ in other.named_parameters()]


@every_depth
def test_same_seed_draws_torchvisions_weights(name):
    """Weights agree bit for bit, as both draw them in the same order."""
    own, other = (make(module, name, num_classes=7).state_dict() for module in (resnet, torchvision.models))
    assert [key for key, value in other.items() if not torch.equal(value, own[key])] == []


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@run_every_depth
def test_network_is_torchvisions(name, train):
    """Logits, loss, all gradients and running statistics agree bit for bit in float64: the operations are the same."""
    other = randomize(theirs(name, num_classes=7))
    own = ours(name, num_classes=7, seed=1).double()
    own.load_state_dict(other.state_dict(), strict=True)
    images, labels = batch(3, 3, 40, 64)
    before = {key: value.clone() for key, value in other.named_buffers()}
    expected = run(other.train(train), images, labels)
    actual = run(own.train(train), images, labels)
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []
    changed = {key for key, value in before.items() if not torch.equal(value, actual[key])}
    assert changed == (set(before) if train else set())


@run_every_depth
def test_activations_are_torchvisions(name):
    """Each named activation agrees bit for bit, and asking for activations does not change the logits."""
    other = randomize(theirs(name)).eval()
    own = ours(name).double().eval()
    own.load_state_dict(other.state_dict())
    seen = {}
    pairs = [("stem", other.maxpool), ("pool", other.avgpool)]
    for stage, count in enumerate(STAGE_SIZES[name], start=1):
        pairs += [(f"layer{stage}.{number}", getattr(other, f"layer{stage}")[number]) for number in range(count)]
    for key, module in pairs:
        module.register_forward_hook(lambda _module, _inputs, output, key=key: seen.update({key: output}))
    images, _ = batch(1, 3, 64, 33)
    with torch.no_grad():
        expected = other(images)
        logits, activations = own(images, return_activations=True)
        assert torch.equal(own(images), expected)
    assert torch.equal(logits, expected)
    assert set(activations) == {"stem", "pool"} | {key for key, _ in pairs}
    assert list(activations) == ["stem", *(key for key, _ in pairs[2:]), "pool"]
    assert [key for key in seen if not torch.equal(seen[key].squeeze(), activations[key].squeeze())] == []
    assert activations["pool"].shape == (1, own.fc.in_features)


# The options that torchvision lacks, or has under another name.


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_v1_is_torchvisions_network_with_strides_moved(name):
    """The strides of torchvision's own modules are moved by hand, from a bottleneck's 3x3 to its first 1x1. A basic
    block has only one place for its stride. Results agree in float64 bit for bit."""
    other = randomize(theirs(name, num_classes=7))
    for stage in (other.layer2, other.layer3, other.layer4) if name == "resnet50" else ():
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    own = ours(name, num_classes=7, stride_in="conv1").double()
    own.load_state_dict(other.state_dict())
    images, labels = batch(3, 3, 40, 64)
    expected, actual = run(other, images, labels), run(own, images, labels)
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_without_batch_norm_is_torchvisions_network_without_it(name):
    """torchvision's BatchNorm becomes Identity and its convolutions get biases. The results agree bit for bit."""
    other = theirs(name, num_classes=7, norm_layer=lambda channels: torch.nn.Identity()).double()
    own = ours(name, num_classes=7, batch_norm=False).double()
    for key, module in other.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.bias = own.get_parameter(f"{key}.bias")
    other.load_state_dict(own.state_dict(), strict=True)
    images, labels = batch(2, 3, 33, 40)
    expected, actual = run(other, images, labels), run(own, images, labels)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def test_without_batch_norm_convolutions_start_as_torchs():
    """reset_parameters of each layer, in the order of the modules, draws the same weights bit for bit."""
    model, other = (ours("resnet18", batch_norm=False, num_classes=7, seed=seed) for seed in (0, 1))
    torch.manual_seed(0)
    for module in other.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.reset_parameters()
    state, expected = model.state_dict(), other.state_dict()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_gamma_makes_blocks_their_shortcuts(name):
    """The weight of each block's last BatchNorm starts at 0, as with torchvision's zero_init_residual."""
    own = ours(name, zero_gamma=True).state_dict()
    other = theirs(name, zero_init_residual=True).state_dict()
    assert [key for key in other if not torch.equal(own[key], other[key])] == []


def test_batch_norm_is_the_only_thing_that_zero_gamma_concerns():
    plain, zeroed = (ours("resnet18", batch_norm=False, zero_gamma=zero).state_dict() for zero in (False, True))
    assert [key for key in plain if not torch.equal(plain[key], zeroed[key])] == []


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224)], ids=str)
def test_any_size_from_32(size):
    assert ours("resnet18", num_classes=7).eval()(torch.zeros(1, 3, *size)).shape == (1, 7)


# Errors for bad input.


BAD_IMAGES = [
    (torch.zeros(2, 64, 64, 3), r"\(N, C, H, W\) with C = 3 .*, got \(2, 64, 64, 3\): is this NHWC\?"),
    (torch.zeros(2, 1, 64, 64), r"with C = 3 \(in_channels\), got \(2, 1, 64, 64\)$"),
    (torch.zeros(3, 64, 64), r"must be \(N, C, H, W\).*got \(3, 64, 64\)$"),
    (torch.zeros(2, 3, 31, 64), "at least 32x32, got 31x64"),
    (torch.zeros(2, 3, 64, 31), "at least 32x32, got 64x31"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "must be float, got torch.uint8: convert and normalize"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=lambda value: str(getattr(value, "shape", "")))
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        ours("resnet18")(images)


BAD_OPTIONS = [
    ({"stride_in": "conv3"}, r'stride_in must be "conv2" \(v1.5\) or "conv1" \(v1\), got \'conv3\''),
    ({"num_classes": 0}, "must be >= 1, got 0 and 3"),
    ({"in_channels": 0}, "must be >= 1, got 1000 and 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ours("resnet50", **options)


def test_one_value_per_channel_in_training_is_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours("resnet18").train()(torch.zeros(1, 3, 32, 32))
