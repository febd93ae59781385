"""ResNets in pure-functional JAX, and AdaBound as an optax transform.

`jax_resnet.resnet` has the networks, `jax_resnet.layers` what they are made of, `jax_resnet.adabound` the optimizers,
`jax_resnet.train` the training step, `jax_resnet.weights` the files. Importing this package imports none of them.
"""
