"""ResNets with one block per stage under the names of deep ones, for tests that do not depend on the depth."""

import functools
import importlib

BLOCKS = {"resnet18": ("basic", "BasicBlock"), "resnet50": ("bottleneck", "Bottleneck")}


def patch_shallow(patch, *names):
    """Gives the named networks one block per stage in all frameworks; patch is a pytest.MonkeyPatch."""
    modules = "jax_resnet.resnet", "numpy_ref.fast", "torch_ref.resnet", "torchvision.models.resnet"
    for module in map(importlib.import_module, modules):
        for name in names:
            kind, block = BLOCKS[name]
            if hasattr(module, "ResNetConfig"):
                shallow = functools.partial(module.ResNetConfig, kind, (1, 1, 1, 1))
            else:
                shallow = functools.partial(module.ResNet, getattr(module, block), (1, 1, 1, 1))
            home = importlib.import_module("torchvision.models") if "torchvision" in module.__name__ else module
            patch.setattr(home, name, shallow)
