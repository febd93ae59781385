"""Runs a protocol, a comparison that is written down first: which optimizers, how they are tuned, how many seeds."""
