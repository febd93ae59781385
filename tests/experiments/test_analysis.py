"""The statistics of a comparison, against scipy's and against simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis import bootstrap_difference, confusions, mean_interval, paired_difference, verdict


def test_mean_interval_is_that_of_a_t_test():
    values = np.random.default_rng(0).normal(0.5, 0.02, 5)
    found, expected = mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert mean_interval([]).count == 0
    assert math.isnan(mean_interval([0.5]).low)


def test_paired_difference_takes_the_seeds_that_both_have():
    """What all runs of a seed share cancels: the interval is far narrower than those of the two means."""
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


def test_bootstrap_draws_pictures_as_well():
    """Two networks that differ on a few pictures in all seeds: certain for these pictures, less so for others."""
    generator = np.random.default_rng(3)
    theirs = np.tile(generator.random(800) < 0.5, (5, 1))
    ours = theirs.copy()
    gained = np.flatnonzero(~theirs[0])[:16]
    ours[:, gained] = True
    found = bootstrap_difference(ours, theirs)
    assert found.mean == pytest.approx(0.02)
    assert verdict(mean_interval((ours.mean(1) - theirs.mean(1)).tolist())) == "better"
    # 16 of 800: the standard error of a share.
    error = math.sqrt(0.02 * 0.98 / 800)
    assert (found.low, found.high) == pytest.approx((0.02 - 1.96 * error, 0.02 + 1.96 * error), abs=0.002)
    assert bootstrap_difference(ours, ours)[:3] == (0, 0, 0)


def test_confusions_count_what_was_taken_for_what():
    counts = confusions(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
