"""The functions of `numpy_ref.resnet`, several times faster and called in the same way.

>>> import numpy as np
>>> from numpy_ref import fast
>>> config = fast.resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = fast.init(config, np.random.default_rng(0))
>>> out, vjp = fast.apply(config, params, batch_stats, np.zeros((2, 32, 32, 1), np.float32), train=True)
>>> out.logits.shape
(2, 10)
"""

from numpy_ref.fast.resnet import apply
from numpy_ref.resnet import Output, ResNetConfig, init, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = ["Output", "ResNetConfig", "apply", "init", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
