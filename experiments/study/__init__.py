"""Runs a protocol, a comparison written down beforehand: which optimizers, how they are tuned, on how many seeds."""

import re
from typing import Literal

PROTOCOL, TRIALS = "protocol.toml", "trials.csv"  # in a study's folder, beside its runs
Stage = Literal["tuning", "final"]  # of a run
State = Literal["open", "begun", "done", "failed"]


def slug(name: str) -> str:
    """What stands for a name in those of files.

    >>> slug("Adam, second setting")
    'adam-second-setting'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
