"""ResNets and AdaBound in plain PyTorch, the third implementation to check the others against.

`torch_ref.resnet` has the networks, whose state_dict is torchvision's, `torch_ref.adabound` the optimizer. Importing
this package imports neither; they need torch (`pip install "resnet-adabound[torch]"`) and nothing else.
"""
