"""The reader on tiny folders of every layout, on broken ones, and on the real data where that is at hand."""

import io
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from PIL import Image
from tfds_folder import feature, image_feature, label_feature, write_tfds

from experiments.data import folders, stanford_cars
from experiments.data.dataset import DataError
from experiments.data.stanford_cars import load_stanford_cars

CLASSES = ("Audi R8 Coupe 2012", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012")
LABELS = {"train": [0, 2, 1, 0], "test": [1, 0, 2]}
BOX = (5, 3, 24, 22)  # as the devkit counts: 20x20 pixels
WIDTH, HEIGHT = 40, 30


def photographs(split):
    """(file name, label, photograph) of each car; the boxes hold noise, the surroundings are black."""
    for number, label in enumerate(LABELS[split]):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        noise = np.random.default_rng([len(split), number])
        pixels[2:22, 4:24] = noise.integers(0, 256, (20, 20, 3))
        yield f"{number + 1:05d}.png", label, Image.fromarray(pixels)


def crop(photograph):
    return photograph.crop((4, 2, 24, 22))


def whole(photograph):
    return photograph


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def folder_name(label):
    return CLASSES[label].replace("/", "-")


def make_by_class(root, cut=crop):
    for split in LABELS:
        for name, label, photograph in photographs(split):
            directory = root / split / folder_name(label)
            directory.mkdir(parents=True, exist_ok=True)
            cut(photograph).save(directory / name)
    return root


def annotations_of(split, **changes):
    fields = {f"bbox_{edge}": value for edge, value in zip(("x1", "y1", "x2", "y2"), BOX, strict=True)} | changes
    return [fields | {"class": label + 1, "fname": name} for name, label, _ in photographs(split)]


def save_annotations(path, annotations):
    dtype = [(field, object) for field in annotations[0]]
    table = np.array([tuple(annotation.values()) for annotation in annotations], dtype)
    scipy.io.savemat(path, {"annotations": table.reshape(1, -1)})


def make_devkit(directory, test_directory=None, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(directory / "cars_meta.mat", {"class_names": np.array(CLASSES, object).reshape(1, -1)})
    save_annotations(directory / "cars_train_annos.mat", annotations_of("train", **changes))
    save_annotations(
        (test_directory or directory) / "cars_test_annos_withlabels.mat", annotations_of("test", **changes)
    )


def make_original(root, devkit="devkit", test_annotations=None, nested=False):
    for split in LABELS:
        directory = root / f"cars_{split}" / (f"cars_{split}" if nested else ".")
        directory.mkdir(parents=True)
        for name, _, photograph in photographs(split):
            photograph.save(directory / name)
    make_devkit(root / devkit, test_annotations and root / test_annotations)
    return root


FEATURES = {
    "bbox": feature(
        "bounding_boxes.BBoxFeature",
        boundingBox={"shape": {"dimensions": ["4"]}, "dtype": "float32", "bboxFormat": "REL_YXYX"},
    ),
    "id": feature("text_feature.Text", text={}),
    "image": image_feature(-1, -1, 3),
    "label": label_feature(CLASSES),
}


def make_tfds(root, file_format="tfrecord", name="cars196"):
    """The files that TFDS writes; the boxes are divided as TFDS's cars196 does it."""
    x1, y1, x2, y2 = BOX
    bbox = [y1 / HEIGHT, x1 / WIDTH, y2 / HEIGHT, x2 / WIDTH]
    examples = {
        split: [
            {"image": png(photograph), "label": label, "id": file_name[:5].encode(), "bbox": bbox}
            for file_name, label, photograph in photographs(split)
        ]
        for split in LABELS
    }
    return write_tfds(root, name, "2.1.0", FEATURES, CLASSES, examples, file_format)


README = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
  splits:
  - name: train
---
"""


def write_parquet(path, rows, metadata=None):
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    from pyarrow import Table

    pyarrow_parquet.write_table(Table.from_pylist(rows).replace_schema_metadata(metadata), path)


HUGGINGFACE = {"huggingface": json.dumps({"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}})}


def make_parquet(root, names="metadata", pattern="{split}-0000{part}-of-00002.parquet"):
    """Two files a split, as Hugging Face cuts them."""
    for split in LABELS:
        rows = [
            {"image": {"bytes": png(crop(photograph)), "path": name}, "label": label}
            for name, label, photograph in photographs(split)
        ]
        for part, half in enumerate((rows[:2], rows[2:])):
            path = root / pattern.format(split=split, part=part)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(path, half, HUGGINGFACE if names == "metadata" else None)
    if names == "readme":
        lines = "\n".join(f"          '{label}': {name}" for label, name in enumerate(CLASSES))
        (root / "README.md").write_text(README.format(names=lines))
    return root


def load(root, tmp_path, image_size=(20, 20), grey=False, margin=0, **options):
    return load_stanford_cars(root, image_size, grey, margin=margin, cache_dir=tmp_path / "cache", **options)


# The name of the layout, whether boxes are used, and what makes the folder.
LAYOUTS = {
    "by class": ("by class", False, make_by_class),
    "by class, Kaggle": ("by class", False, lambda root: make_by_class(root / "car_data" / "car_data")),
    "by class, in a folder": ("by class", False, lambda root: make_by_class(root / "Stanford_Cars")),
    "by class with a devkit": (
        "by class",
        True,
        lambda root: (make_by_class(root, cut=whole), make_devkit(root / "devkit")),
    ),
    "original": ("original", True, make_original),
    "original, everything at the top": ("original", True, lambda root: make_original(root, devkit=".")),
    "original, torchvision": (
        "original",
        True,
        lambda root: make_original(root / "stanford_cars", test_annotations="."),
    ),
    "original, Kaggle": ("original", True, lambda root: make_original(root, devkit="car_devkit/devkit", nested=True)),
    "TFDS, tfrecord": ("TFDS cars196 (tfrecord)", True, make_tfds),
    "TFDS, array_record": (
        "TFDS cars196 (array_record)",
        True,
        lambda root: make_tfds(root / "cars196" / "2.1.0", "array_record"),
    ),
    "parquet": ("Hugging Face parquet", False, make_parquet),
    "parquet in data": ("Hugging Face parquet", False, lambda root: make_parquet(root / "data")),
    "parquet, a folder per split": (
        "Hugging Face parquet",
        False,
        lambda root: make_parquet(root, pattern="{split}/0000{part}.parquet"),
    ),
    "parquet, names in the README": ("Hugging Face parquet", False, lambda root: make_parquet(root, names="readme")),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_the_same_cars(tmp_path, case, capsys):
    """The boxes are noise on black: one pixel off, and all of them differ."""
    layout, boxes, make = LAYOUTS[case]
    make(tmp_path / "found")
    dataset = load(tmp_path / "found", tmp_path)
    for split in LABELS:
        cars = list(photographs(split))
        if layout == "by class":
            cars.sort(key=lambda car: car[1])
        decoded = getattr(dataset, split)
        np.testing.assert_array_equal(decoded.labels, [label for _, label, _ in cars])
        np.testing.assert_array_equal(decoded.images, np.stack([crop(photograph) for _, _, photograph in cars]))
        assert decoded.labels.dtype == np.int32
        assert decoded.images.dtype == np.uint8
    assert dataset.class_names == (tuple(map(folder_name, range(3))) if layout == "by class" else CLASSES)
    assert dataset.source["layout"] == layout
    assert dataset.source["boxes"] == boxes
    assert (dataset.source["train"], dataset.source["test"], dataset.source["classes"]) == (4, 3, 3)
    assert json.loads(json.dumps(dataset.source)) == dataset.source
    printed = capsys.readouterr().err
    assert f"4 train and 3 test pictures of 3 classes in {dataset.source['directory']}, layout {layout}" in printed
    assert "the whole of Stanford Cars is 8,144 and 8,041 of 196" in printed


@pytest.mark.parametrize(("grey", "channels"), [(True, 1), (False, 3)])
def test_size_and_channels(tmp_path, grey, channels):
    dataset = load(make_by_class(tmp_path / "found"), tmp_path, image_size=(12, 34), grey=grey)
    assert dataset.train.images.shape == (4, 12, 34, channels)
    assert dataset.test.images.shape == (3, 12, 34, channels)


@pytest.mark.parametrize(("margin", "size"), [(0, (20, 20)), (2, (24, 24)), (16, (30, 40)), (None, (30, 40))])
def test_the_margin_widens_the_boxes(tmp_path, margin, size):
    """The box's 20 pixels stay as they are where the result has the size of the widened box."""
    dataset = load(make_original(tmp_path / "found"), tmp_path, image_size=size, margin=margin)
    left, top = (4, 2) if margin in (16, None) else (margin, margin)
    _, _, photograph = next(photographs("train"))
    np.testing.assert_array_equal(dataset.train.images[0, top : top + 20, left : left + 20], crop(photograph))
    assert dataset.source["margin"] == margin
    assert dataset.source["boxes"] == (margin is not None)


def test_any_suffix_in_any_case_and_nothing_else(tmp_path):
    root = make_by_class(tmp_path / "found")
    directory = root / "train" / folder_name(0)
    picture = Image.new("RGB", (9, 9))
    for name in ("a.JPG", "b.jpeg", "c.Bmp", "d.webp"):
        picture.save(directory / name, {"JPG": "JPEG", "jpeg": "JPEG", "Bmp": "BMP", "webp": "WEBP"}[name[2:]])
    for name in (".hidden.png", "._00001.png", "notes.txt", "Thumbs.db"):
        (directory / name).write_text("no picture")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    dataset = load(root, tmp_path)
    assert len(dataset.train) == 8
    (note,) = [note for note in dataset.source["notes"] if "not pictures" in note]
    assert note.startswith("2 entries of")
    assert note.endswith("Thumbs.db, notes.txt; left out")


@pytest.mark.parametrize(("kept", "lost"), [("train", "test"), ("test", "train")])
def test_a_class_of_one_split_keeps_its_number(tmp_path, kept, lost):
    root = make_by_class(tmp_path / "found")
    shutil.rmtree(root / lost / folder_name(1))
    dataset = load(root, tmp_path)
    assert dataset.class_names == tuple(map(folder_name, range(3)))
    assert 1 in getattr(dataset, kept).labels
    assert set(getattr(dataset, lost).labels) == {0, 2}
    assert f"1 classes have no {lost} pictures: {folder_name(1)}" in dataset.source["notes"]


# What is wrong with the folder -> (what makes it so, what the message must say)


def spoil(make, *relative):
    def made(root):
        make(root)
        for path in relative:
            target = root / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return made


def write(make, relative, content):
    def made(root):
        make(root)
        (root / relative).write_bytes(content)

    return made


def flat_test_folder(root):
    make_by_class(root)
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    Image.new("L", (3, 3)).save(root / "test" / "1.png")


def annotations_without_labels(root):
    make_original(root)
    (root / "devkit/cars_test_annos_withlabels.mat").rename(root / "devkit/cars_test_annos.mat")


def class_out_of_range(root):
    make_original(root)
    annotations = [annotation | {"class": 4} for annotation in annotations_of("train")]
    save_annotations(root / "devkit/cars_train_annos.mat", annotations)


def unlabelled_file_under_the_labelled_name(root):
    make_original(root)
    annotations = [{k: v for k, v in annotation.items() if k != "class"} for annotation in annotations_of("test")]
    save_annotations(root / "devkit/cars_test_annos_withlabels.mat", annotations)


def fewer_records_than_promised(root):
    make_tfds(root)
    info = json.loads((root / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["5"]
    (root / "dataset_info.json").write_text(json.dumps(info))


def cut(make, relative, size):
    def made(root):
        make(root)
        path = root / relative
        path.write_bytes(path.read_bytes()[:size])

    return made


def parquet_with(*rows):
    def made(root):
        make_parquet(root)
        write_parquet(root / "train-00000-of-00002.parquet", rows, HUGGINGFACE)

    return made


TFDS_TRAIN = "cars196-train.tfrecord-00000-of-00001"
INCOMPLETE = {
    "by class: no test": (spoil(make_by_class, "test"), "has no folder test/"),
    "by class: no train": (spoil(make_by_class, "train"), "has no folder train/"),
    "by class: test without classes": (flat_test_folder, r"1 pictures lie directly in it.*expected test/<Class Name>/"),
    "by class: a devkit that is none": (
        lambda root: (make_by_class(root), make_devkit(root), (root / "cars_train_annos.mat").write_bytes(b"404")),
        "cars_train_annos.mat cannot be read as a MATLAB file",
    ),
    "original: no cars_test": (spoil(make_original, "cars_test"), "has no folder cars_test/"),
    "original: no devkit": (spoil(make_original, "devkit"), "no cars_meta.mat"),
    "original: no train annotations": (spoil(make_original, "devkit/cars_train_annos.mat"), "no cars_train_annos.mat"),
    "original: no test labels": (
        annotations_without_labels,
        r"no cars_test_annos_withlabels.mat.*\(cars_test_annos.mat is there, but has no classes\)",
    ),
    "original: a file without labels under the other's name": (
        unlabelled_file_under_the_labelled_name,
        "has no field 'class': expected the file with labels",
    ),
    "original: missing pictures": (
        spoil(make_original, "cars_train/00002.png", "cars_train/00004.png"),
        "2 of the 4 pictures that cars_train_annos.mat names are not in .*: 00002.png, 00004.png; unpack cars_train",
    ),
    "original: not a .mat": (
        write(make_original, "devkit/cars_meta.mat", b"<html>404</html>"),
        "cars_meta.mat cannot be read as a MATLAB file",
    ),
    "original: an empty .mat": (write(make_original, "devkit/cars_meta.mat", b""), "cannot be read as a MATLAB file"),
    "original: another .mat": (
        lambda root: (make_original(root), scipy.io.savemat(root / "devkit/cars_meta.mat", {"x": 1})),
        r"no variable 'class_names' but \['x'\]",
    ),
    "original: a .mat of other fields": (
        lambda root: (make_original(root), save_annotations(root / "devkit/cars_train_annos.mat", [{"fname": "a"}])),
        "no field bbox_x1, bbox_y1",
    ),
    "original: a class out of range": (class_out_of_range, "00001.png in class 4: cars_meta.mat names 1 to 3"),
    "TFDS: another data set": (lambda root: make_tfds(root, name="flowers"), "'flowers'.*expected 'cars196'"),
    "TFDS: no features of their own": (write(make_tfds, "features.json", b"{"), "cannot be read as a TFDS data set"),
    "TFDS: a missing file": (spoil(make_tfds, TFDS_TRAIN), f"1 of 2 files .* are missing, first {TFDS_TRAIN}"),
    "TFDS: a truncated file": (cut(make_tfds, TFDS_TRAIN, -30), "ends inside a record"),
    "TFDS: a file without its last byte": (cut(make_tfds, TFDS_TRAIN, -1), "ends inside a record"),
    "TFDS: a file that ends in a header": (cut(make_tfds, TFDS_TRAIN, 5), "truncated or damaged at byte 5"),
    "TFDS: another file": (write(make_tfds, TFDS_TRAIN, b"x" * 100), "truncated or damaged at byte 12"),
    "TFDS: an array_record that is none": (
        write(lambda root: make_tfds(root, "array_record"), "cars196-train.array_record-00000-of-00001", b"x" * 100),
        "is damaged after 0 train pictures",
    ),
    "TFDS: fewer records than promised": (
        fewer_records_than_promised,
        "holds 4 train pictures, its dataset_info.json says 5",
    ),
    "parquet: no test": (
        spoil(make_parquet, "test-00000-of-00002.parquet", "test-00001-of-00002.parquet"),
        "none of the split 'test'",
    ),
    "parquet: a missing file": (spoil(make_parquet, "test-00000-of-00002.parquet"), "1 of 2 .* of test: number 0 is"),
    "parquet: git-lfs's pointer": (
        write(make_parquet, "test-00000-of-00002.parquet", b"version https://git-lfs.github.com/spec/v1"),
        "cannot be read as parquet.*git lfs pull",
    ),
    "parquet: other columns": (parquet_with({"picture": 1}), r"no column 'image' but \['picture'\]"),
    "parquet: a label out of range": (
        parquet_with({"image": {"bytes": b""}, "label": 0}, {"image": {"bytes": b""}, "label": 3}),
        "row 1 has the label 3: expected 0 to 2",
    ),
    "parquet: a gap in the labels": (
        parquet_with({"image": {"bytes": b""}, "label": 0}, {"image": {"bytes": b""}, "label": None}),
        "column 'label' must be whole numbers without gaps",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_folder_is_explained(tmp_path, case):
    make, message = INCOMPLETE[case]
    make(tmp_path / "found")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "found", tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def nothing(root):
    root.mkdir()


def other_files(root):
    (root / "a" / "b").mkdir(parents=True)
    (root / "list.txt").write_text("cars")
    Image.new("L", (3, 3)).save(root / "1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "in no layout that this program knows"),
        (other_files, "in no layout that this program knows"),
        (lambda root: None, "does not exist"),
        (lambda root: root.write_bytes(b"PK"), "is a file: unpack it"),
        (lambda root: make_by_class(root / "some" / "where"), "in no layout that this program knows"),
    ],
)
def test_where_nothing_is_the_layouts_are_listed(tmp_path, make, message):
    make(tmp_path / "found")
    with pytest.raises(DataError, match=message) as raised:
        load(tmp_path / "found", tmp_path)
    for layout in ("by class", "original", "TFDS", "parquet", "train/<Class Name>/", "cars_meta.mat", "cars196/2.1.0"):
        assert layout in str(raised.value)


@pytest.mark.parametrize(
    ("make", "package", "command"),
    [
        (make_tfds, "tensorflow_datasets", 'pip install "tensorflow-datasets" "array-record"'),
        (
            lambda root: make_tfds(root, "array_record"),
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


def test_of_several_versions_the_newest_is_read(tmp_path):
    for version in ("2.0.1", "2.1.0", "2.0.0"):
        make_tfds(tmp_path / "found" / "cars196" / version)
    assert load(tmp_path / "found", tmp_path).source["directory"].endswith("cars196/2.1.0")


def test_tfrecords_are_read_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert len(load(make_tfds(tmp_path / "found"), tmp_path).train) == 4


def test_parquet_without_class_names_calls_them_by_number(tmp_path):
    dataset = load(make_parquet(tmp_path / "found", names=None), tmp_path)
    assert dataset.class_names == ("0", "1", "2")
    assert any("called by number" in note for note in dataset.source["notes"])


# Boxes beside folders by class


def no_annotation_for_a_picture(root):
    Image.new("L", (50, 50)).save(root / "test" / folder_name(0) / "09999.png")


def numbered_anew(root):
    (root / "train" / folder_name(2) / "00002.png").rename(root / "train" / folder_name(2) / "00004.png.png")
    (root / "train" / folder_name(0) / "00004.png").rename(root / "train" / folder_name(0) / "00002.png")
    (root / "train" / folder_name(2) / "00004.png.png").rename(root / "train" / folder_name(2) / "00004.png")


def no_test_annotations(root):
    (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_annotation_for_a_picture, "1 of 4 test pictures are not in it: test/Audi R8 Coupe 2012/09999.png"),
        (numbered_anew, "00002.png in class 'smart fortwo Convertible 2012'"),
        (no_test_annotations, "expected cars_meta.mat and annotations of both train and test"),
    ],
)
def test_a_devkit_that_does_not_fit_is_not_used(tmp_path, change, reason):
    root = make_by_class(tmp_path / "found", cut=whole)
    make_devkit(root / "devkit")
    change(root)
    dataset = load(root, tmp_path)
    assert dataset.source["boxes"] is False
    assert any("boxes are not used" in note and reason in note for note in dataset.source["notes"])


@pytest.mark.parametrize("skip_bad", [False, True])
def test_boxes_outside_their_pictures_are_an_error(tmp_path, skip_bad):
    """Crops beside the devkit of the photographs: cutting them again would give anything but the car."""
    root = make_by_class(tmp_path / "found")
    make_devkit(root / "devkit")
    message = "7 of 7 pictures .* do not contain their box.*box x 5 to 24, y 3 to 22 in a picture of 20x20.*devkit"
    with pytest.raises(DataError, match=message):
        load(root, tmp_path, skip_bad=skip_bad)
    assert len(load(root, tmp_path, margin=None).train) == 4


# Pictures that cannot be read


def truncated_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-2000])


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncated_jpeg,
    "not a picture": lambda path: path.write_text("<html>"),
    "No such file": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_a_bad_picture_is_named_and_skipped_only_when_told(tmp_path, reason, capsys):
    root = make_by_class(tmp_path / "found")
    name = f"train/{folder_name(0)}/00001.png"
    SPOILT[reason](root / name)
    with pytest.raises(DataError, match=rf"1 of 7 pictures .*{re.escape(name)} \(.*{reason}.*--skip-bad"):
        load(root, tmp_path)
    for _ in range(2):  # decoded, and from the cache
        dataset = load(root, tmp_path, skip_bad=True)
        assert dataset.train.labels.tolist() == [0, 1, 2]
        assert dataset.source["skipped"] == [name]
        assert dataset.source["train"] == 3
        assert f"warning: 1 pictures that cannot be read are left out: {name}" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 7 pictures"):
        load(root, tmp_path)


def test_all_bad_pictures_are_counted_and_ten_named(tmp_path):
    root = make_by_class(tmp_path / "found")
    for number in range(15):
        (root / "test" / folder_name(2) / f"bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"15 of 22 pictures .*bad00\.jpg.*bad09\.jpg \([^)]*\), …") as raised:
        load(root, tmp_path)
    assert "bad10" not in str(raised.value)


def test_nothing_left_is_an_error(tmp_path):
    root = make_by_class(tmp_path / "found")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no test pictures are left of 3"):
        load(root, tmp_path, skip_bad=True)


def test_a_picture_that_could_not_be_read_is_tried_again(tmp_path):
    """A network folder that was gone for a moment must not leave its mark in the cache."""
    root = make_by_class(tmp_path / "found")
    path = root / "train" / folder_name(0) / "00001.png"
    (tmp_path / "kept.png").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "later.png")
    assert len(load(root, tmp_path, skip_bad=True).train) == 3
    dataset = load(root, tmp_path, skip_bad=True)
    assert any("could not be read when it was made" in note for note in dataset.source["notes"])


def test_a_bad_picture_in_a_packed_file_is_named(tmp_path):
    bad = [{"image": {"bytes": b"", "path": "a"}, "label": 0}, {"image": {"bytes": None, "path": "b"}, "label": 1}]
    parquet_with(*bad)(tmp_path / "found")
    with pytest.raises(DataError, match=r"2 of 7 .*train-00000-of-00002.parquet row 0 \(the file is empty\), .*row 1"):
        load(tmp_path / "found", tmp_path)


# The cache


def entries(tmp_path):
    return list((tmp_path / "cache").iterdir())


def test_the_second_start_decodes_nothing(tmp_path, monkeypatch):
    root = make_by_class(tmp_path / "found")
    first = load(root, tmp_path)
    monkeypatch.setattr(stanford_cars, "decode_many", None)
    second = load(root, tmp_path)
    assert isinstance(second.train.images, np.memmap)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert first.source == second.source


def touched(root):
    path = root / "cars_train" / "00001.png"
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(path)


def replaced_by_one_of_the_same_size(root):
    os.utime(root / "cars_test" / "00001.png", (1, 1))


def moved_box(root):
    make_devkit(root / "devkit", bbox_x1=6)


def other_label(root):
    save_annotations(root / "devkit/cars_train_annos.mat", [row | {"class": 1} for row in annotations_of("train")])


def other_class_names(root):
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["a", "b", "c"], object)})


@pytest.mark.parametrize(
    "change", [touched, replaced_by_one_of_the_same_size, moved_box, other_label, other_class_names]
)
def test_a_changed_folder_is_decoded_again(tmp_path, change):
    root = make_original(tmp_path / "found")
    load(root, tmp_path)
    change(root)
    load(root, tmp_path)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("options", [{"image_size": (20, 21)}, {"grey": True}, {"margin": 1}, {"margin": None}])
def test_other_settings_are_another_entry(tmp_path, options):
    root = make_original(tmp_path / "found")
    load(root, tmp_path)
    load(root, tmp_path, **options)
    assert len(entries(tmp_path)) == 2


def test_without_boxes_the_margin_does_not_matter(tmp_path):
    root = make_by_class(tmp_path / "found")
    load(root, tmp_path)
    load(root, tmp_path, margin=7)
    assert len(entries(tmp_path)) == 1


def test_the_entry_says_what_it_is(tmp_path):
    root = make_by_class(tmp_path / "found")
    load(root, tmp_path)
    description = json.loads((entries(tmp_path)[0] / "entry.json").read_text())
    assert description["facts"]["directory"] == str(root)
    assert description["arrays"]["train-images"]["shape"] == [4, 20, 20, 3]


@pytest.mark.parametrize(("missing", "cached"), [(0, True), (1, False)])
def test_the_space_needed_is_known_beforehand(tmp_path, monkeypatch, missing, cached):
    free = 7 * 20 * 20 * 3 - missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert bool(load(make_by_class(tmp_path / "found"), tmp_path).source["cache"]) == cached


def test_no_place_for_the_cache_is_a_warning(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    dataset = load(make_by_class(tmp_path / "found"), tmp_path)
    assert len(dataset.train) == 4
    assert dataset.source["cache"] is None
    assert "warning: no cache, so the pictures are held in memory" in capsys.readouterr().err


# Titles and arguments


@pytest.mark.parametrize(
    ("classes", "found", "decoded", "title"),
    [
        (196, (8144, 8041), (8144, 8041), "Stanford Cars"),
        (196, (8144, 8041), (8143, 8041), "Stanford Cars (16,184 of 16,185 pictures)"),
        (196, (6515, 8041), (6515, 8041), "Stanford Cars (14,556 of 16,185 pictures)"),
        (196, (8145, 8041), (8144, 8041), "pictures in my cars"),
        (195, (8144, 8041), (8144, 8041), "pictures in my cars"),
    ],
)
def test_only_the_whole_set_has_its_name(tmp_path, classes, found, decoded, title):
    names = tuple(map(str, range(classes)))
    counts = dict(zip(LABELS, found, strict=True))
    folder = stanford_cars.PictureFolder("by class", tmp_path / "my cars", names, counts, False, {}, (), None)
    assert stanford_cars.title_of(folder, dict(zip(LABELS, decoded, strict=True))) == title


@pytest.mark.parametrize("options", [{"image_size": (0, 9)}, {"image_size": (9,)}, {"margin": -1}])
def test_settings_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"image_size must be|margin must be"):
        load(tmp_path, tmp_path, **options)


# The real data


def test_the_real_devkit(devkit_dir):
    names = folders.read_class_names(devkit_dir / "cars_meta.mat")
    assert len(names) == 196
    assert names[0] == "AM General Hummer SUV 2000"
    for split, file_name, count in (
        ("train", "cars_train_annos.mat", 8144),
        ("test", "cars_test_annos_withlabels.mat", 8041),
    ):
        annotations = folders.read_annotations(devkit_dir / file_name, 196)
        assert len(annotations) == count, split
        assert {annotation.label for annotation in annotations.values()} == set(range(196))
    assert annotations["00001.jpg"] == ((30, 52, 246, 147, False), 180)
    unlabelled = folders.read_annotations(devkit_dir / "cars_test_annos.mat", 196)
    assert {name: row.box for name, row in unlabelled.items()} == {name: row.box for name, row in annotations.items()}
    assert {row.label for row in unlabelled.values()} == {None}


def test_the_real_cars_agree_with_the_real_devkit(stanford_cars_dir, devkit_dir, tmp_path):
    """By class: file names and class names are the devkit's, so beside it its boxes would be used (and refused)."""
    (tmp_path / "found").mkdir()
    for name in ("train", "test"):
        (tmp_path / "found" / name).symlink_to(stanford_cars_dir / name)
    (tmp_path / "found" / "devkit").symlink_to(devkit_dir)
    folder = stanford_cars.find_pictures(tmp_path / "found")
    assert folder.boxes
    assert folder.notes == ()
    assert stanford_cars.title_of(folder, folder.counts) == "Stanford Cars"
    assert len(folder.class_names) == 196


@pytest.mark.slow
def test_the_whole_set_is_decoded_once(stanford_cars_dir, tmp_path, monkeypatch):
    first = load(stanford_cars_dir, tmp_path, image_size=(32, 32), grey=True)
    monkeypatch.setattr(stanford_cars, "decode_many", None)  # the second time nothing is decoded
    second = load(stanford_cars_dir, tmp_path, image_size=(32, 32), grey=True)
    assert second.title == "Stanford Cars"
    assert (len(second.train), len(second.test), second.source["notes"]) == (8144, 8041, [])
    np.testing.assert_array_equal(first.test.images[::100], second.test.images[::100])
