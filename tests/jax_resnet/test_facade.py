"""What `import jax_resnet as jr` gives, and what is public in its modules."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path

import jax
import pytest

import jax_resnet as jr

MODULES = [f"jax_resnet.{module.name}" for module in pkgutil.iter_modules(jr.__path__)]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_networks_are_functions_of_spelled_out_keywords(name):
    """The keywords are the fields that the name leaves open; each has the configuration's default and sets a field."""
    make = getattr(jr, name)
    assert inspect.isfunction(make)
    assert {"resnet18": "2, 2, 2 and 2", "resnet101": "3, 4, 23 and 3"}.get(name, "blocks") in make.__doc__
    defaults = {field.name: field.default for field in dataclasses.fields(jr.ResNetConfig)[2:]}
    assert {key: parameter.default for key, parameter in inspect.signature(make).parameters.items()} == defaults
    other = {
        "num_classes": 7, "in_channels": 1, "stride_in": "conv1", "batch_norm": False, "zero_gamma": True,
        "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.01,
    }  # fmt: skip
    config = make(**other)
    assert {key: getattr(config, key) for key in defaults} == other
    assert make(7) == make(num_classes=7)
    assert sum(config.stage_sizes) * (3 if config.block == "bottleneck" else 2) + 2 == int(name.removeprefix("resnet"))


def test_a_network_in_three_lines():
    config = jr.ResNetConfig("basic", [1, 1, 1, 1], num_classes=10)  # small, and hashable with a list too
    params, batch_stats = jr.init(config, jax.random.key(0))
    run = jax.jit(jr.apply, static_argnums=0, static_argnames="train")
    out = run(config, params, batch_stats, jax.numpy.ones((2, 32, 32, 3)), train=False)
    assert isinstance(out, jr.Output)
    assert out.logits.shape == (2, 10)


@pytest.mark.parametrize("name", ["jax_resnet", *MODULES])
def test_public_names_are_meant(name):
    """`__all__` has every name that a module defines without an underscore, and only names that exist."""
    module = importlib.import_module(name)
    defined = set()
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)}
        defined |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    assert all(hasattr(module, key) for key in module.__all__)
    assert {key for key in defined if not key.startswith("_")} <= set(module.__all__)
