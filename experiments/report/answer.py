"""What a study's numbers say, in words."""

from __future__ import annotations

import math

from experiments.report.analysis import Interval, mean_interval, paired_difference, verdict
from experiments.report.study_results import Contestant, StudyResults

STABLE = 0.5  # a setting that is chosen again less often may be no better than others
NORMAL = 1.96  # standard errors on either side that hold 95%


def percent(interval: Interval) -> str:
    """
    >>> percent(Interval(0.5, 0.48, 0.52, 5)), percent(Interval(0.5, math.nan, math.nan, 1))
    ('50.0% (48.0 to 52.0)', '50.0%')
    """
    if not interval.count:
        return "-"
    ends = "" if math.isnan(interval.low) else f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{interval.mean:.1%}{ends}"


def points(interval: Interval) -> str:
    """
    >>> points(Interval(-0.02, -0.03, -0.01, 5))
    '-2.0 points (-3.0 to -1.0)'
    """
    if not interval.count:
        return "-"
    ends = "" if math.isnan(interval.low) else f" ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    return f"{100 * interval.mean:+.1f} points{ends}"


def answer(results: StudyResults) -> str:
    """The answer to the study's question, by its numbers alone; "" if it compares no two contestants."""
    if not results.compared:
        return ""
    ours, theirs = map(results.find, results.compared)
    if results.measure == "train_loss":
        return _answer_by_loss(results)
    seeds = sorted(set(ours.by_seed()) & set(theirs.by_seed()))
    if not seeds:
        names = f"{ours.name} and {theirs.name}"
        return f"{results.name}: the question is still open, because no seed was trained to its end with both {names}."
    difference, wider = results.answers[ours.name]
    tuned = ", as it was tuned," if ours.tuning or theirs.tuning else ""
    doubts = _doubts(results, ours, theirs)
    ahead = "is ahead, which does not show that it is better" if doubts else "is better"
    said = {
        "better": f"{ours.name}{tuned} {ahead}",
        "worse": f"{theirs.name}{tuned} {ahead}",
        "equal": "the two are equal",
        "not told apart": "the two are not told apart",
        "unknown": "with one seed nothing can be said about which is better",
    }[verdict(difference)]
    planned = max(len(ours.final), len(theirs.final))
    so_far = f"so far, with {len(seeds)} of {planned} seeds, on" if len(seeds) < planned else "on"
    reach = f", or {100 * wider.low:+.1f} to {100 * wider.high:+.1f} for other test pictures as well" if wider else ""
    failures = [f" {len(c.failed)} of {c.name}'s trainings failed, and count as 0." for c in (ours, theirs) if c.failed]
    our_mean, their_mean = (mean_interval([c.by_seed()[seed] for seed in seeds]) for c in (ours, theirs))
    text = (
        f"{results.name}: {so_far} {results.title}, {ours.name} reaches a final top-1 of {percent(our_mean)} "
        f"and {theirs.name} {percent(their_mean)} over {len(seeds)} seed{'s' * (len(seeds) > 1)}: a difference of "
        f"{points(difference)}{reach}, so {said}.{''.join(failures)}{doubts}"
    )
    rest = [c for c in results.contestants if c not in (ours, theirs) and c.by_seed()]
    if not rest:
        return text
    leader = ours if our_mean.mean > their_mean.mean else theirs
    best = max(rest, key=lambda contestant: contestant.interval().mean)
    found = verdict(paired_difference(best.by_seed(), leader.by_seed()))
    relation = {"better": "better than", "worse": "worse than", "equal": "equal to", "unknown": "beside"}
    return (
        f"{text} Of the others {best.name} comes highest with {percent(best.interval())}, "
        f"{relation.get(found, 'not told apart from')} {leader.name}."
    )


def _answer_by_loss(results: StudyResults) -> str:
    """The training loss of each contestant after the last epoch, the lowest first."""
    losses = {
        c.name: sum(t.epochs[-1]["train_loss"] for t in c.finals) / len(c.finals)
        for c in results.contestants
        if c.finals
    }
    if not losses:
        return f"{results.name}: the question is still open, because no run has reached its end."
    listed = ", ".join(f"{losses[name]:.2f} with {name}" for name in sorted(losses, key=losses.get))
    missing = [contestant.name for contestant in results.contestants if contestant.name not in losses]
    rest = f" {', '.join(missing)}: not yet trained to the end." if missing else ""
    return f"{results.name}: on {results.title}, the training loss of the last epoch is {listed}.{rest}"


def answer_row(results: StudyResults) -> dict[str, str] | None:
    """The answer as a row of a table; None if there is no answer, or if another measure decides."""
    if not results.compared or results.measure != "top1" or results.compared[0] not in results.answers:
        return None
    ours, theirs = map(results.find, results.compared)
    difference, _ = results.answers[ours.name]
    found = verdict(difference)
    ahead = "is ahead by this choice of settings" if _doubts(results, ours, theirs) else "is better"
    words = {"better": f"{ours.name} {ahead}", "worse": f"{theirs.name} {ahead}", "unknown": "one seed"}
    seeds = f"{difference.count} seed{'s' * (difference.count > 1)}"
    return {
        "study": f"{results.name}: {results.title}",
        "verdict": words.get(found, found),
        "final top-1": f"{ours.name} {ours.interval().mean:.1%}, {theirs.name} {theirs.interval().mean:.1%}",
        "difference, 95% interval over seeds": f"{points(difference)}, {seeds}",
    }


def _doubts(results: StudyResults, *contestants: Contestant) -> str:
    """A sentence on the contestants whose setting depends on the held-out pictures; "" if there are none."""
    shares = {contestant.name: results.chosen_again(contestant) for contestant in contestants}
    weak = [f"{share:.0%} ({name})" for name, share in shares.items() if share is not None and share < STABLE]
    if not weak:
        return ""
    return (
        f" Tuning on other held-out pictures would have chosen the same setting in only {' and '.join(weak)} of cases."
    )


def limits(results: StudyResults) -> str:
    """What the study cannot tell about the two that it compares."""
    theirs, said = results.find(results.compared[1]), []
    if (right := next(iter(theirs.right().values()), None)) is not None:
        share, pictures = float(right.mean()), len(right)
        of_one = 100 * NORMAL * math.sqrt(share * (1 - share) / pictures)
        said.append(f"With {pictures:,} test pictures one run's top-1 is uncertain by {of_one:.1f} points.")
    tuned = next((t for t in theirs.tuning if t.state == "done" and t.test_results), None)
    if tuned is not None:
        pictures = len(tuned.test_results["label"])
        by = "loss" if results.chosen_by_loss else f"top-1 (one picture is {100 / pictures:.1f} points)"
        said.append(
            f"Settings were chosen from {len(theirs.tuning)} trials of {tuned.columns['epochs']} epochs, by {by} on "
            f"{pictures:,} held-out pictures. The intervals hold for these settings. Other draws or longer training "
            "could lead to other settings."
        )
    return " ".join(said)
