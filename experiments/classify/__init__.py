"""Classifies pictures with the weights of a run, of a file, or of torchvision: `python -m experiments.classify`."""
