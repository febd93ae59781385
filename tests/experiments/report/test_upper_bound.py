"""AdaBound's upper bound in steps of Adam."""

import json

import pytest

from experiments.report.study_results import read_study
from experiments.report.upper_bound import plot_upper_bounds, upper_bound_points, upper_bound_rows


def points_of(study, stage):
    return [point for point in upper_bound_points(read_study(study)) if point.stage == stage]


def write(trial, classes, **settings):
    """Changes a run's settings and number of classes."""
    config = json.loads((trial.folder / "config.json").read_text())
    config["settings"] |= settings
    config["input"]["class_names"] = [*map(str, range(classes))]
    (trial.folder / "config.json").write_text(json.dumps(config))


def test_the_upper_bound_is_measured_in_adams_steps(results, tmp_path):
    """The ratio is final_lr · (1 + 1 / (gamma · 3 updates)) over 1, the median of the steps 1, 20 / 3 and 0.5."""
    small = read_study(results / "small")
    drawn = small.find("AdaBound").final[0].number("final_lr")
    points = points_of(results / "small", "final")
    assert [point.ratio for point in points] == pytest.approx([drawn * (1 + 1 / (1e-3 * 3))] * 2)
    assert [point.top1 for point in points] == [trial.accuracy() for trial in small.find("AdaBound").finals]
    assert [point.adam_top1 for point in points] == [trial.accuracy() for trial in small.find("Adam").finals]  # by seed
    assert upper_bound_points(read_study(results / "map")) == []  # without Adam
    (row,) = upper_bound_rows([small, read_study(results / "map")])
    assert row["above 1"].endswith("(2)")
    assert row["below 0.05"] == ""


def test_a_run_is_compared_with_adams_at_a_near_rate(copied):
    """Rates, bounds and classes are those that the test writes. Adam's median step is 1 after two updates."""
    study = read_study(copied / "small")
    ours, theirs = study.find("AdaBound").tuning, study.find("Adam").tuning

    for trial, rate in zip(theirs, (0.01, 0.02, 0.03), strict=True):
        write(trial, 4000, learning_rate=rate)
    for trial, rate, final_lr in zip(ours, (0.02, 0.01, 0.05), (0.9, 1.2, 1.2), strict=True):
        write(trial, 4000, learning_rate=rate, final_lr=final_lr, gamma=2.0)
    below, above = points_of(copied / "small", "tuning")
    assert (below.ratio, above.ratio) == pytest.approx((0.9 * 1.25, 1.2 * 1.25))
    assert (below.lower_above, above.lower_above) == (False, False)  # 0.9 · 0.8 and 1.2 · 0.8
    assert below.share == ours[0].accuracy() / theirs[1].accuracy()
    assert above.share == ours[1].accuracy() / theirs[0].accuracy()

    write(ours[1], 4000, gamma=20.0)
    lower = [point.lower_above for point in points_of(copied / "small", "tuning")]
    assert lower == [False, True]  # 1.2 · 40 / 41
    (axis,) = plot_upper_bounds([read_study(copied / "small")]).axes
    assert {line.get_marker(): len(line.get_xdata()) for line in axis.lines if line.get_marker() in "ox"} == {
        "o": 1 + len(study.find("AdaBound").finals),
        "x": 1,
    }

    ours, theirs = study.find("AdaBound").final, study.find("Adam").final
    rate = ours[0].config["settings"]["learning_rate"]
    write(theirs[0], 4000, learning_rate=rate / 2)
    write(theirs[1], 4000, learning_rate=rate)
    points = points_of(copied / "small", "final")
    assert [point.adam_top1 for point in points] == 2 * [theirs[1].accuracy()]  # the rate comes before the seed

    theirs = study.find("Adam").tuning
    for trial in theirs:
        write(trial, 2)  # Adam hardly learnt if it stays below a half
    points = points_of(copied / "small", "tuning")
    assert [point.adam_top1 for point in points] == [theirs[0].accuracy()]
    assert theirs[1].accuracy() < 0.5 < theirs[0].accuracy()


def test_the_run_of_adam_may_be_of_a_study_beside(copied):
    adam = read_study(copied / "small").find("Adam").finals[1]
    for trial in read_study(copied / "map").trials:
        write(trial, 4000, learning_rate=adam.config["settings"]["learning_rate"], seed=adam.seed)
    assert points_of(copied / "map", "final") == []
    with open(copied / "map" / "protocol.toml", "a") as file:
        file.write('[report]\nbeside = { small = ["Adam", "AdaBound"] }\n')
    points = points_of(copied / "map", "final")
    assert {point.adam_top1 for point in points} == {adam.accuracy()}
    assert {point.contestant.split(",")[0] for point in points} == {"bounds"}  # small's own runs are not points of map
