"""The reader's sizes, boxes, bad pictures, cache and titles; which folders it reads is in test_layouts.py."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from picture_folders import (
    HEIGHT,
    HUGGINGFACE,
    LABELS,
    WIDTH,
    annotations_of,
    crop,
    folder_name,
    load,
    make_by_class,
    make_devkit,
    make_original,
    make_parquet,
    make_with_devkit,
    photographs,
    save_annotations,
    write_parquet,
)
from PIL import Image

from experiments.data import pictures, stanford_cars
from experiments.data.dataset import DataError


@pytest.mark.parametrize(("margin", "size"), [(0, (20, 20)), (2, (24, 24)), (16, (30, 40)), (None, (30, 40))])
def test_the_margin_widens_the_boxes(tmp_path, margin, size):
    """The box's 20x20 pixels are unchanged if the result has the size of the widened box."""
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
    for name in (".hidden.png", "notes.txt"):
        (directory / name).write_text("no picture")
    dataset = load(root, tmp_path)
    assert len(dataset.train) == 8
    (note,) = [note for note in dataset.source["notes"] if "not a picture" in note]
    assert note.startswith("1 entry of")
    assert note.endswith(f"{directory.name}/notes.txt; left out")


# Boxes and pictures that are not as they should be


@pytest.mark.parametrize("skip_bad", [False, True])
def test_boxes_outside_most_pictures_are_an_error(tmp_path, skip_bad):
    """Crops lie beside the devkit of the photographs: cutting them again would miss the cars."""
    root = make_with_devkit(tmp_path / "found", cut=crop)
    message = "7 of 7 pictures .* do not contain their box.*box x 5 to 24, y 3 to 22 in a picture of 20x20.*devkit"
    with pytest.raises(DataError, match=message):
        load(root, tmp_path, skip_bad=skip_bad)
    assert len(load(root, tmp_path, margin=None).train) == 4


def with_a_box(root, **edges):
    make_original(root)
    rows = annotations_of("train")
    rows[1] |= edges
    save_annotations(root / "devkit/cars_train_annos.mat", rows)
    return root


@pytest.mark.parametrize("edges", [{"bbox_x2": WIDTH + 1}, {"bbox_x1": 0}, {"bbox_y1": 0, "bbox_y2": HEIGHT + 1}])
def test_a_box_a_pixel_outside_is_clipped_and_told(tmp_path, edges):
    within = {name: min(max(edge, 1), WIDTH if "x" in name else HEIGHT) for name, edge in edges.items()}
    dataset, expected = (
        load(with_a_box(tmp_path / str(number), **boxes), tmp_path).train.images
        for number, boxes in enumerate((edges, within))
    )
    np.testing.assert_array_equal(dataset, expected)
    notes = load(tmp_path / "0", tmp_path).source["notes"]  # now from the cache
    assert "1 box reaches a pixel beyond its picture, clipped: cars_train/00002.png" in notes


def test_a_box_far_outside_is_named_and_skipped_only_when_told(tmp_path):
    root = with_a_box(tmp_path / "found", bbox_x2=WIDTH + 2)
    with pytest.raises(DataError, match=r"1 of 7 .* cannot be used: cars_train/00002.png \(box x 5 to 42.*--skip-bad"):
        load(root, tmp_path)
    assert load(root, tmp_path, skip_bad=True).source["skipped"] == ["cars_train/00002.png"]


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
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
        assert f"warning: 1 picture that cannot be used is left out: {name}" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 7 pictures"):
        load(root, tmp_path)


@pytest.mark.parametrize(
    ("values", "dtype", "suffix", "expected", "white"),
    [
        ((100, 4000), np.uint16, "png", (100 >> 4, 4000 >> 4), 4095),
        ((100, 255), np.int32, "tif", (100, 255), 255),
        ((300, 60_000), np.int32, "tif", (300 >> 8, 60_000 >> 8), 65535),
        ((0.25, 1.0), np.float32, "tif", (64, 255), 1),
        ((0.25, 200.0), np.float32, "tif", (0, 200), 255),
        ((0.25, 1.002), np.float32, "tif", (64, 255), 1),
        ((0, 1), np.int32, "tif", (0, 255), 1),
    ],
)
def test_what_is_white_follows_from_the_whole_set_and_is_told(tmp_path, values, dtype, suffix, expected, white):
    """In pictures of more than 8 bits, the highest value in the whole set decides what is white."""
    root = make_by_class(tmp_path / "found")
    for number, value in enumerate(values):
        pixels = Image.fromarray(np.full((9, 9), value, dtype))
        pixels.save(root / "train" / folder_name(0) / f"deep{number}.{suffix}")
    dataset = load(root, tmp_path, image_size=(2, 2))
    found = {
        name: dataset.train.images[number].ravel()[0]
        for number, name in enumerate(dataset.train.names)
        if "deep" in name
    }
    assert tuple(found.values()) == expected
    assert list(dataset.source["white"].values()) == [white]
    (note,) = [note for note in dataset.source["notes"] if "as white" in note]
    assert note.startswith("2 pictures hold ")
    clipped = " and above" if values[1] > white else ""
    assert note.endswith(f" up to {values[1]:,}: {white:,}{clipped} is taken as white")


def test_pictures_that_are_to_be_turned_are_told(tmp_path):
    root, exif = make_by_class(tmp_path / "found"), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 9)).save(root / "test" / folder_name(1) / "9.jpg", exif=exif)
    notes = load(root, tmp_path).source["notes"]
    name = f"test/{folder_name(1)}/9.jpg"
    assert f"1 picture needs turning according to EXIF; used as stored: {name}" in notes


def test_all_bad_pictures_are_counted_and_ten_named(tmp_path):
    root = make_by_class(tmp_path / "found")
    for number in range(15):
        (root / "test" / folder_name(2) / f"bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"15 of 22 pictures .*bad00\.jpg.*bad09\.jpg \([^)]*\), …") as raised:
        load(root, tmp_path)
    assert "bad10" not in str(raised.value)


def test_a_picture_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    """A network folder that was gone for a moment must not leave its mark in the cache."""
    root = make_by_class(tmp_path / "found")
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_file", refuses("Audi"))
        assert len(load(root, tmp_path, skip_bad=True).train) == 2
    dataset = load(root, tmp_path, skip_bad=True)
    assert len(dataset.train) == 4
    assert any("could not be read when it was made" in note for note in dataset.source["notes"])


def refuses(part):
    def read_file(path):
        if part in str(path):
            raise OSError(5, "Input/output error")
        return path.read_bytes()

    return read_file


def test_a_bad_picture_in_a_packed_file_is_named(tmp_path):
    bad = [{"image": {"bytes": b"", "path": "a"}, "label": 0}, {"image": {"bytes": None, "path": "b"}, "label": 1}]
    write_parquet(make_parquet(tmp_path / "found") / "train-00000-of-00002.parquet", bad, HUGGINGFACE)
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
    (entry,) = entries(tmp_path)
    assert entry.name.rpartition("-")[0] == "stanford-cars"
    facts = json.loads((entry / "entry.json").read_text())["facts"]
    assert facts["directory"] == str(root)


def touched(root):
    path = root / "cars_train" / "00001.png"
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(path)


def replaced_by_one_of_the_same_name_size_and_time(root):
    path = root / "cars_test" / "00001.png"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def moved_box(root):
    make_devkit(root / "devkit", bbox_x1=6)


def other_label(root):
    save_annotations(root / "devkit/cars_train_annos.mat", [row | {"class": 1} for row in annotations_of("train")])


def other_class_names(root):
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["a", "b", "c"], object)})


CHANGES = {  # of the folder, of the settings
    "a picture": (touched, {}),
    "a picture, unseen": (replaced_by_one_of_the_same_name_size_and_time, {}),
    "a box": (moved_box, {}),
    "a label": (other_label, {}),
    "class names": (other_class_names, {}),
    "the size": (None, {"image_size": (20, 21)}),
    "the channels": (None, {"grey": True}),
    "the margin": (None, {"margin": 1}),
    "no margin": (None, {"margin": None}),
}


@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES)
def test_what_makes_another_entry(tmp_path, change, options):
    root = make_original(tmp_path / "found")
    load(root, tmp_path)
    if change is not None:
        change(root)
    channels = load(root, tmp_path, **options).train.images.shape[-1]
    assert channels == (1 if options.get("grey") else 3)
    assert len(entries(tmp_path)) == 2


def test_without_boxes_the_margin_does_not_matter(tmp_path):
    root = make_by_class(tmp_path / "found")
    for margin in (0, 7):
        load(root, tmp_path, margin=margin)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(("missing", "cached"), [(0, True), (1, False)])
def test_the_space_needed_is_known_beforehand(tmp_path, monkeypatch, missing, cached):
    free = 7 * 20 * 20 * 3 - missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert bool(load(make_by_class(tmp_path / "found"), tmp_path).source["cache"]) == cached


def test_no_place_for_the_cache_is_a_warning(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    dataset = load(make_by_class(tmp_path / "found"), tmp_path)
    assert dataset.train.images.shape == (4, 20, 20, 3)
    assert dataset.source["cache"] is None
    assert "warning: nothing is cached, so the next start decodes the pictures again" in capsys.readouterr().err


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
