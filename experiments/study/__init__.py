"""Runs a protocol, a comparison written down beforehand: which optimizers, how they are tuned, on how many seeds."""
