"""What a tuning trial draws: the protocol's seed and the trial's number alone decide it, whoever runs the trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

SOBOL_DIMENSIONS = 8  # at least, so that the draws do not depend on how many fields are searched


def draw(
    search: Mapping[str, BaseDistribution], seed: int, number: int, sampler: Literal["random", "sobol"]
) -> dict[str, Any]:
    """What trial `number` of a contestant draws. Searches that begin with equal fields draw equal values for these.

    "sobol" takes the trial's point of a scrambled Sobol sequence, whose first 2^k points fill each range evenly. A
    field's place in the search is its coordinate.
    """
    if sampler == "random":
        of_trial = np.random.SeedSequence([seed, number]).generate_state(1)[0]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=int(of_trial)))
        return study.ask(dict(search)).params
    from scipy.stats.qmc import Sobol  # slow to import

    point = Sobol(max(SOBOL_DIMENSIONS, len(search)), rng=seed).random(2 ** (number + 1).bit_length())[number]
    drawn = {}
    for (field, space), share in zip(search.items(), point, strict=False):
        if isinstance(space, CategoricalDistribution):
            drawn[field] = space.choices[int(share * len(space.choices))]
        elif space.log:
            drawn[field] = float(space.low * (space.high / space.low) ** share)
        else:
            drawn[field] = float(space.low + (space.high - space.low) * share)
    return drawn
