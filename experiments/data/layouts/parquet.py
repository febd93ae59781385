"""Reads Hugging Face's parquet files, with the columns image and label."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path

from experiments.data.dataset import SPLITS, DataError
from experiments.data.layouts.files import PictureFolder, identity
from experiments.data.layouts.names import choose_splits, first_few, is_leftover, missing_package, splits_in
from experiments.data.pictures import Picture, printable

PLACES = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
NUMBERED = re.compile(r"(.*?)[-_.]?(\d+)(?:-of-(\d{5}).*)?\.parquet")  # train_0.parquet, train-00000-of-00002.parquet
COPY = re.compile(r"( \(\d+\)| ?- ?copy.*| copy.*)\.parquet$", re.I)  # names of second downloads and copies


def parquet(root: Path) -> PictureFolder | None:
    """Reads the files, or returns None if the names of files and their folders refer to no split.

    Class names come from the files' metadata or else from the README.md beside them. Otherwise they are the numbers.

    Raises:
      DataError: a file is missing, damaged, or of another data set, or pyarrow is not installed.
    """
    files, notes = find_files(root)
    if not any(files.values()):
        return None
    if absent := [split for split in SPLITS if not files[split]]:
        raise DataError(f"{root} has parquet files but none of the split {absent[0]!r}: expected *{absent[0]}*.parquet")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(missing_package(f"{root} has parquet files, and reading them", error, "pyarrow")) from error
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
    """The parquet files of each split, sorted, and notes."""
    paths = (path for place in PLACES for path in root.glob(place) if path.is_file())  # opening a pipe blocks
    names = []
    for name in sorted(path.relative_to(root).as_posix() for path in paths):
        *folders, file = name.split("/")
        if not any(map(is_leftover, [*folders, file])) and (folders in ([], ["data"]) or splits_in(folders[-1])):
            names.append(name)
    chosen, notes = choose_splits(names, root)
    for split, names in chosen.items():
        refuse_several_sets(root, split, names)
    return {split: [root / name for name in names] for split, names in chosen.items()}, notes


def refuse_several_sets(root: Path, split: str, names: list[str]) -> None:
    """Raises a DataError unless a split is one file, one complete numbered series, or the files of its own folder."""
    parts = [NUMBERED.fullmatch(name) for name in names]
    kinds = {part and part.group(1, 3) for part in parts}  # folder and name, and the declared number of files
    totals = {part[3] for part in parts if part and part[3]}
    folders = {name.rpartition("/")[0] for name in names}
    in_own_folder = len(folders) == 1 and splits_in(min(folders).rpartition("/")[2]) and not totals
    add_up = not any(map(COPY.search, names)) if in_own_folder else len(kinds) == 1 and None not in kinds
    if len(names) > 1 and not add_up:
        raise DataError(f"{root} has several sets of parquet files for {split} ({first_few(names)}): keep only one")
    if in_own_folder:
        return
    numbers = collections.Counter(int(part[2]) for part in parts if part)
    if twice := [number for number, times in numbers.items() if times > 1]:
        raise DataError(f"{root} has number {twice[0]} of the parquet files for {split} twice: remove one")
    total = int(max(totals, default=0))
    if missing := sorted(set(range(total)) - set(numbers)):
        found = f"{len(numbers)} of {total} parquet files for {split}"
        raise DataError(f"{root} has {found}: number {missing[0]} is missing, download it")


def check_file(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Number of rows, highest label and class names (maybe none) of a file; raises a DataError for other files."""
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
            raise DataError(f"{path}: column 'label' must be whole numbers without missing values, got {labels.type}")
        highest = pyarrow.compute.max(labels).as_py() or 0
        return opened.metadata.num_rows, highest, names_in_metadata(schema.metadata or {})


def names_in_metadata(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Class names from the metadata that the `datasets` library writes into a parquet file's schema, or ()."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def names_in_readme(root: Path) -> tuple[str, ...]:
    """Class names from the dataset_info of a Hugging Face README.md in the folder or the one above data/, or ().

    Reads lines like `'0': AM General Hummer SUV 2000` below `class_label:` and `names:`.
    """
    for path in filter(Path.is_file, (root / "README.md", root.parent / "README.md")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if listed := re.search(r"class_label:\s*\n\s*names:\s*\n((?:\s+['\"]?\d+['\"]?:.*\n)+)", text):
            lines = re.findall(r"^\s+['\"]?(\d+)['\"]?:\s*(.*?)\s*$", listed[1], re.MULTILINE)
            names = sorted((int(number), name.strip("'\"")) for number, name in lines)
            if [number for number, _ in names] == list(range(len(names))):
                return tuple(name for _, name in names)
    return ()
