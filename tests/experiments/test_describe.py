"""experiments.describe: the counts of torchvision's networks, and the shapes of our own."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import torch
import torchvision

from experiments import describe
from jax_resnet import resnet


def counted_by_torch(name, height, width):
    """{layer: (output's shape (H, W, C), multiply-adds)} of torchvision's network, run without data."""
    rows = {}

    def record(layer, module, inputs, output):
        *_, channels = output.shape if output.ndim == 2 else output.shape[:2]
        shape = (*output.shape[2:], channels)
        rows[layer] = shape, math.prod(output.shape[2:]) * module.weight.numel()

    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        for layer, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(lambda *arguments, layer=layer: record(layer, *arguments))
        model(torch.zeros(1, 3, height, width))
    return rows, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("size", [(224, 224), (65, 96)], ids=str)
def test_every_layer_is_torchvisions(name, size):
    """Shapes, multiply-adds and parameters agree, of convolutions and the dense layer. 65 is odd in every stage."""
    rows = list(describe.layer_rows(getattr(resnet, name)(), *size))
    expected, parameters = counted_by_torch(name, *size)
    assert {row.name: (row.shape, row.multiply_adds) for row in rows if row.multiply_adds} == expected
    assert sum(row.parameters for row in rows) == parameters
    if size == (224, 224):
        published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
        assert parameters == published["num_params"]
        assert sum(row.multiply_adds for row in rows) / 1e9 == pytest.approx(published["_ops"], abs=0.005)


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
@pytest.mark.parametrize("settings", [{}, {"stride_in": "conv1"}, {"batch_norm": False}, {"in_channels": 1}], ids=str)
def test_shapes_and_parameters_are_those_of_the_network(name, settings):
    """Shapes are those of apply's activations, where both have them; parameters are those of init's arrays."""
    config = getattr(resnet, name)(num_classes=7, **settings)
    params, batch_stats = jax.eval_shape(lambda: resnet.init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 64, 97, config.in_channels), jnp.float32)
    out = jax.eval_shape(
        lambda *args: resnet.apply(config, *args, train=False, return_activations=True), params, batch_stats, images
    )
    rows = {row.name: row for row in describe.layer_rows(config, 64, 97)}
    assert rows["max_pool"].shape == out.activations["stem"].shape[1:]
    assert rows["pool"].shape == out.activations["pool"].shape[1:]
    assert rows["fc"].shape == out.logits.shape[1:]
    for block in resnet.blocks(config):
        assert rows[block.convs[-1].name].shape == out.activations[block.name].shape[1:]
    assert sum(row.parameters for row in rows.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_papers_bottleneck_does_less():
    """v1 strides before the 3x3, v1.5 in it: ResNet-101 has 7.6e9 (He et al. 2015, table 1) and 7.8e9."""
    v1, v15 = (
        sum(row.multiply_adds for row in describe.layer_rows(resnet.resnet101(stride_in=stride_in), 224, 224))
        for stride_in in ("conv1", "conv2")
    )
    assert v15 == 7_801_405_440
    assert v1 == pytest.approx(7.6e9, rel=0.01)
    assert v1 < v15


def test_the_table(capsys):
    arguments = "--arch resnet18 --image-size 64x96 --in-channels 1 --num-classes 196 --no-batch-norm --stride-in conv1"
    assert describe.main(arguments.split()) == 0
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["kernel", "output", "parameters", "multiply-adds"]
    assert lines[1] == ["conv1", "7x7 / 2", "32 x 48 x 64", "3,200", "4,816,896"]  # 49 * 64 + 64, 49 * 64 * 32 * 48
    assert lines[2] == ["max_pool", "16 x 24 x 64", "0", "0"]
    assert ["layer2.0.downsample.0", "1x1 / 2", "8 x 12 x 128", "8,320", "786,432"] in lines
    assert lines[-2] == ["fc", "196", "100,548", "100,352"]
    numbers = [[int(cell.replace(",", "")) for cell in line[-2:]] for line in lines[1:]]
    assert numbers[-1] == [sum(column) for column in zip(*numbers[:-1], strict=True)]
