"""Checks that the three implementations of ResNet agree: `python -m experiments.parity`."""
