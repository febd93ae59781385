"""Tiny folders of cars in every layout; all of them hold the same seven pictures."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image
from tfds_folder import feature, image_feature, label_feature, write_tfds

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


def encoded(image, file_format="PNG", **options):
    """A picture, or an array of pixels, as the content of a file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def png_file(side, header, rows):
    """A PNG that Pillow does not write: side x side pixels, with this end of the header and these rows."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = struct.pack(">II", side, side)
    parts = chunk(b"IHDR", size + header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


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


def save_annotations(path, annotations, **more):
    dtype = [(field, object) for field in annotations[0]]
    table = np.array([tuple(annotation.values()) for annotation in annotations], dtype)
    scipy.io.savemat(path, {"annotations": table.reshape(1, -1)} | more)


def make_devkit(directory, test_directory=None, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(directory / "cars_meta.mat", {"class_names": np.array(CLASSES, object).reshape(1, -1)})
    save_annotations(directory / "cars_train_annos.mat", annotations_of("train", **changes))
    save_annotations(
        (test_directory or directory) / "cars_test_annos_withlabels.mat", annotations_of("test", **changes)
    )


def make_with_devkit(root, cut=whole):
    """Cars by class, with the devkit beside train/ and test/."""
    make_devkit(make_by_class(root, cut) / "devkit")
    return root


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
    """The files that TFDS writes; the boxes are relative, as in TFDS's cars196."""
    x1, y1, x2, y2 = BOX
    bbox = [y1 / HEIGHT, x1 / WIDTH, y2 / HEIGHT, x2 / WIDTH]
    examples = {
        split: [
            {"image": encoded(photograph), "label": label, "id": file_name[:5].encode(), "bbox": bbox}
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
    """Two parquet files per split, as on Hugging Face."""
    for split in LABELS:
        rows = [
            {"image": {"bytes": encoded(crop(photograph)), "path": name}, "label": label}
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
