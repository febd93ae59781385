"""One page from the folders that experiments.study leaves: what came out, from published files alone."""
