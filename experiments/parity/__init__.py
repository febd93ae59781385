"""The proof that three ResNets are one: `python -m experiments.parity`."""
