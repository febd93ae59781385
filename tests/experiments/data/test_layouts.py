"""Tiny folders of every layout, as people bring them or spoilt. docs/bad-input.md has more refusals."""

import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from folder_changes import a_file, a_picture, changed, cut, linked, moved, removed
from picture_folders import (
    CLASSES,
    HUGGINGFACE,
    LABELS,
    annotations_of,
    crop,
    folder_name,
    load,
    make_by_class,
    make_devkit,
    make_original,
    make_parquet,
    make_tfds,
    make_with_devkit,
    photographs,
    save_annotations,
    write_parquet,
)

from experiments.data import stanford_cars
from experiments.data.dataset import DataError
from experiments.data.layouts import devkit, find_pictures
from experiments.data.layouts.names import choose_splits


def make_joint(root, **changes):
    """The authors' other distribution: one folder of pictures, one file of boxes, classes and splits."""
    rows = []
    for split in LABELS:
        for row, (_, _, photograph) in zip(annotations_of(split), photographs(split), strict=True):
            name = f"car_ims/{len(rows) + 1:06d}.png"
            (root / "car_ims").mkdir(parents=True, exist_ok=True)
            photograph.save(root / name)
            fields = {"relative_im_path": name, "test": int(split == "test")} | row
            del fields["fname"]
            rows.append(fields | (changes if not rows else {}))
    save_annotations(root / "cars_annos.mat", rows, class_names=np.array(CLASSES, object).reshape(1, -1))


def in_folder(make, *path, **options):
    return lambda root: make(root.joinpath(*path), **options)


LAYOUTS = {  # the layout's name and what is special; what makes the folder
    "by class": make_by_class,
    "by class, Kaggle": in_folder(make_by_class, "car_data", "car_data"),
    "by class, with a devkit": make_with_devkit,
    "original": make_original,
    "original, everything at the top": in_folder(make_original, devkit="."),
    "original, torchvision": in_folder(make_original, "stanford_cars", test_annotations="."),
    "original, Kaggle": in_folder(make_original, devkit="car_devkit/devkit", nested=True),
    "original, car_ims": make_joint,
    "TFDS cars196 (tfrecord)": make_tfds,
    "TFDS cars196 (array_record)": in_folder(make_tfds, "cars196", "2.1.0", file_format="array_record"),
    "Hugging Face parquet": make_parquet,
    "Hugging Face parquet, in data": in_folder(make_parquet, "data"),
    "Hugging Face parquet, a folder per split": in_folder(make_parquet, pattern="{split}/0000{part}.parquet"),
    "Hugging Face parquet, names in the README": in_folder(make_parquet, names="readme"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_the_same_cars(tmp_path, case, capsys):
    """The boxes are noise on black: a shift by one pixel changes them all."""
    layout = case.partition(",")[0]
    LAYOUTS[case](tmp_path / "found")
    dataset = load(tmp_path / "found", tmp_path)
    for split in LABELS:
        cars = list(photographs(split))
        if layout == "by class":
            cars.sort(key=lambda car: car[1])
        decoded = getattr(dataset, split)
        np.testing.assert_array_equal(decoded.labels, [label for _, label, _ in cars])
        np.testing.assert_array_equal(decoded.images, np.stack([crop(photograph) for _, _, photograph in cars]))
        assert (decoded.labels.dtype, decoded.images.dtype) == (np.int32, np.uint8)
    assert dataset.class_names == (tuple(map(folder_name, range(3))) if layout == "by class" else CLASSES)
    assert dataset.source["layout"] == layout
    assert dataset.source["boxes"] == (layout.startswith(("original", "TFDS")) or "devkit" in case)
    assert (dataset.source["train"], dataset.source["test"], dataset.source["classes"]) == (4, 3, 3)
    assert json.loads(json.dumps(dataset.source)) == dataset.source
    printed = capsys.readouterr().err
    assert f"4 train and 3 test pictures of 3 classes in {dataset.source['directory']}, layout {layout}" in printed
    assert "the whole of Stanford Cars has 8,144 and 8,041 pictures of 196 classes" in printed


# The finder.


@pytest.mark.parametrize(
    ("names", "train", "test", "note"),
    [
        ("train test", "train", "test", ""),
        ("Training TESTING", "Training", "TESTING", ""),
        ("latestTrain_2 CARS-TEST2017 t10k-images-idx3", "latestTrain_2", "CARS-TEST2017 t10k-images-idx3", ""),
        ("latest-train.parquet contest-test.parquet", "latest-train.parquet", "contest-test.parquet", ""),
        ("strain retrain trainer contest latest attest devkit value", "", "", ""),
        ("train val", "train", "val", "val is used for the test"),
        ("traindata testset", "traindata", "testset", ""),
        ("trainingset valset testdata", "trainingset", "testdata", "valset in .* is left out"),
        ("train validation test", "train", "test", "validation in .* is left out"),
        ("data/train-0.parquet data/eval-0.parquet", "data/train-0.parquet", "data/eval-0.parquet", ""),
    ],
)
def test_splits_are_words(names, train, test, note):
    chosen, notes = choose_splits(names.split(), Path("cars"))
    assert chosen == {"train": train.split(), "test": test.split()}
    assert re.search(note, " ".join(notes))
    assert bool(note) == bool(notes)


def hub_cache(root):
    """Two snapshots of links to files in blobs/ that have no suffix."""
    repository = root / "hub" / "datasets--x--stanford_cars"
    make_parquet(repository / "blobs")
    for snapshot in ("0ld", "1new"):
        for number, path in enumerate(sorted((repository / "blobs").glob("*.parquet"))):
            blob = repository / "blobs" / f"{snapshot}{number}"
            blob.write_bytes(path.read_bytes())
            linked(f"snapshots/{snapshot}/data/{path.name}", f"../../../blobs/{blob.name}")(repository)
    removed(*(f"blobs/{path.name}" for path in (repository / "blobs").glob("*.parquet")))(repository)
    a_file("refs/main", content=b"1new\n")(repository)


AUDI, RAM, SMART = map(folder_name, range(3))
LEFT = ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-0", "$RECYCLE.BIN", "System Volume Information", "lost+found"
PARTS = {split: [f"{split}-0000{part}-of-00002.parquet" for part in (0, 1)] for split in LABELS}
TFDS_TRAIN, TFDS_TEST = (f"cars196-{split}.tfrecord-00000-of-00001" for split in LABELS)
NO_LAYOUT = "is in no known layout; "


def split_of_tfds(number, **facts):
    """Changes facts of a split in dataset_info.json."""

    def change(root):
        info = json.loads((root / "dataset_info.json").read_text())
        info["splits"][number] |= facts
        (root / "dataset_info.json").write_text(json.dumps(info))

    return change


# Each case has what makes the folder, what changes it, and the note about it. All give the same seven pictures.
TAKEN = {
    "Train and Test": (make_by_class, moved("train", "Train"), moved("test", "Test"), ""),
    "cars_train and cars_test by class": (make_by_class, moved("train", "cars_train"), moved("test", "cars_test"), ""),
    "valid for test": (make_by_class, moved("test", "valid"), "valid is used for the test"),
    "train, test and val": (make_by_class, a_picture(f"val/{AUDI}/1.png"), "val in .* is left out"),
    "train in train": (make_by_class, moved("train", "x/train"), moved("test", "test2/Test"), moved("x", "train"), ""),
    "contest and latest beside them": (make_by_class, a_picture("contest/a/1.png", "latest/b/2.png"), ""),
    "leftovers": (
        make_by_class,
        *(a_picture(f"{place}{name}/a.png") for name in LEFT for place in ("", "train/", f"test/{SMART}/")),
        a_picture("train/@eaDir/Audi/00000.png/SYNOPHOTO_THUMB_M.png"),
        a_file(f"train/{AUDI}/Thumbs.db", f"train/{AUDI}/._00001.png", "test/.DS_Store", "train/desktop.ini"),
        removed(*(f"train/{name}/a.png" for name in LEFT)),
        "",
    ),
    "classes named like leftovers": (
        make_by_class,
        a_picture("train/.NET/1.png", "test/.NET/2.png", "test/Recycler/3.png"),
        "3 folders with pictures are left out, .*: train/.NET, test/.NET, test/Recycler; rename",
    ),
    "folders without pictures": (
        make_by_class, a_file("train/old/notes.txt", "test/Škoda/1.nef"),
        r"2 folders without pictures are no classes: train/old, test/Škoda.*\n2 entries of .* are not pictures",
    ),
    "a picture beside the classes": (make_by_class, a_picture("train/1.png"), "1 picture is outside the class folders"),
    "spaces around a class's name": (make_by_class, moved(f"train/{AUDI}", f"train/{AUDI} "), ""),
    "another case": (make_by_class, moved(f"test/{AUDI}", f"test/{AUDI.upper()}"), ""),
    "links for classes": (make_by_class, moved(f"train/{AUDI}", "store/a"), linked(f"train/{AUDI}", "../store/a"), ""),
    "by class in folders of any name": (in_folder(make_by_class, "some", "where [v1] 100%", "Škoda"), ""),
    "by class, unpacked twice": (in_folder(make_by_class, "archive (1)", "stanford-car-dataset-by-classes-folder"), ""),
    "beside other data sets": (
        lambda root: (make_by_class(root / "stanford_cars"), make_by_class(root / "flowers")),
        "",
    ),
    "the newest of TFDS's versions": (
        lambda root: [make_tfds(root / "cars196" / version) for version in ("2.1.0", "2.10.0", "2.9.0")],
        "",
    ),
    "TFDS with a validation split": (
        make_tfds, split_of_tfds(1, name="validation"), moved(TFDS_TEST, TFDS_TEST.replace("test", "validation")),
        "for the test",
    ),
    "TFDS without class names": (make_tfds, removed("label.labels.txt"), "they are called by number"),
    "Hugging Face's cache": (hub_cache, ""),
    "latest-train.parquet": (in_folder(make_parquet, pattern="latest-{split}-0000{part}-of-00002.parquet"), ""),
    "parquet, train_0": (in_folder(make_parquet, pattern="{split}_{part}.parquet"), ""),
    "parquet, part-0": (in_folder(make_parquet, pattern="data/{split}-part-{part}.parquet"), ""),
    "leftovers beside parquet": (make_parquet, a_file("._train.parquet", "__MACOSX/test.parquet"), ""),
    "a picture without annotation": (make_original, a_picture("cars_train/9.png"), "without annotation: "),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_people_bring_is_taken_for_what_it_is(tmp_path, case):
    *changes, note = TAKEN[case]
    changed(*changes)(tmp_path / "found")
    dataset = load(tmp_path / "found", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [2, 1, 1]
    assert np.bincount(dataset.test.labels).tolist() == [1, 1, 1]
    named = [name.replace("/", "-") for name in dataset.class_names]
    assert named == (["0", "1", "2"] if "without class names" in case else [AUDI, RAM, SMART])
    notes = "\n".join(note for note in dataset.source["notes"] if "the whole of Stanford Cars" not in note)
    assert re.search(note, notes)
    assert bool(note) == bool(notes), notes
    if case.endswith("versions"):
        assert dataset.source["directory"].endswith("2.10.0")
    if case == "Hugging Face's cache":
        assert dataset.source["directory"].endswith("1new")


def test_a_name_composed_in_two_ways_is_one_class(tmp_path):
    """macOS may store ë as an e and an accent."""
    for split, form in (("train", "NFC"), ("test", "NFD")):
        a_picture(*(f"{split}/{unicodedata.normalize(form, name)}/1.png" for name in ("Citroën", "Škoda")))(tmp_path)
    assert load(tmp_path, tmp_path).class_names == ("Citroën", "Škoda")


@pytest.mark.parametrize("name", ["train", "Training Day"])
def test_a_class_may_be_named_like_a_split(tmp_path, name):
    a_picture(f"train/{name}/1.png", f"test/{name}/2.png", "test/other/3.png")(tmp_path)
    assert load(tmp_path, tmp_path).class_names == tuple(sorted((name, "other")))


def parquet_with(*rows):
    return changed(make_parquet, lambda root: write_parquet(root / PARTS["train"][0], rows, HUGGINGFACE))


# Each case has what makes the folder, what changes it, and the message; docs/bad-input.md has more.
REFUSED = {
    "by class: one folder for both": (
        make_by_class, removed("test"), linked("test", "train"),
        "one folder for both splits: train is test",
    ),
    "by class: a class linked into the test": (
        make_by_class,
        removed(f"test/{AUDI}"),
        linked(f"test/{AUDI}", f"../train/{AUDI}"),
        f"one file in both splits: train/{AUDI}/00001.png is test/{AUDI}/00001.png",
    ),
    "by class: a picture linked into the test": (
        make_by_class,
        linked(f"test/{AUDI}/9.png", f"../../train/{AUDI}/00001.png"),
        f"one file in both splits: train/{AUDI}/00001.png is test/{AUDI}/9.png",
    ),
    "original: one folder for both": (
        make_original, removed("cars_test"), linked("cars_test", "cars_train"),
        "one folder for both splits: cars_train is cars_test",
    ),
    "by class: a class twice": (
        make_by_class, a_picture(f"train/{AUDI.lower()} /7.png"),
        f"one class in two spellings in train, '{AUDI}' and '{AUDI.lower()} ': join them",
    ),
    "by class: a devkit that is none": (
        lambda root: (make_by_class(root), make_devkit(root), (root / "cars_train_annos.mat").write_bytes(b"404")),
        "cars_train_annos.mat cannot be read as a MATLAB file",
    ),
    "two sets": (
        lambda root: [make_by_class(root / name) for name in ("cars_small", "cars_large")],
        "has 2 sets of pictures: give one of .*cars_large, .*cars_small",
    ),
    "original: no cars_test": (make_original, removed("cars_test"), "no folder for cars_test/: expected both"),
    "original: no test labels": (
        make_original, moved("devkit/cars_test_annos_withlabels.mat", "devkit/cars_test_annos.mat"),
        r"no cars_test_annos_withlabels.mat.*\(cars_test_annos.mat is there, but has no classes\)",
    ),
    "car_ims: no annotations": (make_joint, removed("cars_annos.mat"), "has car_ims/, but there is no cars_annos.mat"),
    "car_ims: a picture twice": (in_folder(make_joint, relative_im_path="car_ims/000002.png"), "names a picture twice"),
    "TFDS: another data set": (in_folder(make_tfds, name="flowers"), "'flowers'.*expected 'cars196'"),
    "TFDS: an old one": (make_tfds, removed("features.json"), "no features.json: an old TFDS prepared it"),
    "TFDS: no features of their own": (
        make_tfds, a_file("features.json", content=b"{"),
        "cannot be read as a TFDS data set",
    ),
    "TFDS: a missing file": (make_tfds, removed(TFDS_TRAIN), f"1 of 2 files .* missing, first {TFDS_TRAIN}"),
    "TFDS: a truncated file": (make_tfds, cut(TFDS_TRAIN, -30), "is damaged after 3 train pictures"),
    "TFDS: a file that ends in a header": (make_tfds, cut(TFDS_TRAIN, 5), "is damaged after 0 train pictures"),
    "TFDS: an array_record that is none": (
        in_folder(make_tfds, file_format="array_record"),
        a_file(TFDS_TRAIN.replace("tfrecord", "array_record"), content=b"x" * 100),
        "is damaged after 0 train pictures",
    ),
    "TFDS: fewer records than promised": (
        make_tfds, split_of_tfds(0, shardLengths=["5"]),
        "holds 4 train pictures, but its dataset_info.json says 5",
    ),
    "TFDS: more records than promised": (
        in_folder(make_tfds, file_format="array_record"), split_of_tfds(0, shardLengths=["3"]),
        "holds 4 train pictures, but its dataset_info.json says 3",
    ),
    "parquet: no test": (make_parquet, removed(*PARTS["test"]), "none of the split 'test'"),
    "parquet: a missing file": (make_parquet, removed(PARTS["test"][0]), "1 of 2 .* for test: number 0 is"),
    "parquet: a file twice": (
        make_parquet, a_file(PARTS["test"][0].replace(".parquet", " (1).parquet")),
        "has number 0 of the parquet files for test twice",
    ),
    "parquet: two sets": (make_parquet, a_file("test.parquet"), "several sets of parquet files for test"),
    "parquet: a second download": (
        in_folder(make_parquet, pattern="{split}.parquet"), a_file("train (1).parquet"),
        r"several sets of parquet files for train \(train \(1\).parquet, train.parquet\): keep only one",
    ),
    "parquet: a second download in the split's folder": (
        in_folder(make_parquet, pattern="{split}/{part}.parquet"), a_file("train/1 (1).parquet"),
        r"several sets .* for train \(train/0.parquet, train/1 \(1\).parquet, train/1.parquet",
    ),
    "parquet: a smaller set": (
        in_folder(make_parquet, pattern="{split}.parquet"), a_file("train_small.parquet"),
        r"several sets of parquet files for train \(train.parquet, train_small.parquet\): keep only one",
    ),
    "parquet: no split in the names": (lambda root: a_file("cars.parquet")(root), "its name must say train or test"),
    "parquet: other columns": (parquet_with({"picture": 1}), r"no column 'image' but \['picture'\]"),
    "parquet: a label out of range": (
        parquet_with({"image": {"bytes": b""}, "label": 0}, {"image": {"bytes": b""}, "label": 3}),
        "row 1 has the label 3: expected 0 to 2",
    ),
    "parquet: a gap in the labels": (
        parquet_with({"image": {"bytes": b""}, "label": 0}, {"image": {"bytes": b""}, "label": None}),
        "column 'label' must be whole numbers without missing values",
    ),
    "no layout: classes first": (
        a_picture("Audi/train/1.png", "Audi/test/2.png", "BMW/train/3.png"),
        f"{NO_LAYOUT}Audi, BMW hold train and test each: expected train/Audi/ and test/Audi/",
    ),
    "no layout: an archive": (a_file("archive.zip"), f"{NO_LAYOUT}it holds archive.zip: unpack it"),
    "no layout: no suffixes": (a_file("train/Audi/1", "test/Audi/1"), f"{NO_LAYOUT}test, train hold no class folders"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_explained_in_a_few_lines(tmp_path, case):
    *changes, message = REFUSED[case]
    changed(*changes)(tmp_path / "found")
    with pytest.raises(DataError, match=message) as raised:
        load(tmp_path / "found", tmp_path)
    assert str(raised.value).count("\n") < 10
    for layout in ("by class", "original", "TFDS", "parquet", "car_ims", "cars196/2.1.0"):
        assert not case.startswith("no layout") or layout in str(raised.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("make", "package", "command"),
    [
        (make_tfds, "tensorflow_datasets", 'pip install "tensorflow-datasets" "array-record"'),
        (
            in_folder(make_tfds, file_format="array_record"),
            "array_record.python.array_record_module",
            'pip install "array-record"',
        ),
        (make_parquet, "pyarrow.parquet", 'pip install "pyarrow"'),
    ],
)
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, make, package, command):
    make(tmp_path / "found")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=re.escape(command)):
        load(tmp_path / "found", tmp_path)


def test_tfrecords_are_read_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert len(load(make_tfds(tmp_path / "found"), tmp_path).train) == 4


def test_parquet_without_class_names_calls_them_by_number(tmp_path):
    dataset = load(make_parquet(tmp_path / "found", names=None), tmp_path)
    assert dataset.class_names == ("0", "1", "2")
    assert any("called by number" in note for note in dataset.source["notes"])


@pytest.mark.parametrize(("kept", "lost"), [("train", "test"), ("test", "train")])
def test_a_class_of_one_split_keeps_its_number(tmp_path, kept, lost):
    root = make_by_class(tmp_path / "found")
    shutil.rmtree(root / lost / RAM)
    dataset = load(root, tmp_path)
    assert dataset.class_names == (AUDI, RAM, SMART)
    assert 1 in getattr(dataset, kept).labels
    assert set(getattr(dataset, lost).labels) == {0, 2}
    assert f"1 class has no {lost} pictures: {RAM}" in dataset.source["notes"]


def numbered_anew(root):
    for old, new in ((f"{SMART}/00002", "x"), (f"{AUDI}/00004", f"{AUDI}/00002"), ("x", f"{SMART}/00004")):
        moved(f"train/{old}.png", f"train/{new}.png")(root)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_picture(f"test/{AUDI}/09999.png"), f"it lacks 1 of 4 test pictures: test/{AUDI}/09999.png"),
        (numbered_anew, "00002.png in class 'smart fortwo Convertible 2012'"),
        (
            removed("devkit/cars_test_annos_withlabels.mat"),
            "expected cars_meta.mat and annotations of both train and test",
        ),
    ],
)
def test_a_devkit_that_does_not_fit_is_not_used(tmp_path, change, reason):
    root = make_with_devkit(tmp_path / "found")
    change(root)
    dataset = load(root, tmp_path)
    assert dataset.source["boxes"] is False
    assert any("boxes are not used" in note and reason in note for note in dataset.source["notes"])


# The real data.


def test_the_real_devkit(devkit_dir):
    names = devkit.read_class_names(devkit_dir / "cars_meta.mat")
    assert (len(names), names[0]) == (196, "AM General Hummer SUV 2000")
    for file_name, count in (("cars_train_annos.mat", 8144), ("cars_test_annos_withlabels.mat", 8041)):
        annotations = devkit.read_annotations(devkit_dir / file_name, 196)
        assert len(annotations) == count
        assert {annotation.label for annotation in annotations.values()} == set(range(196))
    assert annotations["00001.jpg"] == ((30, 52, 246, 147, False), 180, None)
    unlabelled = devkit.read_annotations(devkit_dir / "cars_test_annos.mat", 196)
    assert {name: row.box for name, row in unlabelled.items()} == {name: row.box for name, row in annotations.items()}
    assert {row.label for row in unlabelled.values()} == {None}


def test_the_real_cars_agree_with_the_real_devkit(stanford_cars_dir, devkit_dir, tmp_path):
    """The folders by class have the devkit's file and class names, so the boxes of a devkit beside them are used."""
    for name, target in (("train", stanford_cars_dir), ("test", stanford_cars_dir), ("devkit", devkit_dir.parent)):
        (tmp_path / name).symlink_to(target / name)
    folder = find_pictures(tmp_path)
    assert folder.boxes
    assert folder.notes == ()
    assert stanford_cars.title_of(folder, folder.counts) == "Stanford Cars"
    assert len(folder.class_names) == 196
