"""ResNets, AdaBound and a training step in plain PyTorch, the third implementation to check the others against.

`torch_ref.resnet` has the networks, whose state_dict is torchvision's, `torch_ref.adabound` the optimizer,
`torch_ref.train` the steps. Importing this package imports none of them; they need torch
(`pip install -e ".[torch]"`) and nothing else.
"""
