"""Writes one page about the folders that experiments.study leaves, from published files alone."""
