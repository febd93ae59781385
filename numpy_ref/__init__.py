"""ResNets in plain NumPy, forward and backward: to read, and to check other implementations against.

Read the modules in this order:

- `layers`: each layer with its gradient right below it. `convolution` has the convolution in three forms.
- `resnet`: the network, built from these layers and nothing else. `config` is the paper's table as data.
- `optim`: SGD, Adam, AdamW, AdaBound and AMSBound. `train`: one training step and one evaluation step.
- `check`: `check_vjp` compares a gradient of yours with central differences.

`fast` has the functions of `resnet` at several times the speed, and tests hold both equal. `weights` reads and writes
files with torchvision's names. All but these two need NumPy alone.

>>> import numpy as np
>>> from numpy_ref import layers, resnet
>>> config = resnet.resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = resnet.init(config, np.random.default_rng(0))
>>> images, labels = np.zeros((2, 32, 32, 1), np.float32), np.array([3, 7])
>>> out, vjp = resnet.apply(config, params, batch_stats, images, train=True)
>>> losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels)
>>> dparams, dimages = vjp(*vjp_loss(np.full(2, 0.5, np.float32)))

Four things make people's gradients disagree with these. docs/batchnorm.md derives and measures them.

- BatchNorm's mean and variance depend on every value of the batch. A backward pass that takes them for constants is
  wrong in everything before the last BatchNorm.
- The biased variance normalizes; the unbiased one goes into the running variance. Momentum is the share of the new
  value. Training reads no running statistics, so mistakes in them show in evaluation only.
- With few values per channel, rounding grows in every block. Compare with at least 32, in float64, and relative to the
  largest entry of each array.
- The gradient of a sum goes to both of its terms. Code that works in place must not overwrite it in the branch before
  the shortcut has read it.
"""
