"""ResNets in plain NumPy, forward and backward: the reference to read, and to check other implementations against.

Start with `layers`: each layer with its gradient under it. `resnet` puts them together, `optim` has the update rules,
`weights` the files. `fused` is the fast form of what stands between two convolutions.

What breaks gradients through a BatchNorm inside a bottleneck, since many have looked for it elsewhere:

- Taking the batch's mean and deviation for constants. They depend on every value of the channel, which gives dx two
  more terms. Without them the last BatchNorm's own gradients are right and everything before it is wrong.
- Other variances than torch's: the biased one normalizes, the unbiased one goes into the running variance.
- Overwriting the gradient of the sum in the branch before the shortcut has had it too.
- Comparing with few values per channel. Two values become ±1 whatever they are, so almost no gradient passes, and
  rounding is magnified in every block. In float64 the gradients of this ResNet-101 and of JAX's, random weights, differ
  by 8e-6 of an array's largest entry for two images of 32x32 (one pixel each in the last stage), by 7e-13 for eight of
  64x64 (32 values per channel). In float32 nothing would be left of the first.
- Comparing entry by entry. A BatchNorm removes the mean and the scale of what feeds it, so some directions of that
  gradient are pure rounding: measure the largest difference over the array's largest entry.

The momentum of the running statistics is innocent: training does not read them, so 0, 0.1 and 1 give the same gradients
to the bit. (They do matter when the gradients of an evaluation are compared.)
"""
