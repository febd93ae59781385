"""Runs a protocol, a comparison written down beforehand: which optimizers, how they are tuned, on how many seeds."""

PROTOCOL, TRIALS = "protocol.toml", "trials.csv"  # in a study's folder, beside its runs
