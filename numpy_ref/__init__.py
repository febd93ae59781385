"""ResNets in plain NumPy, forward and backward, made for reading and for checking other implementations.

Read the modules in this order:

- `layers`: each layer with its gradient right below it. `convolution` has three forms of the convolution.
- `resnet`: the network, built only from these layers. `config` is the paper's table as data.
- `optim`: SGD, Adam, AdamW, AdaBound and AMSBound. `train`: one training step and one evaluation step.
- `check`: `check_vjp` compares your gradient with central differences.

`fast` has the functions of `resnet`, several times faster; tests compare the results. `weights` reads and writes files
with torchvision's names. `fast` also needs threadpoolctl, and `weights` safetensors. All other modules need only NumPy.

>>> import numpy as np
>>> from numpy_ref import layers, resnet
>>> config = resnet.resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = resnet.init(config, np.random.default_rng(0))
>>> images, labels = np.zeros((2, 32, 32, 1), np.float32), np.array([3, 7])
>>> out, vjp = resnet.apply(config, params, batch_stats, images, train=True)
>>> losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels)
>>> dparams, dimages = vjp(*vjp_loss(np.full(2, 0.5, np.float32)))

If your gradients differ from these, check four points. docs/batchnorm.md derives BatchNorm and measures mistakes.

- BatchNorm's mean and variance depend on every value of the batch. A backward pass that treats them as constants gives
  wrong gradients for every layer before the last BatchNorm.
- BatchNorm normalizes with the biased variance and updates the running variance with the unbiased variance. Momentum is
  the weight of the new value. Training only updates the running statistics, so mistakes in them show in evaluation.
- With few values per channel, rounding errors grow in every block. Compare in float64, with at least 32 values per
  channel, and relative to the largest entry of each array.
- Both terms of a sum receive the gradient of the sum. In-place code in a block's branch must not overwrite this
  gradient before the shortcut has read it.
"""
