"""What a report says follows from the files of the runs; a report names bad files."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from experiments.output.figures import MARK
from experiments.output.page import picture, write_html
from experiments.report import __main__ as report
from experiments.report.answer import answer
from experiments.report.curves import plot_curves, plot_differences, plot_tuning, plot_tuning_effort
from experiments.report.grids import find_grids, grid_differences
from experiments.report.study_results import Contestant, StudyResults, Trial, read_study
from experiments.report.upper_bound import plot_upper_bounds


def report_on(folder, out):
    """Writes a report; returns its Markdown."""
    assert report.main([str(folder), "--out", str(out)]) == 0
    return (out / "report.md").read_text()


def change_trials(study, change):
    """Changes a study's trials.csv: `change` takes each line, {column: text}, and may return one to add."""
    path = study / "trials.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    more = [other for line in lines if (other := change(line))]
    write_trials(path, lines + more)


def write_trials(path, lines):
    """Writes the columns that the first line has."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture(scope="module")
def out(results, tmp_path_factory):
    """The folder of a report on all results."""
    folder = tmp_path_factory.mktemp("out")
    report_on(results, folder)
    return folder


def test_the_page_has_everything_inside(out):
    markdown, page = ((out / name).read_text() for name in ("report.md", "index.html"))
    assert "http" not in page
    pictures = [path.name for path in out.glob("*.png")]
    for name in (
        "upper-bound",
        "small-curves",
        "small-step-map",
        "small-tuning",
        "small-tuning-effort",
        "map-bounds-grid",
    ):
        assert f"{name}.png" in pictures
        assert f"({name}.png)" in markdown
    assert page.count("data:image/png;base64,") == len(pictures) == markdown.count(".png)")
    for text in ("final top-1", "for other pictures too", "to 20%", "never", "Nothing is left to run"):
        assert text in page
        assert text in markdown
    for name in ("small", "map", "small_check"):
        assert re.search(rf"- \[{name}: [\w, ]+\]\(#{name}-", markdown)
        assert re.search(rf'<summary>{name}: [\w, ]+</summary><div id="{name}-', page)
    assert page.count("<details>") == page.count("</details>") == markdown.count("\n## ")


def test_text_from_files_is_shown_and_not_obeyed(tmp_path):
    figure = plot_curves([])
    text = "<script>alert(1)</script> [here](javascript:x)"
    write_html(tmp_path / "index.html", "a < b", [picture("p", text, figure)], {"x <b>": [text]})
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert 'href="javascript' not in page
    assert "<title>a &lt; b</title>" in page
    assert "<summary>x &lt;b&gt;</summary>" in page


def test_the_answer_follows_the_runs(results, copied):
    """The fake trains both contestants alike; once AdaBound's runs are better, the answer says so."""
    assert "so the two are not told apart" in answer(read_study(results / "small"))

    def better(line):
        if (line["contestant"], line["stage"]) == ("AdaBound", "final"):
            line["top1"] = "0.95" if line["number"] == "0" else "0.951"

    change_trials(copied / "small", better)
    found = answer(read_study(copied / "small"))
    assert "AdaBound reaches a final top-1 of 95.0%" in found
    assert "over 2 seeds" in found


def test_the_training_loss_may_be_what_counts(copied, tmp_path):
    path = copied / "small" / "protocol.toml"
    path.write_text(path.read_text() + 'measure = "train_loss"\n')
    found = answer(read_study(copied / "small"))
    losses = {
        name: sum(trial.epochs[-1]["train_loss"] for trial in read_study(copied / "small").find(name).finals) / 2
        for name in ("Adam", "AdaBound")
    }
    best, other = sorted(losses, key=losses.get)
    assert f"the training loss of the last epoch is {losses[best]:.2f} with {best}, {losses[other]:.2f}" in found
    assert len(plot_upper_bounds([read_study(copied / "small")]).axes) == 2


def test_epochs_without_a_test_are_in_the_curves_of_training_alone(copied, tmp_path):
    """The files are those of --test-every 2."""
    for path in (copied / "small").glob("*/*/metrics.jsonl"):
        first, second, *rest = map(json.loads, path.read_text().splitlines())
        first = {name: value for name, value in first.items() if not name.startswith("test_")}
        path.write_text("".join(json.dumps(row) + "\n" for row in (first, second, *rest)))
    ours = read_study(copied / "small").find("AdaBound")
    assert ours.curve("test_top1")[0].tolist() == [2, 3]
    assert ours.curve("train_loss")[0].tolist() == ours.curve("at_upper")[0].tolist() == [1, 2, 3]
    assert "small-curves.png" in report_on(copied / "small", tmp_path / "out")


def test_a_trials_file_without_blocks_is_still_read(copied):
    """Without the column a contestant's block follows from its name."""
    path = copied / "map" / "trials.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    del lines[0]["block"]
    write_trials(path, lines)
    contestants = read_study(copied / "map").contestants
    assert {c.block for c in contestants} == {"bounds"}
    assert contestants[0].labels == {"learning_rate": "0.001", "final_lr": "0.1"}


def test_settings_that_were_chosen_narrowly_or_at_an_edge_are_marked(results, out):
    lines = (out / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("| chosen again |"))
    rows = {
        row[1]: row[2:-1] for row in ([c.strip() for c in line.split("|")] for line in lines[start + 2 : start + 4])
    }
    small = read_study(results / "small")
    for name, cells in rows.items():
        contestant = small.find(name)
        rates = [trial.number("learning_rate") for trial in contestant.tuning]
        chosen = contestant.final[0].number("learning_rate")
        assert cells[0].endswith("*") == (chosen in (min(rates), max(rates)))
        assert cells[-1] == f"{small.chosen_again(contestant):.0%}"
        assert 1 / 3 < small.chosen_again(contestant) <= 1


def test_a_setting_that_one_contestant_draws_is_plotted_above_its_choice(results):
    """Only Adam draws the momentum, from a list of two."""
    study = read_study(results / "small")
    axis = plot_tuning(study).axes[list(study.searched).index("momentum")]
    drawn = [[0.8, 0.9].index(trial.number("momentum")) for trial in study.find("Adam").tuning]
    assert [float(line.get_xdata()[0]) for line in axis.lines] == drawn


def test_a_setting_that_hangs_on_the_held_out_pictures_is_no_secret(copied):
    """One trial predicts all pictures correctly; then another does so too, with a lower loss."""
    best, *_, last = sorted(read_study(copied / "small").find("Adam").tuning, key=lambda trial: -trial.accuracy())
    for trial, loss, share, said in ((best, 1.0, 1.0, False), (last, 0.5, 0.0, True)):
        header, *lines = (trial.folder / "predictions.csv").read_text().splitlines()
        rows = [line.split(",") for line in lines]
        lines = [",".join([number, label, label, *rest, f"{loss}"]) for number, label, _, *rest, _ in rows]
        (trial.folder / "predictions.csv").write_text("\n".join([header, *lines]) + "\n")
        small = read_study(copied / "small")
        assert small.chosen_again(small.find("Adam")) == share
        assert ("chosen the same setting in only 0% (Adam)" in answer(small)) == said
    protocol = copied / "small" / "protocol.toml"
    protocol.write_text(protocol.read_text().replace("holdout = 0.1", 'holdout = 0.1\nchoose_by = "loss"'))
    assert read_study(copied / "small").chosen_by_loss


def test_final_runs_of_another_study_stand_beside(results, out):
    check = read_study(results / "small_check")
    assert [(c.name, c.beside) for c in check.contestants] == [("SGD", False), ("AdaBound", True), ("Adam", True)]
    assert len(check.trials) == 2  # its own
    theirs = read_study(results / "small").find("AdaBound")
    assert check.find("AdaBound").by_seed() == theirs.by_seed()
    assert check.answers["AdaBound"][0].count == 2
    page = (out / "report.md").read_text()
    assert "From another study: AdaBound, Adam." in page
    answers = [line for line in page[: page.index("## ")].splitlines() if line.startswith("> ")]
    assert [line.partition(":")[0] for line in answers] == ["> small", "> small_check"]


def test_studies_may_stand_beside_one_another(copied):
    path = copied / "small" / "protocol.toml"
    path.write_text(path.read_text() + 'beside = { small_check = ["SGD"] }\n')
    assert [c.name for c in read_study(copied / "small").contestants] == ["Adam", "AdaBound", "SGD"]
    assert [c.name for c in read_study(copied / "small_check").contestants] == ["SGD", "AdaBound", "Adam"]


def test_without_the_other_study_it_stands_alone(copied, tmp_path):
    shutil.rmtree(copied / "small")
    assert [contestant.name for contestant in read_study(copied / "small_check").contestants] == ["SGD"]
    assert "Not in the same folder: small, with" in report_on(copied, tmp_path / "out")


def test_an_answer_is_called_interim_until_all_seeds_have_ended(copied):
    path = copied / "small" / "trials.csv"
    path.write_text(path.read_text().replace("Adam,final,1,done,", "Adam,final,1,open,"))
    found = answer(read_study(copied / "small"))
    assert found.startswith("small: so far, with 1 of 2 seeds, on drawn cars")
    assert "nothing can be said" in found


def test_a_training_that_failed_counts_as_nothing_right(copied, tmp_path):
    """Without failed runs an optimizer would look better the more often it diverges."""
    path = copied / "small" / "trials.csv"
    path.write_text(path.read_text().replace("AdaBound,final,1,done,", "AdaBound,final,1,failed,"))
    results = read_study(copied / "small")
    ours = results.find("AdaBound")
    assert ours.by_seed()[5] == 0
    assert ours.by_seed()[4] > 0
    assert not ours.right()[5].any()
    assert "1 of AdaBound's trainings failed, and count as 0." in answer(results)
    assert "| AdaBound | 2, 1 failed |" in report_on(copied / "small", tmp_path / "out")


def test_the_best_of_the_others_is_measured_against_the_better_of_the_two(copied):
    """The third contestant is a copy of Adam with other accuracies."""

    def copy(line):
        if (line["contestant"], line["stage"]) == ("Adam", "final"):
            return line | {"contestant": "SGD", "top1": f"0.{98 + int(line['number'])}"}

    change_trials(copied / "small", copy)
    found = answer(read_study(copied / "small"))
    assert "Of the others SGD comes highest with 98.5%" in found
    assert "better than A" in found


def test_an_unfinished_study_says_so(copied, tmp_path):
    path = copied / "small" / "trials.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace(",done,", ",open,") if ",final," in line else line for line in lines) + "\n")
    for folder in (copied / "small").glob("*/seed-*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    page = report_on(copied / "small", tmp_path / "out")
    assert "4 have not been run to their end" in page
    assert "the question is still open" in answer(read_study(copied / "small"))


def test_notes_are_part_of_it(copied, tmp_path):
    (copied / "map" / "notes.md").write_text("cars96: no GPU was at hand.\n")
    assert "\n\ncars96: no GPU was at hand.\n" in report_on(copied / "map", tmp_path / "out")


def test_axes_become_a_grid():
    """The first half of the axes goes across, the rest down, in the protocol's order; a missing cell stays empty."""
    values = [("Adam", "0.001", "own", "as it was"), ("Adam", "0.002", "own", "both"), ("SGD", "0.001", "own", "both")]
    axes = ("optimizer", "learning_rate", "network", "input")
    contestants = [Contestant(", ".join(v), "A", dict(zip(axes, v, strict=True)), "C0") for v in values]
    others = [Contestant("alone", "alone", {}, "C1"), Contestant("one axis", "one axis", {"gamma": "1"}, "C2")]
    same_axes = Contestant("B", "B", contestants[0].labels, "C3")
    grid, other = find_grids([*contestants, *others, same_axes])
    assert list(other.cells.values()) == [same_axes]
    assert (grid.across, grid.down) == (axes[:2], axes[2:])
    assert grid.columns == [("Adam", "0.001"), ("Adam", "0.002"), ("SGD", "0.001")]
    assert grid.rows == [("own", "as it was"), ("own", "both")]
    assert grid.cells[("own", "both"), ("SGD", "0.001")] is contestants[2]
    assert (("own", "as it was"), ("SGD", "0.001")) not in grid.cells


DAMAGES = [  # a file, the old text (None: all of it), the new text, and the message
    ("trials.csv", None, "a,b\n1,2\n", "trials.csv is not that of a study"),
    ("trials.csv", None, b"\xff\xfe", "trials.csv is damaged"),
    ("trials.csv", ",tuning,", ",tunning,", "trials.csv, line 2, is damaged: stage 'tunning' is none"),
    ("trials.csv", ",done,", ",dne,", "trials.csv, line 2, is damaged: state 'dne' is none of open, begun"),
    ("trials.csv", ",done,0,", ",done,x,", "trials.csv, line 2, is damaged: invalid literal for int"),
    ("trials.csv", ",1.0,", ",5.3,", "is 5.3, not between 0 and 1"),
    ("trials.csv", "Adam,Adam,tuning,0", "Adam,Adam,tuning", "is damaged: it has another number of columns"),
    ("protocol.toml", None, "about = ", "protocol.toml is damaged"),
    ("protocol.toml", "seeds = [4, 5]", "seeds = [4, 5, 6]", "trials.csv has 10 runs, and protocol.toml"),
    ("protocol.toml", "about", "abuot", "protocol.toml is damaged: about is missing"),
    ("../small_check/protocol.toml", '", "Adam"]', '", "Adom"]', "Adom of small, which has no such contestant"),
    ("adam/seed-4/predictions.csv", None, "a,b\n", "predictions.csv holds no test results"),
    ("adam/seed-4/config.json", None, "{", "config.json"),
    ("adam/seed-4/metrics.jsonl", None, "no\n", "metrics.jsonl"),
    ("adam/seed-4/metrics.jsonl", '"test_top1"', '"top1"', "metrics.jsonl is missing, or its last epoch was not"),
    ("adam/seed-4/metrics.jsonl", '"test_top1": 0.', '"test_top1": 0.0', "it ends with a top-1 of 0.0"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), DAMAGES)
def test_damaged_files_are_named(copied, tmp_path, capsys, name, old, new, said):
    path = copied / "small" / name
    if old is None:
        path.write_bytes(new if isinstance(new, bytes) else new.encode())
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new) if name.endswith("jsonl") else text.replace(old, new, 1))
    assert report.main([str(copied if ".." in name else copied / "small"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_an_answer_by_hand_stands_first(copied, tmp_path):
    (copied / "small" / "answer.md").write_text("In short:\nnobody knows.\n")
    page = report_on(copied / "small", tmp_path / "out")
    assert page.startswith("# Is AdaBound better than Adam?\n\n> In short: nobody knows.\n\n| study |")


def trained(name, labels, accuracies):
    """A contestant with a final run for each accuracy; seeds start at 1."""
    columns = [{"stage": "final", "state": "done", "seed": f"{n}", "top1": f"{a}"} for n, a in enumerate(accuracies, 1)]
    return Contestant(name, "block", labels, "C0", final=[Trial(of_run, Path(name)) for of_run in columns])


def test_optimizers_of_a_grid_are_compared_by_hand():
    """Differences of 0.1 and 0.2 have mean 0.15 and a half-width of 12.706 · 0.0707 / sqrt(2)."""
    cells = {
        ("Adam", "a"): [0.5, 0.5],
        ("AdaBound", "a"): [0.6, 0.7],
        ("Adam", "b"): [0.4, 0.4],
        ("AdaBound", "b"): [],
    }
    contestants = [
        trained(f"{optimizer}, {start}", {"optimizer": optimizer, "start": start}, values)
        for (optimizer, start), values in cells.items()
    ]
    (grid,) = find_grids(contestants)
    assert grid_differences(grid) == [{"": "a", "AdaBound minus Adam": "+15.0 points (-48.5 to +78.5)"}]


def test_one_that_learned_nothing_does_not_press_the_differences_together():
    contestants = [
        trained("Adam", {}, [0.50, 0.52]),
        trained("SGD", {}, [0.51, 0.53]),
        trained("AdamW", {}, [0.49, 0.51]),
        trained("guess", {}, [0.05, 0.05]),
    ]
    results = StudyResults("small", "", contestants, (), (), {})
    (axis,) = plot_differences(results, contestants[0]).axes
    assert axis.get_xlim() == pytest.approx((-0.011, 0.011))
    assert [text.get_text() for text in axis.texts] == ["-46"]


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    """matplotlib would omit such a name."""
    ended = Trial({"stage": "tuning", "state": "done", "top1": "0.5"}, Path())
    contestants = [Contestant(name, name, {}, "C0", tuning=[ended, ended]) for name in ("_Adam", "SGD")]
    (axis,) = plot_tuning_effort(StudyResults("small", "", contestants, (), (), {})).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [f"{MARK}_Adam", "SGD"]


def test_a_grid_of_which_nothing_was_trained_yet_is_left_out(copied, tmp_path):
    """Another grid of the study is plotted."""
    with open(copied / "map" / "protocol.toml", "a") as file:
        file.write('[[contestants]]\nname = "later"\naxes.learning_rate = [0.001, 0.01]\naxes.momentum = [0.8, 0.9]\n')
    path = copied / "map" / "trials.csv"
    header, *lines = path.read_text().splitlines()
    for rate in ("0.001", "0.01"):
        for momentum in ("0.8", "0.9"):
            name = f"later, learning_rate {rate}, momentum {momentum}"
            row = {"contestant": name, "block": "later", "stage": "final", "number": "0", "state": "open", "seed": "1"}
            row |= {"epochs": "2", "learning_rate": rate, "momentum": momentum}
            lines.append(",".join(f'"{row.get(column, "")}"' for column in [*header.split(","), "momentum"]))
    old = [line if line.endswith('"') else f"{line}," for line in lines]
    path.write_text("\n".join([f"{header},momentum", *old]) + "\n")
    page = report_on(copied / "map", tmp_path / "out")
    assert "map-bounds-grid.png" in page
    assert "map-later-grid.png" not in page
