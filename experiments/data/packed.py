"""Pictures packed into a few large files: a data set that TFDS prepared, and Hugging Face's parquet files."""

from __future__ import annotations

import functools
import importlib
import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.data.dataset import DataError
from experiments.data.pictures import SPLITS, Box, Picture, PictureFolder

PARQUET_PATTERNS = ("*{split}*.parquet", "data/*{split}*.parquet", "{split}/*.parquet", "default/{split}/*.parquet")


def tfds(root: Path, name: str = "cars196", boxes: bool = True) -> PictureFolder | None:
    """Reads a folder that TFDS prepared (cars196/2.1.0/), or returns None where there is no dataset_info.json.

    Both of TFDS's file formats are read without TensorFlow.

    Args:
      root: the folder.
      name: of the data set that must be in it.
      boxes: whether its pictures have boxes.

    Raises:
      DataError: another data set than that, tensorflow_datasets missing, or files missing or damaged.
    """
    if not (root / "dataset_info.json").is_file() or not (root / "features.json").is_file():
        return None
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"{root} was prepared by TFDS, and reading it needs a package that is missing ({error}): "
            'pip install "tensorflow-datasets" "array-record"'
        ) from error
    try:
        builder = tensorflow_datasets.builder_from_directory(str(root))
        features, splits = builder.info.features, builder.info.splits
    except Exception as error:  # TFDS passes on what its parsers raise
        raise DataError(f"{root} cannot be read as a TFDS data set ({error})") from error
    expected = {"image", "label"} | ({"bbox"} if boxes else set())
    if builder.name != name or not expected <= set(features):
        raise DataError(
            f"{root} holds the TFDS data set {builder.name!r} with {sorted(features)}: "
            f"expected {name!r} with {sorted(expected)}"
        )
    file_format = builder.info.file_format.value
    if file_format not in ("tfrecord", "array_record"):
        raise DataError(f"{root} is in TFDS's format {file_format}: expected tfrecord or array_record")
    if file_format == "array_record":
        try:
            importlib.import_module("array_record.python.array_record_module")  # TFDS imports it at the first picture
        except ImportError as error:
            raise DataError(f'{root} needs a package that is missing ({error}): pip install "array-record"') from error
    if absent := [split for split in SPLITS if split not in splits]:
        raise DataError(f"{root} has no split {absent[0]!r} but {sorted(splits)}: prepare the data set again")
    files = {split: [Path(path) for path in splits[split].filepaths] for split in SPLITS}
    require_files(files["train"] + files["test"])
    class_names = tuple(features["label"].names)
    skip_decoding = {"image": tensorflow_datasets.decode.SkipDecoding()}

    def tfrecord_pictures(split: str) -> Iterator[Picture]:
        number = -1
        try:
            for number, record in enumerate(record for path in files[split] for record in tfrecords(path)):
                example = features.deserialize_example_np(record, decoders=skip_decoding)
                yield picture_of(example, split, number, class_names, boxes, root)
        except DataError:
            raise
        except Exception as error:  # protobuf raises types of its own
            raise DataError(f"{root} is damaged after {number + 1:,} {split} pictures ({error})") from error
        if number + 1 != splits[split].num_examples:
            raise DataError(
                f"{root} holds {number + 1:,} {split} pictures, its dataset_info.json says "
                f"{splits[split].num_examples:,}: prepare the data set again"
            )

    def array_record_pictures(split: str) -> Sequence[Picture]:
        return ArrayRecords(root, split, class_names, boxes, splits[split].num_examples)

    return PictureFolder(
        layout=f"TFDS {name} ({file_format})",
        directory=root,
        class_names=class_names,
        counts={split: splits[split].num_examples for split in SPLITS},
        boxes=boxes,
        identity=identity(files),
        notes=(),
        pictures=tfrecord_pictures if file_format == "tfrecord" else array_record_pictures,
    )


class ArrayRecords(Sequence[Picture]):
    """The pictures of a split in TFDS's format array_record, each read from the file when it is asked for.

    May be read by several threads at once. Pickled it is the folder's name: another process opens the files anew.
    """

    def __init__(self, root: Path, split: str, class_names: tuple[str, ...], boxes: bool, count: int) -> None:
        self.root, self.split, self.class_names, self.boxes, self.count = root, split, class_names, boxes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Picture:
        """Reads a record.

        Raises:
          DataError: the file is damaged, or has fewer records.
        """
        if not 0 <= number < self.count:
            raise IndexError(number)
        try:
            return picture_of(self._source[number], self.split, number, self.class_names, self.boxes, self.root)
        except DataError:
            raise
        except Exception as error:  # array_record and protobuf raise types of their own
            raise DataError(f"{self.root} is damaged after {number:,} {self.split} pictures ({error})") from error

    @functools.cached_property
    def _source(self) -> Sequence[dict[str, Any]]:
        import tensorflow_datasets

        builder = tensorflow_datasets.builder_from_directory(str(self.root))
        return builder.as_data_source(self.split, decoders={"image": tensorflow_datasets.decode.SkipDecoding()})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}


def picture_of(
    example: dict[str, Any], split: str, number: int, class_names: tuple[str, ...], boxes: bool, root: Path
) -> Picture:
    """The picture in TFDS's example of a number in its split.

    Raises:
      DataError: its label is none of the classes'.
    """
    name = f"{split} {example['id'].decode() if 'id' in example else number}"
    label = checked_label(int(example["label"]), class_names, f"{name} of {root}")
    if not boxes:
        return Picture(name, label, None, example["image"])
    ymin, xmin, ymax, xmax = (float(edge) for edge in example["bbox"])
    return Picture(name, label, Box(xmin, ymin, xmax, ymax, relative=True), example["image"])


def tfrecords(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4), and so on.

    The checksums are not computed: a damaged picture shows when it is decoded.

    Raises:
      DataError: the file ends inside a record.
    """
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else None
            if length is None or length > path.stat().st_size:
                raise DataError(f"{path} is truncated or damaged at byte {file.tell():,}: prepare the data set again")
            record, checksum = file.read(length), file.read(4)
            if len(checksum) < 4:
                raise DataError(f"{path} ends inside a record: prepare the data set again")
            yield record


def parquet(root: Path) -> PictureFolder | None:
    """Reads Hugging Face's parquet files, or returns None where there are none for train or test.

    Class names are those of the files' metadata, else of the README.md beside them, else the numbers themselves.

    Raises:
      DataError: pyarrow missing, one of the splits or some of its files missing, or columns missing.
    """
    files = {split: parquet_files(root, split) for split in SPLITS}
    if not any(files.values()):
        return None
    if absent := [split for split in SPLITS if not files[split]]:
        raise DataError(f"{root} has parquet files but none of the split {absent[0]!r}: expected *{absent[0]}*.parquet")
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{root} has parquet files, and reading them needs a package that is missing ({error}): "
            'pip install "pyarrow"'
        ) from error
    counts, highest = dict.fromkeys(SPLITS, 0), 0
    for split in SPLITS:
        for path in files[split]:
            try:
                opened = pyarrow.parquet.ParquetFile(path)
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(
                    f"{path} cannot be read as parquet ({error}): download it again (a file of a few hundred bytes "
                    "is only a pointer of git-lfs: run git lfs pull)"
                ) from error
            with opened:
                if absent := [name for name in ("image", "label") if name not in opened.schema_arrow.names]:
                    raise DataError(
                        f"{path} has no column {absent[0]!r} but {opened.schema_arrow.names}: expected image and label"
                    )
                counts[split] += opened.metadata.num_rows
                image = opened.schema_arrow.field("image").type
                if pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0:
                    image = image.field("bytes").type
                if not pyarrow.types.is_binary(image) and not pyarrow.types.is_large_binary(image):
                    raise DataError(f"{path}: column 'image' must hold the bytes of pictures, got {image}")
                labels = opened.read(["label"]).column("label")
                if labels.null_count or not pyarrow.types.is_integer(labels.type):
                    raise DataError(f"{path}: column 'label' must be whole numbers without gaps, got {labels.type}")
                highest = max(highest, pyarrow.compute.max(labels).as_py() or 0)
                schema = opened.schema_arrow
    class_names = names_in_metadata(schema.metadata or {}) or names_in_readme(root)
    notes = []
    if not class_names:
        class_names = tuple(str(label) for label in range(highest + 1))
        notes.append(f"neither the parquet files nor a README.md in {root} name the classes: they are called by number")

    def pictures(split: str) -> Iterator[Picture]:
        for path in files[split]:
            row = -1
            try:
                with pyarrow.parquet.ParquetFile(path) as opened:
                    for batch in opened.iter_batches(batch_size=64, columns=["image", "label"]):
                        for example in batch.to_pylist():
                            row += 1
                            image = example["image"]
                            data = image.get("bytes") if isinstance(image, dict) else image
                            name = f"{path.relative_to(root).as_posix()} row {row}"
                            yield Picture(name, checked_label(example["label"], class_names, name), None, data or b"")
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{path} is damaged after {row + 1:,} rows ({error}): download it again") from error

    return PictureFolder(
        layout="Hugging Face parquet",
        directory=root,
        class_names=class_names,
        counts=counts,
        boxes=False,
        identity=identity(files),
        notes=tuple(notes),
        pictures=pictures,
    )


def parquet_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, sorted; [] if there are none.

    Raises:
      DataError: the names say that there are more (train-00000-of-00002.parquet) than are there.
    """
    found = (
        sorted(path for path in root.glob(pattern.format(split=split)) if path.is_file())  # opening a pipe would wait
        for pattern in PARQUET_PATTERNS
    )
    files = next((paths for paths in found if paths), [])
    numbered = [match for path in files if (match := re.search(r"-(\d{5})-of-(\d{5})", path.name))]
    if numbered:
        total = int(numbered[0][2])
        if missing := sorted(set(range(total)) - {int(match[1]) for match in numbered}):
            raise DataError(
                f"{root} has {len(numbered)} of {total} parquet files of {split}: number {missing[0]} is missing, "
                "download it"
            )
    return files


def names_in_metadata(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Class names from what the `datasets` library wrote into a parquet file's schema, or ()."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def names_in_readme(root: Path) -> tuple[str, ...]:
    """Class names from the dataset_info of a Hugging Face README.md in the folder or the one above data/, or ().

    Reads lines like `'0': AM General Hummer SUV 2000` below `class_label:` and `names:`.
    """
    for path in (root / "README.md", root.parent / "README.md"):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            listed = re.search(r"class_label:\s*\n\s*names:\s*\n((?:\s+['\"]?\d+['\"]?:.*\n)+)", text)
            if listed:
                lines = re.findall(r"^\s+['\"]?(\d+)['\"]?:\s*(.*?)\s*$", listed[1], re.MULTILINE)
                names = {int(number): name.strip("'\"") for number, name in lines}
                if sorted(names) == list(range(len(names))):
                    return tuple(names[number] for number in range(len(names)))
    return ()


def checked_label(label: int, class_names: tuple[str, ...], name: str) -> int:
    if not 0 <= label < len(class_names):
        raise DataError(f"{name} has the label {label}: expected 0 to {len(class_names) - 1}")
    return label


def require_files(paths: list[Path]) -> None:
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"{len(missing)} of {len(paths)} files of {missing[0].parent} are missing, first {missing[0].name}: "
            "prepare the data set again"
        )


def identity(files: dict[str, list[Path]]) -> dict[str, Any]:
    """Name, size and modification time of every file."""
    return {
        split: [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for split, paths in files.items()
    }
