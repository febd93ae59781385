"""The statistics of a comparison over seeds: intervals, paired differences, and how soon a target was reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
BETTER, EQUAL = 0.01, 0.02  # accuracy: the smallest mean for "better" or "worse", the interval's bound for "equal"
Verdict = Literal["better", "worse", "equal", "not told apart", "unknown"]


class Interval(NamedTuple):
    """A mean and its 95% interval; the ends are nan for a single value."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's interval.

    >>> [round(x, 3) for x in mean_interval([0.50, 0.52, 0.54])]
    [0.52, 0.47, 0.57, 3]
    """
    values = np.asarray(values, float)
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1)
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval:
    """The mean of ours - theirs with Student's interval, over the seeds (the keys) that both have."""
    return mean_interval([ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs])


def verdict(difference: Interval) -> Verdict:
    """What a paired difference of accuracies, ours - theirs, says about ours.

    Better or worse: the 95% interval excludes 0, and the mean is at least BETTER. Equal: the 90% interval is within
    EQUAL of 0. Unknown: there is no interval.

    >>> verdict(Interval(0.02, 0.01, 0.03, 5)), verdict(Interval(-0.02, -0.03, -0.01, 5))
    ('better', 'worse')
    >>> verdict(Interval(0.02, -0.01, 0.05, 5)), verdict(Interval(0.005, 0.001, 0.009, 5))
    ('not told apart', 'equal')
    >>> verdict(Interval(-0.02, math.nan, math.nan, 1))
    'unknown'
    """
    mean, low, high, count = difference
    if math.isnan(low):
        return "unknown"
    if abs(mean) >= BETTER and not low <= 0 <= high:
        return "better" if mean > 0 else "worse"
    half = (high - mean) * stats.t.ppf(0.95, count - 1) / stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return "equal" if abs(mean) + half <= EQUAL else "not told apart"


def difference_beyond_pictures(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The difference of accuracies, with an interval for other seeds and other test pictures of the same kind.

    Student's interval over seeds holds for these test pictures only. Here the pictures are a sample as well. A two-way
    analysis of variance without repetition gives what they add to the variance of the mean, beyond chance within a run.
    The half-widths of pictures and seeds add in squares, so the interval is never narrower than `paired_difference`'s.

    Args:
      ours, theirs: (S, N) booleans, whether the run of seed s classifies picture n correctly; S >= 2.
    """
    difference = ours.astype(float) - theirs.astype(float)
    seeds, pictures = difference.shape
    of_seeds = mean_interval(difference.mean(1))
    of_pictures = difference.mean(0)
    rest = difference - difference.mean(1, keepdims=True) - of_pictures + of_seeds.mean
    within = (rest**2).sum() / ((seeds - 1) * (pictures - 1))
    variance = max(0.0, of_pictures.var(ddof=1) - within / seeds) / pictures
    half = math.hypot(of_seeds.mean - of_seeds.low, stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(variance))
    return Interval(of_seeds.mean, of_seeds.mean - half, of_seeds.mean + half, seeds)


def expected_best(values: Sequence[float]) -> np.ndarray:
    """The expected best of k values drawn without replacement, for each k from 1 to the number of values.

    >>> expected_best([0.3, 0.1, 0.2]).round(3).tolist()
    [0.2, 0.267, 0.3]
    """
    ranked, count = np.sort(np.asarray(values, float)), len(values)
    drawn = np.arange(1, count + 1)
    # The number of choices of k whose best has rank i: the other k - 1 are among the i values below it.
    ways = special.comb(np.arange(count), drawn[:, None] - 1)
    return ways @ ranked / special.comb(count, drawn)


def choice_stability(right: np.ndarray, losses: np.ndarray, *, by_loss: bool = False, draws: int = 2000) -> np.ndarray:
    """How often tuning would choose each trial if the held-out pictures were others of the same kind.

    A bootstrap: the pictures are drawn again `draws` times, with replacement. Each time the trial with the highest
    accuracy is chosen, and the lowest loss breaks ties; with by_loss, the trial with the lowest loss is chosen.

    Args:
      right: (T, N) booleans, whether trial t classifies picture n correctly.
      losses: (T, N), the loss of trial t on picture n.

    Returns:
      (T,) shares of the draws, whose sum is 1.

    >>> right = np.array([[True, True, False, False], [False, False, True, False]])
    >>> choice_stability(right, np.ones((2, 4))).round(1).tolist()
    [0.8, 0.2]
    >>> choice_stability(right, np.array([[2.0] * 4, [1.0] * 4]), by_loss=True).tolist()
    [0.0, 1.0]
    >>> choice_stability(np.ones((3, 4), bool), np.array([[np.nan] * 4, [2.0] * 4, [1.0] * 4])).tolist()
    [0.0, 0.0, 1.0]
    """
    trials, pictures = right.shape
    counts = np.random.default_rng(0).multinomial(pictures, np.full(pictures, 1 / pictures), size=draws)
    ranks = (counts @ losses.T).argsort(1, kind="stable").argsort(1)  # 0 for the lowest loss; NaN comes last
    score = -ranks
    if not by_loss:
        score += trials * (counts @ right.T.astype(int))  # one picture more outweighs any rank
    return np.bincount(score.argmax(1), minlength=trials) / draws


def reached(rows: Sequence[dict[str, Any]], target: float) -> tuple[float, float]:
    """Epochs and seconds until test top-1 first was `target` or more, infinite if it never was.

    Epochs without a test result do not count.

    >>> rows = [{"epoch": 1.0, "seconds": 9.0, "test_top1": 0.2}, {"epoch": 2.0, "seconds": 18.0, "test_top1": 0.3}]
    >>> reached(rows, 0.25), reached(rows, 0.5)
    ((2.0, 18.0), (inf, inf))
    """
    for row in rows:
        if row.get("test_top1", -math.inf) >= target:
            return row["epoch"], row["seconds"]
    return math.inf, math.inf
