"""The files that a study leaves: `experiments.study` writes them and `experiments.report` reads them."""

from __future__ import annotations

import re
from typing import Literal

PROTOCOL, TRIALS = "protocol.toml", "trials.csv"  # in a study's folder, beside its runs
Stage = Literal["tuning", "final"]  # of a run
State = Literal["open", "begun", "done", "failed"]


def slug(name: str) -> str:
    """A name as a part of file names.

    >>> slug("Adam, second setting")
    'adam-second-setting'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
