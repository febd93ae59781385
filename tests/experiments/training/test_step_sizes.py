"""Step sizes by layer, checked by hand."""

import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import unflatten_dict

from experiments.frameworks.jax import moments_of
from experiments.training.plots import plot_layer_steps
from experiments.training.step_sizes import layer_steps, summarize_steps
from jax_resnet.adabound import adabound

SETTINGS = dict(base_lr=1e-3, final_lr=0.1, gamma=1e-3, b1=0.9)
GRADIENTS = {"conv1.weight": 1e-5, "layer1.2.conv1.weight": 0.5, "layer1.10.conv1.weight": 1e3, "fc.weight": 2.0}


def after_one_update(optimizer):
    grads = unflatten_dict({name: jnp.full((2, 3), g) for name, g in GRADIENTS.items()} | {"fc.bias": jnp.ones(3)}, ".")
    return optimizer.update(grads, optimizer.init(grads))[1]


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.amsgrad(1e-3), adabound(1e-3)])
def test_first_update_by_hand(optimizer, tmp_path):
    """Adam moves by learning_rate · sign(g), and m is 0.1·g: the step is learning_rate / (0.1·|g|).

    The bounds at t = 1 are 0.1 · 0.001/1.001 and 0.1 · 1.001/0.001 = 100.1. Only kernels are listed, in the
    network's order.
    """
    steps = layer_steps(moments_of(after_one_update(optimizer)), **SETTINGS)
    assert [layer["name"] for layer in steps["layers"]] == list(GRADIENTS)
    for layer, gradient in zip(steps["layers"], GRADIENTS.values(), strict=True):
        for name in ("low", "median", "high"):
            # eps = 1e-8 is added to sqrt(v) = sqrt(0.001)·|g|: it changes the step of the smallest gradient by 3%
            assert layer[name] == pytest.approx(1e-3 / (0.1 * gradient), rel=0.04 if gradient == 1e-5 else 1e-3)
    assert (steps["update"], steps["lower"]) == (1, pytest.approx(0.1 * 0.001 / 1.001))
    assert steps["upper"] == pytest.approx(100.1)
    assert [layer["at_upper"] for layer in steps["layers"]] == [1, 0, 0, 0]
    assert [layer["at_lower"] for layer in steps["layers"]] == [0, 0, 1, 0]
    plot_layer_steps(tmp_path / "steps.png", steps, "by hand")
    assert (tmp_path / "steps.png").stat().st_size > 10_000


@pytest.mark.parametrize("bounded", [True, False])
def test_the_summary_of_an_epoch_by_hand(bounded):
    """6 of the 27 weights are at each bound. Medians are clipped only if the optimizer clips its steps."""
    summary = summarize_steps(moments_of(after_one_update(adabound(1e-3))), **SETTINGS, bounded=bounded)
    assert summary["at_upper"] == pytest.approx(6 / 27, rel=1e-4)
    assert summary["at_lower"] == pytest.approx(6 / 27, rel=1e-4)
    assert summary["step_lower"] == pytest.approx(0.1 * 0.001 / 1.001, rel=1e-4)
    assert summary["step_upper"] == pytest.approx(100.1, rel=1e-4)
    assert summary["step/layer1.2.conv1"] == pytest.approx(0.02, rel=1e-3)
    assert summary["step/conv1"] == pytest.approx(100.1 if bounded else 1000, rel=0.04)
    assert summary["step/layer1.10.conv1"] == pytest.approx(1e-4 if bounded else 1e-5, rel=2e-3)
    assert [name for name in summary if name.startswith("step/")] == [
        f"step/{name.removesuffix('.weight')}" for name in GRADIENTS
    ]


def test_amsgrads_step_is_the_one_that_it_takes():
    """The step is update / -m, also after a large gradient that AMSGrad's maximum still holds."""
    optimizer = optax.chain(optax.add_decayed_weights(0.0), optax.amsgrad(1e-3))
    params = {"fc": {"weight": jnp.ones((2, 3))}}
    opt_state = optimizer.init(params)
    for gradient in (8.0, 0.5, 0.25):
        grads = {"fc": {"weight": jnp.full((2, 3), gradient)}}
        update, opt_state = optimizer.update(grads, opt_state, params)
    moments = moments_of(opt_state)
    taken = -update["fc"]["weight"] / moments.mu["fc"]["weight"]
    (layer,) = layer_steps(moments, **SETTINGS)["layers"]
    assert layer["median"] == pytest.approx(float(taken[0, 0]), rel=1e-5)
    (of_adam,) = layer_steps(moments._replace(nu_max=None), **SETTINGS)["layers"]
    assert of_adam["median"] > 1.2 * layer["median"]
