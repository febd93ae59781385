"""jax_resnet.nnx: the same numbers as the functions that it wraps, and the ways in which Flax's users use it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from random_networks import randomized
from trees import close, same

from jax_resnet import layers, resnet, weights
from jax_resnet.nnx import ResNet
from jax_resnet.train import create_train_state, loss_and_logits, make_train_step

SETTINGS = dict(block="basic", stage_sizes=(1, 1, 1, 1), in_channels=1)  # few blocks, of both kinds: quick to compile
CONFIG = resnet.ResNetConfig(**SETTINGS, num_classes=5)
LABELS = np.array([0, 3, 1, 4], np.int32)


@pytest.fixture(scope="module")
def arrays():
    """float64, with random BatchNorm weights and running statistics, so that a mistake in any of them shows."""
    with jax.enable_x64(True):
        return randomized(np.random.default_rng(0), resnet.init(CONFIG, jax.random.key(0)))


def images(dtype=np.float64):
    return np.random.default_rng(1).standard_normal((4, 32, 32, 1)).astype(dtype)


def as_dict(state):
    """A nested dict with the numbers of blocks as text, as in params and batch_stats."""
    flat = {".".join(map(str, path)): array for path, array in flatten_dict(nnx.to_pure_dict(state)).items()}
    return unflatten_dict(flat, sep=".")


def mean_loss(model, x):
    return layers.softmax_cross_entropy(model(x), LABELS).mean()


def test_names_are_torchvisions(arrays, x64):
    """The paths of both kinds of variables, joined by ".", are those of params and batch_stats."""
    model = ResNet(CONFIG, arrays)
    for kind, tree in zip((nnx.Param, nnx.BatchStat), arrays, strict=True):
        assert flatten_dict(as_dict(nnx.state(model, kind)), sep=".").keys() == flatten_dict(tree, sep=".").keys()
    same(model.arrays(), arrays)


def test_parts_are_attributes_and_blocks_go_by_number():
    model = nnx.eval_shape(lambda: ResNet(resnet.resnet18(), rngs=nnx.Rngs(0)))
    assert model.layer2[0].downsample[0].weight.shape == (1, 1, 64, 128)
    assert [block.conv1.weight.shape for block in model.layer3] == [(3, 3, 128, 256), (3, 3, 256, 256)]
    assert len(model.layer3) == 2


def test_blocks_are_modules(arrays, x64):
    """Grad-CAM needs the last activation, here bit for bit, and the gradient of a logit with respect to it."""
    model = ResNet(CONFIG, arrays)
    model.eval()
    activations = model.features(images())
    same(model.layer4[-1](activations["layer3.0"]), activations["layer4.0"])
    same(model.fc(activations["pool"]), model(images()))
    gradient = jax.grad(lambda x: model.fc(layers.global_avg_pool(x))[0, 2])(activations["layer4.0"])
    kernel = arrays[0]["fc"]["weight"][:, 2]
    np.testing.assert_allclose(gradient[0], np.broadcast_to(kernel, gradient.shape[1:]) / gradient[0, ..., 0].size)


def test_train_and_eval_set_the_mode(arrays, x64):
    """A new model is in training mode, as in Flax; the argument train overrides the mode. Results agree bit for bit."""
    model = ResNet(CONFIG, arrays)
    trained, evaluated = model(images(), train=True), ResNet(CONFIG, arrays)(images(), train=False)
    assert not np.array_equal(trained, evaluated)
    model = ResNet(CONFIG, arrays)
    model.eval()
    same(model(images()), evaluated)
    same(model.arrays(), arrays)
    model.train()
    if hasattr(nnx, "view"):  # a newer function of Flax
        same(nnx.view(model, use_running_average=True)(images()), evaluated)
    same(model(images()), trained)
    assert not np.array_equal(model.layer4[0].bn2.running_mean[...], arrays[1]["layer4"]["0"]["bn2"]["running_mean"])


def test_is_drawn_as_init_does():
    """The model draws from the stream "params" of rngs, as every Flax module does."""
    model = ResNet(CONFIG, rngs=nnx.Rngs(params=3))
    same(model.arrays(), resnet.init(CONFIG, nnx.Rngs(params=3).params()))
    with pytest.raises(ValueError, match=r"pass arrays, .*, or rngs"):
        ResNet(CONFIG)


@pytest.mark.parametrize(("method", "field"), [("__call__", "logits"), ("features", "activations")])
def test_logits_and_features_are_those_of_apply(method, field, arrays, x64):
    """Both are jitted and agree bit for bit; in evaluation no running statistic changes."""
    model = ResNet(CONFIG, arrays)
    ours = nnx.jit(lambda model, x: getattr(model, method)(x, train=False))(model, images())

    @jax.jit
    def function(params, batch_stats, x):
        out = resnet.apply(CONFIG, params, batch_stats, x, train=False, return_activations=True)
        return getattr(out, field)

    same(ours, function(*arrays, images()))
    same(model.arrays(), arrays)


def test_gradients_and_statistics_are_those_of_the_function(arrays, x64):
    """A training step agrees bit for bit, as XLA gets the same program; the model changes its statistics in place."""
    params, batch_stats = arrays

    def function(params, batch_stats, x):
        return loss_and_logits(CONFIG, params, batch_stats, x, LABELS)

    step = jax.jit(jax.value_and_grad(function, has_aux=True))
    (loss, (_, new_stats)), expected = step(params, batch_stats, images())
    model = ResNet(CONFIG, arrays)
    ours, grads = nnx.jit(nnx.value_and_grad(mean_loss))(model, images())
    assert ours == loss
    same(as_dict(grads), expected)
    same(model.arrays(), (params, new_stats))
    assert not np.array_equal(model.bn1.running_mean[...], batch_stats["bn1"]["running_mean"])


def test_options_of_apply(arrays):
    model = ResNet(CONFIG, arrays)
    x = images(np.float32)
    narrow = nnx.eval_shape(lambda model, x: model.features(x, train=True, dtype=jnp.bfloat16, remat=True), model, x)
    assert {name: value.dtype for name, value in narrow.items() if name in ("layer2.0", "pool")} == {
        "layer2.0": jnp.bfloat16,
        "pool": jnp.float32,
    }


def test_without_batch_norm_there_are_no_statistics():
    config = resnet.ResNetConfig(**SETTINGS, batch_norm=False)
    model = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    assert model.arrays()[1] == {}
    logits = nnx.eval_shape(lambda model, x: model(x, train=True), model, images(np.float32))
    assert logits.shape == (4, 1000)


def test_split_and_merge(arrays, x64):
    model = ResNet(CONFIG, arrays)
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    same((as_dict(params), as_dict(batch_stats)), arrays)
    other = nnx.merge(graph, jax.tree.map(jnp.zeros_like, params), batch_stats)
    assert other.config == CONFIG
    assert not other.layer2[0].conv1.weight[...].any()
    nnx.update(other, nnx.state(model, nnx.Param))
    same(other.arrays(), model.arrays())


@pytest.mark.slow
def test_a_few_steps_with_an_optimizer(arrays, x64):
    """nnx.Optimizer and make_train_step reach the same weights and statistics: three steps of Adam.

    1e-10 of an array's largest entry: the two programs are compiled apart and may sum in another order.
    """
    transform = optax.adam(1e-3)
    model = ResNet(CONFIG, arrays)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(mean_loss)(model, x)
        optimizer.update(model, grads)
        return loss

    train_step = make_train_step(CONFIG, transform)
    state = create_train_state(*jax.tree.map(jnp.asarray, arrays), transform)
    for i in range(3):
        loss = step(model, optimizer, images() + i)
        state, metrics = train_step(state, images() + i, LABELS)
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-10)
    close(model.arrays(), (state.params, state.batch_stats), 1e-10)


class Classifier(nnx.Module):
    """Another head on the pooled vector of a backbone."""

    def __init__(self, backbone, num_classes, rngs):
        self.backbone = backbone
        self.head = nnx.Linear(resnet.feature_channels(backbone.config), num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.backbone.features(x)["pool"])


def test_as_a_backbone_with_weights_of_a_file(arrays, tmp_path):
    """A float16 file loads as float32. Gradients reach the head and the backbone, but not the backbone's own head."""
    weights.save(tmp_path / "a.safetensors", *jax.tree.map(lambda a: a.astype(np.float16), arrays))
    loaded = weights.load(tmp_path / "a.safetensors", CONFIG)
    model = Classifier(ResNet(CONFIG, loaded), 7, nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float32)}
    same(model.backbone.arrays(), jax.tree.map(lambda a: a.astype(np.float32), loaded))
    before = model.backbone.arrays()[1]
    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(mean_loss))(model, images(np.float32)))
    assert jnp.abs(grads["head"]["kernel"]).max() > 0
    assert jnp.abs(grads["backbone"]["conv1"]["weight"]).max() > 0
    assert not grads["backbone"]["fc"]["weight"].any()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(model.backbone.arrays()[1]), strict=True):
        assert not np.array_equal(old, new)


def test_with_a_new_head_of_another_number_of_classes(arrays, tmp_path):
    weights.save(tmp_path / "a.npz", *arrays)
    config = resnet.ResNetConfig(**SETTINGS, num_classes=9)
    model = ResNet(config, weights.load(tmp_path / "a.npz", config, head="new", key=jax.random.key(0)))
    logits = nnx.eval_shape(lambda model, x: model(x, train=False), model, images(np.float32))
    assert logits.shape == (4, 9)
    weights.save(tmp_path / "b.npz", *model.arrays())
    same(weights.load(tmp_path / "b.npz", config), model.arrays())


def count(model):
    return sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_replaced_head_is_trained_counted_saved_and_loaded(arrays, x64, tmp_path):
    """An nnx.Linear is saved as weight and bias, which the network's own head loads. 1e-12 is for the order of sums."""
    model = ResNet(CONFIG, arrays)
    parameters = count(model)
    pooled = model.features(images(), train=False)["pool"]
    model.fc = nnx.Linear(pooled.shape[1], 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    assert count(model) == parameters - 513 * 5 + 513 * 3
    logits = model(images(), train=False)
    np.testing.assert_allclose(logits, model.fc(pooled), rtol=1e-12)
    grads = as_dict(nnx.grad(lambda model: (model(images()) ** 2).mean())(model))
    assert grads["fc"]["kernel"].shape == (512, 3)
    assert jnp.abs(grads["conv1"]["weight"]).max() > 0

    model = ResNet(CONFIG, arrays)
    model.fc = nnx.Linear(512, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    weights.save(tmp_path / "a.npz", *model.arrays())
    config = resnet.ResNetConfig(**SETTINGS, num_classes=3)
    saved = weights.load(tmp_path / "a.npz", config)
    np.testing.assert_allclose(ResNet(config, saved)(images(), train=False), logits, rtol=1e-12)
    other = ResNet(CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"these arrays do not fit the model: 2 differ, the first is fc\.bias"):
        other.load(saved)
    other.fc = nnx.Linear(512, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    other.load(saved)
    same(other(images(), train=False), logits)


def test_without_a_head_logits_are_the_pooled_vector(arrays):
    model = ResNet(CONFIG, arrays)
    model.eval()
    model.fc = None
    same(model(images(np.float32)), model.features(images(np.float32))["pool"])
    assert "fc" not in model.arrays()[0]


def test_vmap_over_an_ensemble():
    """Two networks drawn and run as one give what each gives alone. 1e-5 is for float32 sums in another order."""
    keys = jax.random.split(jax.random.key(0), 2)
    models = nnx.vmap(lambda key: ResNet(CONFIG, rngs=nnx.Rngs(params=key)))(keys)
    models.eval()
    logits = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, images(np.float32))
    for key, ours in zip(keys, logits, strict=True):
        alone = ResNet(CONFIG, rngs=nnx.Rngs(params=key))(images(np.float32), train=False)
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_orbax_round_trip(arrays, x64, tmp_path):
    """The state of a model and of its optimizer is restored into others bit for bit."""

    def make(start):
        model = ResNet(CONFIG, start)
        return model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    model, optimizer = make(arrays)
    optimizer.update(model, nnx.grad(mean_loss)(model, images()))
    other, other_optimizer = make(jax.tree.map(np.zeros_like, arrays))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", nnx.state((other, other_optimizer)))
    nnx.update((other, other_optimizer), restored)
    same(other.arrays(), model.arrays())
    same(*(nnx.to_pure_dict(nnx.state(found, nnx.OptState)) for found in (other_optimizer, optimizer)))
