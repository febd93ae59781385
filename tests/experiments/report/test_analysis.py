"""The statistics of a comparison, against scipy's and against simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.report.analysis import difference_beyond_pictures, mean_interval, paired_difference, verdict


def test_mean_interval_is_that_of_a_t_test():
    values = np.random.default_rng(0).normal(0.5, 0.02, 5)
    found, expected = mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)  # where a t test would warn
    assert mean_interval([]).count == 0
    assert math.isnan(mean_interval([0.5]).low)


def test_paired_difference_takes_the_seeds_that_both_have():
    """What all runs of a seed share cancels: the interval is far narrower than the interval of a mean."""
    generator = np.random.default_rng(1)
    of_seed = generator.normal(0.5, 0.05, 6)
    ours = {seed: of_seed[seed] + 0.02 + generator.normal(0, 0.002) for seed in range(6)}
    theirs = {seed: of_seed[seed] for seed in range(1, 6)}
    found = paired_difference(ours, theirs)
    assert found.count == 5
    assert verdict(found) == "better"
    assert verdict(paired_difference(theirs, ours)) == "worse"
    alone = mean_interval(list(theirs.values()))
    assert found.high - found.low < (alone.high - alone.low) / 5


def test_intervals_hold_the_truth_as_often_as_they_say():
    """2,000 simulated studies of 5 seeds; 1.5 points are three standard errors of the share."""
    generator = np.random.default_rng(2)
    inside = 0
    for values in generator.normal(0.01, 0.02, (2000, 5)):
        interval = mean_interval(values)
        inside += interval.low <= 0.01 <= interval.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_other_pictures_widen_an_interval():
    """Two networks differ on a few pictures in all seeds: this is certain for these pictures, less so for others."""
    generator = np.random.default_rng(3)
    theirs = np.tile(generator.random(800) < 0.5, (5, 1))
    ours = theirs.copy()
    gained = np.flatnonzero(~theirs[0])[:16]
    ours[:, gained] = True
    found = difference_beyond_pictures(ours, theirs)
    assert found.mean == pytest.approx(0.02)
    assert verdict(mean_interval((ours.mean(1) - theirs.mean(1)).tolist())) == "better"
    # 16 of 800: the standard error of a share.
    error = math.sqrt(0.02 * 0.98 / 800)
    assert (found.low, found.high) == pytest.approx((0.02 - 1.96 * error, 0.02 + 1.96 * error), abs=1e-4)
    assert difference_beyond_pictures(ours, ours)[:3] == (0, 0, 0)


@pytest.mark.parametrize(("of_seeds", "of_pictures"), [(0.0, 0.5), (0.05, 0.0), (0.03, 0.5), (0.01, 1.5)])
def test_an_interval_over_seeds_and_pictures_holds_the_truth(of_seeds, of_pictures):
    """Of 500 intervals 95%, less four standard errors, hold the true difference, 0.

    Each study draws anew how good a seed is and how hard a picture is. The interval over seeds is never wider.
    """
    generator = np.random.default_rng(4)
    inside = 0
    for _ in range(500):
        rights = []
        shared = generator.normal(0, 1, 300)
        for _ in range(2):
            picture = shared + generator.normal(0, of_pictures, 300)
            seed = stats.norm.ppf(np.clip(0.5 + generator.normal(0, of_seeds, (5, 1)), 0.01, 0.99))
            rights.append(picture + seed + generator.normal(0, 1, (5, 300)) > 0)
        found = difference_beyond_pictures(*rights)
        over_seeds = mean_interval(rights[0].mean(1) - rights[1].mean(1))
        assert found.high - found.low >= (1 - 1e-12) * (over_seeds.high - over_seeds.low)  # rounding
        inside += found.low <= 0 <= found.high
    assert inside / 500 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 500)
