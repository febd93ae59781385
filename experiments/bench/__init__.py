"""Benchmarks: `python -m experiments.bench NAME`, `--help` for the list."""
