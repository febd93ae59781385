"""ResNets, AdaBound and a training step in plain PyTorch, to check the JAX and NumPy implementations against.

`torch_ref.resnet` has the networks, with torchvision's state_dict, `torch_ref.adabound` the optimizer, and
`torch_ref.train` the training and evaluation steps. The package itself imports none of these modules. They need only
torch (`pip install -e ".[torch]"`).
"""
