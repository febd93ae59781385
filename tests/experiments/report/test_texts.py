"""The pictures of docs/adabound.md and the numbers that it, README and results/answer.md have in sentences.

Both are computed again from results/.
"""

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from experiments.output.page import Picture
from experiments.report.__main__ import in_order
from experiments.report.analysis import paired_difference, verdict
from experiments.report.sections import overview, study_section
from experiments.report.study_results import find_studies, read_study
from experiments.report.upper_bound import upper_bound_points

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def texts():
    """README, docs/adabound.md and results/answer.md, each as one line."""
    names = ("README.md", "docs/adabound.md", "results/answer.md")
    return [" ".join((REPOSITORY / name).read_text(encoding="utf-8").split()) for name in names]


def published(name):
    return read_study(REPOSITORY / "results" / name)


def top1(study, name):
    """The mean of the final runs."""
    return f"{study.find(name).interval().mean:.1%}"


def points(interval):
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:.1f} points ({low:.1f} to {high:.1f})"


def worst_first(name):
    """The test pictures of Adam's run with seed 1, those with the largest losses first."""
    path = REPOSITORY / "results" / name / "adam" / "seed-1" / "predictions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: -float(row["loss"]))


def mean_loss(rows):
    return sum(float(row["loss"]) for row in rows) / len(rows)


def test_the_answer(texts):
    readme, page, answer = texts
    study = published("cars196")
    ours, theirs = study.find("AdaBound"), study.find("Adam")
    difference = study.answers[ours.name][0]
    adams, second, sgd = (
        study.find(name).finals[0] for name in ("Adam, second setting", "AdaBound, second setting", "SGD")
    )
    assert adams.config["settings"]["learning_rate"] == ours.finals[0].config["settings"]["learning_rate"]
    assert f"SGD reaches {sgd.accuracy():.1%}" in answer
    assert f"trials Adam reaches {adams.accuracy():.1%} and AdaBound {second.accuracy():.1%} (seed 1)" in answer
    at_lower = [second.epochs[epoch - 1]["at_lower"] for epoch in (1, 12, 30)]
    assert f"after 30 epochs {at_lower[-1]:.0%} of its weights are at the lower bound (seed 1)" in answer
    lost = theirs.interval().mean - adams.accuracy()  # by Adam at AdaBound's rate
    assert "so most of Adam's lead comes from the rate that tuning chose" in readme
    assert lost > -difference.mean / 2
    rate, final_lr = (second.config["settings"][key] for key in ("learning_rate", "final_lr"))
    assert [run.config["settings"]["gamma_times_steps"] for run in (*ours.finals, second)] == [1] * 6
    assert "AdaBound's best settings in `results/cars196` had `gamma = 1 / N`" in page
    assert f"With a rate of {1e4 * rate:.1f}e-4 and `final_lr` {final_lr:.1f} (`results/cars196`, second-best" in page
    assert "{:.0%}, {:.0%} and {:.0%} of its weights at the lower bound after 1, 12 and 30".format(*at_lower) in page
    assert f"Adam reaches {top1(study, 'Adam')}, AdaBound {top1(study, 'AdaBound')}" in page
    assert f"Adam reaches {top1(study, 'Adam')} and AdaBound {top1(study, 'AdaBound')}" in answer
    low, high = 100 * difference.low, 100 * difference.high
    assert f"{100 * difference.mean:.1f} points, 95% interval {low:.1f} to {high:.1f}" in answer
    assert f"from {difference.count} seeds" in answer
    assert f"trained for 30 epochs from {difference.count} seeds" in readme
    assert "Not as tuned here" in readme
    assert verdict(difference) == "worse"


def test_second_settings(texts):
    """cars196_check trains them from seeds that were not seen before; only seeds that both have count."""
    readme, page, answer = texts
    check, best = published("cars196_check"), published("cars196").find("Adam").by_seed()
    adam, ours = (check.find(f"{name}, second setting").by_seed() for name in ("Adam", "AdaBound"))
    seeds = adam.keys() & ours.keys()
    theirs, second, first = (f"{sum(top1[seed] for seed in seeds) / len(seeds):.1%}" for top1 in (adam, ours, best))
    assert seeds == {2, 3}
    assert (
        f"two fresh seeds AdaBound's second-best setting reaches {second}, Adam's {theirs}, Adam's best {first}"
        in readme
    )
    assert (
        f"two fresh seeds the second-best ones reach {theirs} (Adam) and {second} (AdaBound), Adam's best {first}"
        in page
    )
    assert "From seeds 2 and 3, trained after that was seen" in answer
    assert f"they reach {theirs} and {second}, and Adam's best setting {first}" in answer


def test_a_deeper_network(texts):
    (run,) = published("cars196_resnet101").find("Adam").finals
    seed = run.config["settings"]["seed"]
    said = f"Adam's run with seed {seed}, which reaches {run.accuracy():.1%} after {len(run.epochs)} epochs"
    assert said in texts[2]
    notes = " ".join((REPOSITORY / "results" / "notes.md").read_text(encoding="utf-8").split())
    tested, before = map(worst_first, ("cars196_resnet101", "origins_resnet101"))
    said = f"Its test loss, {mean_loss(tested):.2f}, is above guessing because of a few pictures: "
    assert f"{said}without the worst 1% it is {mean_loss(tested[len(tested) // 100 :]):.2f}." in notes
    assert "The worst 39 are all taken for a Volvo XC90, the first 34 with confidence 1.0000." in notes
    assert {row["prediction"] for row in tested[:39]} == {"194"} != {tested[39]["prediction"]}  # Volvo XC90 SUV 2007
    assert {row["confidence"] for row in tested[:34]} == {"1.0000"} != {tested[34]["confidence"]}
    said = f"from {mean_loss(before):.2f} to {mean_loss(before[len(before) // 100 :]):.2f}."
    assert f"without the worst 1% its test loss falls {said}" in notes


def test_the_upper_bound(texts):
    readme, page, answer = texts
    study = published("cars196")
    found = upper_bound_points(study)
    best = [point for point in found if point.stage == "final" and point.contestant == "AdaBound"]
    share = sum(point.share for point in best) / len(best)
    assert f"ended at {best[0].ratio:.1f}, and AdaBound reached {share:.0%} of Adam's top-1 at the same rate" in readme
    assert f"at the same rate AdaBound reaches {share:.0%} of Adam's top-1" in answer
    crosses = sorted((point.ratio, point.share) for point in found if point.lower_above)
    assert (
        "`final_lr` 0.33 and 1.1, whose bounds close late, are as good as Adam; 6.5, whose bounds close early" in page
    )
    assert [round(share, 1) for _, share in crosses] == [1.0, 0.1, 1.0, 1.0]  # 0.33, 6.5, and 1.1 twice
    line = [(p.ratio, p.share) for p in upper_bound_points(published("sensitivity"))]
    assert "Far below 1 AdaBound reaches about half of Adam's top-1; from 2.4 on, 95% or more" in page
    assert all(0.4 < share < 0.6 for ratio, share in line if ratio < 0.05)
    assert all(share > 0.95 for ratio, share in line if ratio > 2.4)
    others = [
        path for path in find_studies(REPOSITORY / "results") if not path.name.startswith(("cars196", "sensitivity"))
    ]
    pale = [p.share for path in others for p in upper_bound_points(read_study(path)) if p.ratio < 1]
    assert f"Below 1, {sum(share >= 0.9 for share in pale)} of {len(pale)} reach 90%" in page


def test_20_classes(texts):
    readme, page, answer = texts
    ones, zeros, check = map(published, ("cars64_small_gamma_one", "cars64_small", "cars64_small_check"))
    adam, ours = top1(ones, "Adam"), top1(ones, "AdaBound")
    assert f"On 20 classes it is {adam} and {ours} (`cars64_small_gamma_one`)" in page
    assert f"On 20 of the 196 classes the best settings reach {adam} and {ours}, with 5 seeds each" in answer
    lead = paired_difference(ones.find("Adam").by_seed(), ones.find("AdaBound").by_seed())
    assert f"On 20 classes Adam leads by {points(lead)}" in readme

    adam, ours = top1(zeros, "Adam"), top1(zeros, "AdaBound")
    nexts = [f"{name} setting" for name in ("Adam, second", "Adam, third", "AdaBound, second")]
    said = "with the next settings Adam reaches {} and {}, AdaBound {} (`cars64_small_check`)"
    assert (
        f"if blocks start as the identity, {adam} and {ours}, but " + said.format(*(top1(check, n) for n in nexts))
        in page
    )
    lead = zeros.answers["AdaBound"][0]
    assert f"AdaBound then led by {points(lead)}" in answer
    adams, thirds, ours = (check.find(name).by_seed() for name in nexts)
    best = check.find("AdaBound").by_seed()
    assert "one is equal to AdaBound's best and one leads by 1.9 points (0.1 to 3.8)" in answer
    assert verdict(paired_difference(adams, best)) == "equal"
    assert points(paired_difference(thirds, best)) == "1.9 points (0.1 to 3.8)"
    assert "AdaBound's own next setting is not told apart from that one" in answer
    assert verdict(paired_difference(ours, thirds)) == "not told apart"


def test_blocks_that_start_as_the_identity(texts):
    page = texts[1]
    study = published("zero_gamma")
    adam, ours = (top1(study, f"start, {name}, zero gamma") for name in ("Adam", "AdaBound"))
    assert f"With 3 seeds (`results/zero_gamma`) Adam reaches {adam}, AdaBound {ours}." in page
    adam, ours = (top1(study, f"start, {name}, gamma of one") for name in ("Adam", "AdaBound"))
    assert f"From 1 they reach {adam} and {ours}." in page


def test_when_adabound_leads(texts):
    page = texts[1]
    ends = {tuple(c.labels.values()): c.interval().mean for c in published("origins").contestants}
    leads = [ends["AdaBound", *pair] > end for (opt, *pair), end in ends.items() if opt == "Adam" and pair[1] == "own"]
    assert f"with BatchNorm, AdaBound is ahead in {sum(leads)} of {len(leads)} pairs (`results/origins`" in page
    study = published("cars64_small_gamma_one")
    ours, theirs = (study.find(name).curve("test_top1")[1].mean(0) for name in ("AdaBound", "Adam"))
    led, lost = 100 * max(ours - theirs), -100 * study.answers["AdaBound"][0].mean
    said = f"with a cosine, it led by up to {led:.0f} points, then lost by {lost:.1f}."
    assert f"`cars64_small_gamma_one`, {said}" in page


def test_pictures_are_those_of_the_report(texts):
    """If one differs, `python -m experiments.report results/ --out report` draws it again; copy it into docs."""
    studies = in_order(texts[2], [read_study(folder) for folder in find_studies(REPOSITORY / "results")])
    blocks = [*overview(studies, []), *study_section(published("zero_gamma"))]
    drawn = {block.name: block.data for block in blocks if isinstance(block, Picture)}
    for name in ("upper-bound.png", "zero_gamma-curves.png", "zero_gamma-step-map.png"):
        with Image.open(REPOSITORY / "docs" / name) as copy, Image.open(io.BytesIO(drawn[name])) as new:
            assert copy.text["Description"] == new.text["Description"], name
