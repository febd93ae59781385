"""Hugging Face's parquet files, with the columns image and label."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path

from experiments.data.dataset import SPLITS, DataError
from experiments.data.layouts.files import PictureFolder, identity
from experiments.data.layouts.names import choose_splits, first_few, is_leftover, splits_in
from experiments.data.pictures import Picture, printable

PLACES = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
PART = re.compile(r"-(\d{5})-of-(\d{5})")
NUMBERED = re.compile(r"(.*?)[-_.]?(\d+)\.parquet")  # train_0.parquet, train-part-0.parquet
COPY = re.compile(r"( \(\d+\)| ?- ?copy.*| copy.*)\.parquet$", re.I)  # what browsers and desktops call a second one


def parquet(root: Path) -> PictureFolder | None:
    """Reads the files, or returns None where no file's name, with its folder's, claims a split.

    Class names are those of the files' metadata, else of the README.md beside them, else the numbers themselves.

    Raises:
      DataError: pyarrow missing, one of the splits or some of its files missing, or columns missing.
    """
    files, notes = find_files(root)
    if not any(files.values()):
        return None
    if absent := [split for split in SPLITS if not files[split]]:
        raise DataError(f"{root} has parquet files but none of the split {absent[0]!r}: expected *{absent[0]}*.parquet")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{root} has parquet files, and reading them needs a package that is missing ({error}): "
            'pip install "pyarrow"'
        ) from error
    counts, highest, class_names = dict.fromkeys(SPLITS, 0), 0, ()
    for split in SPLITS:
        for path in files[split]:
            rows, highest_in_file, named = check_file(path)
            counts[split] += rows
            highest = max(highest, highest_in_file)
            if class_names and named and named != class_names:
                raise DataError(f"{path} names other classes than the files before it: are these of one data set?")
            class_names = named or class_names
    class_names = class_names or names_in_readme(root)
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
                            image, label = example["image"], example["label"]
                            name = f"{path.relative_to(root).as_posix()} row {row}"
                            if not 0 <= label < len(class_names):
                                raise DataError(f"{name} has the label {label}: expected 0 to {len(class_names) - 1}")
                            data = image.get("bytes") if isinstance(image, dict) else image
                            yield Picture(name, label, None, data or b"")
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{path} is damaged after {row + 1:,} rows ({error}): download it again") from error

    return PictureFolder(
        layout="Hugging Face parquet",
        directory=root,
        class_names=tuple(map(printable, class_names)),
        counts=counts,
        boxes=False,
        identity=identity(files),
        notes=tuple(notes),
        pictures=pictures,
    )


def find_files(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The parquet files of each split, sorted, and notes.

    Raises:
      DataError: a file claims two splits, a split's files lie in several folders or are there twice, or the names say
        that there are more (train-00000-of-00002.parquet) than are there.
    """
    paths = (path for place in PLACES for path in root.glob(place) if path.is_file())  # opening a pipe would wait
    names = []
    for name in sorted(path.relative_to(root).as_posix() for path in paths):
        *folders, file = name.split("/")
        if not any(map(is_leftover, [*folders, file])) and (folders in ([], ["data"]) or splits_in(folders[-1])):
            names.append(name)
    chosen, notes = choose_splits(names, root)
    for split, names in chosen.items():
        parts = [match and match.groups() for match in map(PART.search, names)]
        if any(parts):
            one_set = None not in parts and len({total for _, total in parts}) == 1
        else:
            one_set = is_one_set(names)
        if len({name.rpartition("/")[0] for name in names}) > 1 or not one_set:
            raise DataError(f"{root} has more than one set of parquet files of {split}, {first_few(names)}: leave one")
        numbers = collections.Counter(int(part[0]) for part in parts if part)
        if twice := [number for number, times in numbers.items() if times > 1]:
            raise DataError(f"{root} has number {twice[0]} of the parquet files of {split} twice: remove one")
        total = int(parts[0][1]) if numbers else 0
        if missing := sorted(set(range(total)) - set(numbers)):
            raise DataError(
                f"{root} has {len(numbers)} of {total} parquet files of {split}: number {missing[0]} is missing, "
                "download it"
            )
    return {split: [root / name for name in names] for split, names in chosen.items()}, notes


def is_one_set(names: list[str]) -> bool:
    """Whether files of one split without "-of-" add up: one, numbered ones, or any but copies in the split's folder."""
    if len(names) < 2:
        return True
    if splits_in(names[0].rpartition("/")[0].rpartition("/")[2]):
        return not any(map(COPY.search, names))
    numbered = [match and match.groups() for match in map(NUMBERED.fullmatch, names)]
    if None in numbered or len({stem for stem, _ in numbered}) > 1:
        return False
    return len({int(number) for _, number in numbered}) == len(names)


def check_file(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Number of rows, highest label and class names (or none) of a file.

    Raises:
      DataError: it cannot be read, or its columns are not pictures and labels.
    """
    import pyarrow.compute
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as parquet ({error}): download it again (a file of a few hundred bytes "
            "is only a pointer of git-lfs: run git lfs pull)"
        ) from error
    with opened:
        schema = opened.schema_arrow
        if absent := [name for name in ("image", "label") if name not in schema.names]:
            raise DataError(f"{path} has no column {absent[0]!r} but {schema.names}: expected image and label")
        image = schema.field("image").type
        if pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if not pyarrow.types.is_binary(image) and not pyarrow.types.is_large_binary(image):
            raise DataError(f"{path}: column 'image' must hold the bytes of pictures, got {image}")
        labels = opened.read(["label"]).column("label")
        if labels.null_count or not pyarrow.types.is_integer(labels.type):
            raise DataError(f"{path}: column 'label' must be whole numbers without gaps, got {labels.type}")
        highest = pyarrow.compute.max(labels).as_py() or 0
        return opened.metadata.num_rows, highest, names_in_metadata(schema.metadata or {})


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
