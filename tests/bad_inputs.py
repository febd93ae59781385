"""Bad inputs, and the message that a program prints for each.

    PYTHONPATH=. python tests/bad_inputs.py

writes these cases to docs/bad-input.md, and tests/experiments/test_bad_input.py checks that the programs behave so.
"""

from __future__ import annotations

import shlex
import struct
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from bad_files import (
    BAD,
    NAMES,
    NOISE,
    RunsCode,
    bad_picture,
    cars,
    devkit,
    digits,
    file,
    for_classify,
    foreign_checkpoint,
    foreign_facts,
    idx,
    jpeg_bomb,
    network,
    noisy_digits,
    npz,
    png_bomb,
    pth,
    run_folder,
    safetensors_header,
    shortened,
    sparse_file,
    stopped_run,
    tensor,
    torchscript,
    trained_network,
    whole_model,
    with_metadata,
    without,
    zip_bomb,
)
from folder_changes import Change, a_file, a_folder, a_picture, a_pipe, changed, cut, linked, locked, moved, removed
from picture_folders import encoded
from PIL import Image

from experiments.data.pictures import printable

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"


class Case(NamedTuple):
    """A bad input.

    what: describes the input.
    command: the program of experiments and its arguments, quoted as for a shell; run in its own, empty folder.
    message: the text on stderr after "error: ", with paths relative to that folder; … replaces text that differs
      between machines or comes from another library.
    make: creates the files that the command names in the folder.
    how: "here" runs in this process; "process" in another process with a timeout, since a faulty program would hang;
      "nobody" in a process without root's rights, because root may read and write everything.
    """

    what: str
    command: str
    message: str
    make: Change = lambda folder: None
    how: Literal["here", "process", "nobody"] = "here"


# The cases. A message that ends in a colon is followed by a list.

HINT = (
    "pass --data DIR with the four idx files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte "
    "and t10k-labels-idx1-ubyte, each as it is or as .gz"
)
NO_LAYOUT = "cars is in no known layout;"
LAYOUTS_ARE = "The known layouts:"
LAYOUTS_FOLLOW = "Give a folder with Stanford Cars in one of these layouts:"
IN_CARS = "cars --data cars"
CONVERT = "convert {} out.npz"
IMAGE_SIZE = "--image-size takes one side or HEIGHTxWIDTH, 32 to 4096 each"

COMMAND_LINE = [
    Case("an unknown option", "cars --optimizer adam", "Unrecognized options: --optimizer, adam"),
    Case("an unknown choice", "cars --opt adamax", "invalid choice 'adamax' for argument '--opt'. …"),
    Case("a word for a number", "cars --epochs three", "Error parsing --epochs: invalid literal for int() …: 'three'"),
    Case("an option without its value", "cars --data", "Missing value for argument '--data'. Expected 1 values."),
    Case("no epoch", "cars --epochs 0", "--epochs must be at least 1, got 0"),
    Case("a batch of one", "cars --batch-size 1", "--batch-size must be at least 2, got 1"),
    Case("not a number", "cars --learning-rate nan", "--learning-rate must be positive and finite, got nan"),
    Case("a share above 1", "cars --label-smoothing 1.5", "--label-smoothing must be between 0 and 1, got 1.5"),
    Case("a size that is too small", "cars --image-size 16", f"{IMAGE_SIZE}, got '16'"),
    Case("half a size", "cars --image-size 96x", f"{IMAGE_SIZE}, got '96x'"),
    Case("a negative seed", "cars --seed -1", "--seed must be at least 0, got -1"),
    Case("no pictures to train on", "cars --limit 0", "--limit must be at least 1, got 0"),
    Case("a preset without its data", "cars --preset cars96",
         "--preset cars96 needs pictures: pass --data DIR or set $STANFORD_CARS_DIR. Layouts:"),
    Case("data for a preset that draws its own", "cars --preset demo --data cars",
         "--preset demo draws its own cars: leave --data out, or take --preset cars96 or cars224"),
    Case("a frozen backbone without weights", "cars --freeze backbone",
         "--freeze backbone needs --init FILE: a randomly initialized backbone must be trained"),
    Case("an unknown framework to compare", "cars --compare jax,tensorflow",
         "--compare takes two or more of jax, numpy, torch, torchvision, such as jax,numpy; got jax,tensorflow"),
    Case("a file in place of a folder", "cars --out notes.txt",
         "--out notes.txt cannot be written: notes.txt is a file", file("notes.txt", b"of mine")),
    Case("a folder inside a file", "cars --out notes.txt/run",
         "--out notes.txt/run cannot be written: notes.txt is a file",
         file("notes.txt", b"of mine")),
    Case("an earlier run", "cars --out run",
         "run holds an earlier run: choose another --out, or pass --overwrite or --resume", run_folder()),
    Case("no run to resume", "cars --resume", "--resume needs --out: the folder of the run to resume"),
    Case("both resume and overwrite", "cars --out run --resume --overwrite",
         "--resume continues a run and --overwrite replaces it: choose one"),
    Case("an --ema above 1", "cars --ema 1.5", "--ema must be between 0 and 1, such as 0.999, got 1.5"),
    Case("a batch that cannot be divided", "cars --batch-size 16 --accumulate 3",
         "--batch-size 16 must be a multiple of --accumulate 3"),
    Case("an endless warm-up", "cars --warmup-epochs inf", "--warmup-epochs must not be negative or infinite, got inf"),
    Case("an empty value", "cars --data ''", "--data is empty: name a folder, or leave it out"),
    Case("no device", "cars --devices 0", "--devices is a number or all, got 0"),
    Case("too many epochs", "cars --epochs 1000001", "--epochs must be at most 1,000,000, got 1000001"),
    Case("a broken link in place of a folder", "cars --out run", "--out run cannot be written: it is a broken link",
         linked("run", "nowhere")),
    Case("half an address", "cars --coordinator localhost --out run",
         "--coordinator takes HOST:PORT of process 0, with --process-id and --num-processes, or auto; got localhost"),
    Case("a process ID too large", "cars --coordinator localhost:1234 --process-id 2 --num-processes 2 --out run",
         "--process-id must be from 0 to 1, got 2"),
    Case("devices in words", "cars --devices two", "--devices is a number or all, got two"),
    Case("an option that NumPy does not support", "cars --framework numpy --remat",
         "--remat is for --framework jax, not for numpy"),
    Case("a read-only folder", "cars --out locked/run",
         "--out locked/run cannot be written: locked is read-only", a_folder("locked", mode=0o555),
         how="nobody"),
    Case("more pictures than the data have", "mnist --data digits --limit 21",
         "cannot take 21 of 20 examples: ask for 1 to 20", digits()),
    Case("a batch larger than the data", "mnist --data digits --batch-size 21",
         "--batch-size 21 exceeds the 20 training pictures", digits()),
    Case("an unknown network", "mnist --model resnet19", "invalid choice 'resnet19' for argument '--model'. …"),
    Case("a negative number of classes", "describe --num-classes -1",
         "num_classes must be >= 0 and in_channels >= 1, got -1 and 3"),
    Case("three sides", "describe --image-size 32x32x32",
         f"{IMAGE_SIZE}, got '32x32x32'"),
    Case("a batch too small to compare", "parity --batch-size 1",
         "--batch-size 1 of 64x64 images leaves 4 values per channel to the last stage, whose BatchNorms magnify "
         "rounding without bound below 32 values: take --batch-size 8"),
    Case("a folder in place of a page", "parity --html .", "--html . is a folder: name the file to write"),
    Case("a page in a missing folder", "parity --html no/page.html", "--html no/page.html: there is no folder no"),
    Case("nothing to compare", "parity --sections", "--sections, --frameworks and --optimizers must not be empty"),
    Case("no benchmark", "bench", "Expected one of {step, layers, compile, memory}."),
    Case("no rounds", "bench step --rounds 0", "--rounds must be at least 1, got 0"),
    Case("no runs", "compare", "name at least one run folder"),
    Case("no such run", "compare run", "run holds no run: metrics.jsonl or config.json is missing"),
    Case("half a run's metrics", "compare run", "run/metrics.jsonl is not from a training run: …",
         run_folder(metrics=b'{"epoch": 1.0, "st\n')),
    Case("another program's metrics", "compare run",
         "run/metrics.jsonl is not from a training run: it has no 'epoch'",
         run_folder(metrics=b'{"loss": 1.0}\n')),
    Case("another program's config.json", "compare run",
         "run/config.json is not from a training run: it has no 'input'",
         run_folder(config=b"{}")),
    Case("a folder in place of a picture", "compare run --out run", "--out run is a folder: name the file to write",
         run_folder()),
    Case("no picture", "classify --weights w.npz", "name at least one picture"),
    Case("no class to print", "classify a.jpg --weights w.npz --top 0", "--top must be at least 1, got 0"),
    Case("a size below the crop", "classify a.jpg --weights w.npz --resize 100",
         "--resize must be at least 224, the crop, got 100"),
    Case("an unknown format", "convert w.npz w.onnx",
         "weight files end in .safetensors, .npz, .pth or .pt, Keras' files in .h5, got w.onnx"),
    Case("an existing file", "convert w.npz old.npz",
         "old.npz exists already: choose another name, or pass --overwrite", file("old.npz", b"of mine")),
    Case("a file in a missing folder", "convert w.npz no/out.npz", "target no/out.npz: there is no folder no"),
    Case("a folder in place of a weight file", "convert w.npz out.npz --overwrite",
         "target out.npz is a folder: name the file to write", a_folder("out.npz")),
    Case("no such protocol", "study no.toml", "no.toml cannot be read: No such file or directory"),
    Case("a protocol that is not TOML", "study p.toml", "p.toml is not TOML: …", file("p.toml", b"about =")),
    Case("a protocol with an unknown setting", "study p.toml",
         "p.toml: settings: experiments.cars has no setting 'lr'",
         file("p.toml", b'about = "?"\ncontestants = []\n[settings]\nlr = 1\n[final]\nseeds = [1]\nepochs = 1\n')),
    Case("a report without a study", "report empty",
         "empty holds no study: neither it nor a folder inside has a trials.csv",
         a_folder("empty")),
    Case("a read-only folder", "convert w.npz locked/out.npz",
         "locked/out.npz cannot be written: locked is read-only", a_folder("locked", mode=0o555),
         how="nobody"),
]  # fmt: skip

DATA_FOLDERS = [
    Case("no such folder", IN_CARS, f"cars does not exist. {LAYOUTS_FOLLOW}"),
    Case("the home folder of an unknown user", "cars --data ~nobody99/cars",
         "~nobody99/cars does not exist: there is no home folder of that name"),
    Case("an archive", IN_CARS, f"cars is a file: unpack it and give the folder. {LAYOUTS_FOLLOW}",
         file("cars", b"PK\3\4")),
    Case("a pipe", IN_CARS, f"cars is no folder. {LAYOUTS_FOLLOW}",
         a_pipe("cars"), how="process"),
    Case("an empty folder", IN_CARS, f"{NO_LAYOUT} it is empty. {LAYOUTS_ARE}", a_folder("cars")),
    Case("classes without splits", IN_CARS,
         f"{NO_LAYOUT} it has pictures in Audi, BMW, but no train/<Class Name>/ and test/<Class Name>/. {LAYOUTS_ARE}",
         a_picture("cars/Audi/0.png", "cars/BMW/0.png")),
    Case("labels in a table", IN_CARS,
         f"{NO_LAYOUT} it holds labels.csv: sort the pictures by class, since labels in such files are not read. "
         f"{LAYOUTS_ARE}",
         a_file("cars/labels.csv")),
    Case("a folder name with two splits", IN_CARS, "cars: rename train_test, which may mean train or test",
         cars(moved("test", "train_test"))),
    Case("two folders for one split", IN_CARS,
         "cars has several folders for train (train, training): keep only one",
         cars(a_picture("training/Audi/0.png"))),
    Case("pictures one folder too deep", IN_CARS,
         "cars/train/BMW has no pictures itself, but its folder new has 2: expected train/<Class Name>/ and "
         "test/<Class Name>/ with the pictures directly inside",
         cars(moved("train/BMW", "x"), moved("x", "train/BMW/new"))),
    Case("a folder that links to itself", IN_CARS, f"{NO_LAYOUT} it holds data. {LAYOUTS_ARE}",
         linked("cars/data", ".")),
    Case("no test pictures", IN_CARS, "cars has no folder test/: expected train/<Class Name>/ and test/<Class Name>/",
         cars(removed("test"))),
    Case("train/ links to itself", IN_CARS, "cars/train cannot be read (Too many levels of symbolic links)",
         cars(removed("train"), linked("train", "train"))),
    Case("pictures without classes", IN_CARS,
         "cars/test has no pictures in class folders (1 picture lies directly in it, without a class): expected "
         "test/<Class Name>/00001.jpg, …", cars(removed("test"), a_picture("test/1.png"))),
    Case("class folders without pictures", IN_CARS,
         "cars/test has no pictures in class folders: expected test/<Class Name>/00001.jpg, …",
         cars(removed(*NAMES[4:]))),
    Case("a class that links to itself", IN_CARS, "cars/train/VW cannot be read (Too many levels of symbolic links)",
         cars(linked("train/VW", "VW"))),
    Case("a locked folder", IN_CARS, "cars/train cannot be read (Permission denied)", cars(locked("train")),
         how="nobody"),
    Case("a locked class", IN_CARS, "cars/train/BMW cannot be read (Permission denied)",
         cars(locked("train/BMW")), how="nobody"),
    Case("no devkit", IN_CARS,
         "cars has cars_train/ or cars_test/, but there is no cars_meta.mat in it or in cars/devkit: put the file "
         "there, or sort the pictures by class (train/<Class Name>/, test/<Class Name>/)",
         changed(devkit(), removed("cars/devkit"))),
    Case("a web page in place of a .mat", IN_CARS,
         "cars/devkit/cars_meta.mat cannot be read as a MATLAB file (…): download it again",
         devkit(meta=b"<html>404 Not Found</html>")),
    Case("an empty .mat", IN_CARS,
         "cars/devkit/cars_meta.mat cannot be read as a MATLAB file (…): download it again", devkit(meta=b"")),
    Case("a .mat of MATLAB 7.3", IN_CARS,
         "cars/devkit/cars_meta.mat cannot be read as a MATLAB file (Please use HDF reader for matlab v7.3 files, …): "
         "download it again", devkit(meta=b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM\x89HDF\r\n\x1a\n" + bytes(99))),
    Case("a .mat of zeros", IN_CARS, "cars/devkit/cars_meta.mat cannot be read as a MATLAB file (…): download it again",
         devkit(meta=bytes(10_000))),
    Case("another .mat", IN_CARS,
         "cars/devkit/cars_meta.mat has no variable 'class_names' but ['x']: is this the devkit's file?",
         devkit(meta={"x": 1})),
    Case("numbers in place of class names", IN_CARS,
         "cars/devkit/cars_meta.mat has class_names that are not names: is this the devkit's file?",
         devkit(meta={"class_names": np.arange(6.0).reshape(2, 3)})),
    Case("other annotations", IN_CARS,
         "the annotations in cars/devkit/cars_train_annos.mat have no field bbox_x1, bbox_y1, bbox_x2, bbox_y2, fname: "
         "is this the devkit's file?", devkit(bbox_x1=None, bbox_y1=None, bbox_x2=None, bbox_y2=None, fname=None)),
    Case("a box of vectors", IN_CARS,
         "cars/devkit/cars_train_annos.mat has a box or class in row 1 that is not in whole numbers (…): is this "
         "the devkit's file?", devkit(bbox_x1=np.arange(3))),
    Case("a box with a NaN", IN_CARS,
         "cars/devkit/cars_train_annos.mat has a box or class in row 1 that is not in whole numbers (cannot "
         "convert float NaN to integer): is this the devkit's file?", devkit(bbox_y2=np.nan)),
    Case("no classes", IN_CARS,
         "cars/devkit/cars_train_annos.mat has no field 'class': expected the file with labels, cars_train_annos.mat",
         devkit(**{"class": None})),
    Case("an unknown class", IN_CARS,
         "cars/devkit/cars_train_annos.mat has 00001.png in class 4: cars_meta.mat names 1 to 3",
         devkit(**{"class": 4})),
    Case("annotations of other pictures", IN_CARS,
         "cars/devkit/cars_train_annos.mat does not name a file in row 1 (../0.png): is this the devkit's file?",
         devkit(fname="../0.png")),
    Case("annotations of missing pictures", IN_CARS,
         "1 of 7 pictures in cars cannot be used: cars_train/00002.png (No such file or directory). Replace them, or "
         "leave them out with --skip-bad", changed(devkit(), removed("cars/cars_train/00002.png"))),
    Case("boxes of other pictures", IN_CARS,
         "4 of 7 pictures in cars do not contain their box: cars_train/00001.png (box x 5 to 99, y 3 to 22 in a "
         "picture of 40x30), …. Boxes refer to the original photographs. If these are cropped or resized, sort them by "
         "class and move the devkit's .mat files out of the folder", devkit(bbox_x2=99)),
    Case("a pointer of git-lfs in place of parquet", IN_CARS,
         "cars/train.parquet cannot be read as parquet (…): download it again (a file of a few hundred bytes is only a "
         "pointer of git-lfs: run git lfs pull)",
         a_file("cars/train.parquet", "cars/test.parquet", content=b"version")),
    Case("a pipe in place of parquet", IN_CARS, f"{NO_LAYOUT} it holds test.parquet, train.parquet. {LAYOUTS_ARE}",
         a_pipe("cars/train.parquet", "cars/test.parquet"), how="process"),
    Case("no such folder", "mnist --data digits", f"--data digits does not exist: {HINT}"),
    Case("a file in place of a folder", "mnist --data digits", f"--data digits is no folder: {HINT}",
         file("digits", b"")),
    Case("a missing file", "mnist --data digits", f"digits has no t10k-labels-idx1-ubyte: {HINT}",
         digits(test_labels=None)),
    Case("an empty file", "mnist --data digits",
         f"digits/train-images-idx3-ubyte has the magic number 0: expected 2051 (images as bytes); {HINT}",
         digits(train_images=b"")),
    Case("labels in place of pictures", "mnist --data digits",
         f"digits/train-images-idx3-ubyte has the magic number 2049: expected 2051 (images as bytes); {HINT}",
         digits(train_images=idx(20))),
    Case("half a file", "mnist --data digits",
         "digits/train-images-idx3-ubyte holds 8,000 bytes of values, but its header says 20x28x28 = 15,680: download "
         "it again", digits(train_images=idx(20, 28, 28)[:8016])),
    Case("a locked file", "mnist --data digits", "digits/train-images-idx3-ubyte cannot be read (Permission denied)",
         changed(digits(), locked("digits/train-images-idx3-ubyte")), how="nobody"),
    Case("half of a .gz", "mnist --data digits",
         "digits/train-images-idx3-ubyte is truncated or damaged (…): download it again",
         digits(train_images=b"\x1f\x8b\x08" + bytes(20))),
    Case("pictures of another size", "mnist --data digits",
         f"digits/train-images-idx3-ubyte has pictures of 32x32: expected 28x28, {HINT}",
         digits(train_images=idx(20, 32, 32))),
    Case("a label above 9", "mnist --data digits",
         "digits/train-labels-idx1-ubyte has the label 10 at place 0: expected 0 to 9",
         digits(train_labels=idx(20, value=10))),
    Case("fewer labels than pictures", "mnist --data digits",
         "digits/train-images-idx3-ubyte has 20 pictures and digits/train-labels-idx1-ubyte has 19 labels: expected "
         "equal numbers, download both again", digits(train_labels=idx(19))),
]  # fmt: skip


def cannot_be_used(reason: str) -> str:
    return f"1 of 9 pictures in cars cannot be used: {BAD} ({reason}). Replace them, or leave them out with --skip-bad"


def classify_command(*pictures: str) -> str:
    return f"classify {shlex.join(pictures)} --weights w.npz --framework numpy"


A_BOMB = "more than 178,956,970 pixels, which may be a decompression bomb"
NO_PICTURE = "not a picture in any format that Pillow reads"

PICTURES = [
    Case("an empty file", IN_CARS, cannot_be_used("the file is empty"), bad_picture(b"")),
    Case("text", IN_CARS, cannot_be_used(NO_PICTURE), bad_picture(b"a picture of a car")),
    Case("half of a JPEG", IN_CARS, cannot_be_used("image file is truncated (…)"),
         bad_picture(encoded(NOISE, "JPEG")[:-1500])),
    Case("half of a PNG", IN_CARS, cannot_be_used("image file is truncated…"),
         bad_picture(encoded(NOISE, "PNG")[:-5000])),
    Case("a JPEG's first bytes", IN_CARS, cannot_be_used("…"), bad_picture(encoded(NOISE, "JPEG")[:20])),
    Case("a PNG of 20,000x20,000 pixels", IN_CARS, cannot_be_used(A_BOMB), bad_picture(png_bomb())),
    Case("a JPEG that claims 65,500x65,500 pixels", IN_CARS, cannot_be_used(A_BOMB), bad_picture(jpeg_bomb())),
    Case("an endless PostScript program", IN_CARS, cannot_be_used("PostScript is a program, not a picture"),
         bad_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")),
    Case("negative pixels", IN_CARS, cannot_be_used("pixels from -0.5 to -0.5: expected 0 to 65535"),
         bad_picture(encoded(Image.new("F", (8, 8), -0.5), "TIFF"))),
    Case("a file of 5 GB", IN_CARS, cannot_be_used("5,000,000,000 bytes, more than 1,073,741,824"), cars(sparse_file)),
    Case("a broken link", IN_CARS, cannot_be_used("No such file or directory"), cars(linked(BAD, "nowhere"))),
    Case("a link to itself", IN_CARS, cannot_be_used("Too many levels of symbolic links"),
         cars(linked(BAD, "bad.jpg"))),
    Case("a pipe", IN_CARS, cannot_be_used("a pipe or device, not a file"), cars(a_pipe(BAD)), how="process"),
    Case("a link to an endless device", IN_CARS, cannot_be_used("a pipe or device, not a file"),
         cars(linked(BAD, "/dev/zero")), how="process"),
    Case("a locked picture", IN_CARS, cannot_be_used("Permission denied"),
         cars(a_picture(BAD), locked(BAD)), how="nobody"),
    Case("a photograph of an iPhone", IN_CARS,
         cannot_be_used("HEIC, as iPhones save pictures, which Pillow does not read: convert it to JPEG"),
         bad_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")),
    Case("no readable picture", f"{IN_CARS} --skip-bad", "cars: none of the 4 test pictures can be used",
         cars(a_file(*NAMES[4:], content=b""))),
    Case("no such file", classify_command("no.jpg"),
         "1 of 1 pictures cannot be read: no.jpg (No such file or directory)", for_classify()),
    Case("a folder", classify_command("."),
         "1 of 1 pictures cannot be read: . (a folder: name the pictures in it, ./*.jpg)", for_classify()),
    Case("several bad pictures", classify_command("a.jpg", "b.png", "c.jpg"),
         f"3 of 3 pictures cannot be read: a.jpg (the file is empty), b.png ({NO_PICTURE}), c.jpg ({A_BOMB})",
         for_classify(("a.jpg", b""), ("b.png", b"hello"), ("c.jpg", jpeg_bomb()))),
    Case("a name with a line break", classify_command("a\nb\x1b[2J.jpg"),
         r"1 of 1 pictures cannot be read: a\nb\x1b[2J.jpg (the file is empty)",
         for_classify(("a\nb\x1b[2J.jpg", b""))),
    Case("a picture one pixel high", classify_command("a.png"),
         "1 of 1 pictures cannot be read: a.png (60000x1 pixels are too elongated: resizing would give "
         "3,932,160,000 pixels)", for_classify(("a.png", encoded(Image.new("L", (60_000, 1)), "PNG")))),
    Case("a pipe", classify_command("a.jpg"), "1 of 1 pictures cannot be read: a.jpg (a pipe or device, not a file)",
         changed(npz(), a_pipe("a.jpg")), how="process"),
    Case("a locked picture", classify_command("a.png"), "1 of 1 pictures cannot be read: a.png (Permission denied)",
         changed(npz(), a_picture("a.png"), locked("a.png")), how="nobody"),
]  # fmt: skip

AGAIN = "copy or download it again"
NO_FOLDER = "is a folder without model.safetensors, weights.safetensors or checkpoints: name a weight file"
NO_RESNET = "holds no ResNet: there is no layer1.0.conv1.weight, whatever the prefix; the first names are"
FIT = "w.npz does not fit a resnet18 with 5 classes and 3 channels:"
NOT_OF_A_RUN = "the metadata of w.safetensors are not as experiments.cars writes them:"
FACTS = dict(arch='"resnet18"', class_names='["a", "b", "c", "d", "e"]', image_size="[64, 64]", grey="false",
             mean="[0.5, 0.5, 0.5]", std="[0.2, 0.2, 0.2]")  # fmt: skip
BY_METADATA = "classify a.png --weights w.safetensors"


def unreadable(suffix: str, reason: str) -> str:
    return f"w{suffix} is not a readable weight file: {reason}"


WEIGHT_FILES = [
    Case("no such file", CONVERT.format("w.npz"), "no weight file w.npz"),
    Case("another format", CONVERT.format("w.onnx"),
         f"w.onnx is not a readable weight file: its format is not known: {AGAIN}", file("w.onnx", b"\x08\x07\x12")),
    Case("a folder", CONVERT.format("w.npz"), f"w.npz {NO_FOLDER}", a_folder("w.npz")),
    Case("a folder without a run", "classify a.png --weights run", f"run {NO_FOLDER}", run_folder()),
    Case("a link to itself", CONVERT.format("w.npz"), "no weight file w.npz",
         linked("w.npz", "w.npz")),
    Case("a pipe", CONVERT.format("w.npz"), "w.npz is a pipe or device: copy what it gives to a file",
         a_pipe("w.npz"), how="process"),
    Case("a link to an endless device", CONVERT.format("w.pth"),
         "w.pth is a pipe or device: copy what it gives to a file",
         linked("w.pth", "/dev/zero"), how="process"),
    Case("a locked file", CONVERT.format("w.npz"), "w.npz cannot be read: Permission denied",
         changed(npz(), locked("w.npz")), how="nobody"),
    *(Case(f"an empty {suffix}", CONVERT.format(f"w{suffix}"), unreadable(suffix, f"it is empty: {AGAIN}"),
           file(f"w{suffix}", b"")) for suffix in (".npz", ".pth", ".safetensors")),
    *(Case(f"half of a {suffix}", CONVERT.format(f"w{suffix}"), unreadable(suffix, f"…; {AGAIN}"),
           shortened(f"w{suffix}")) for suffix in (".npz", ".pth", ".safetensors")),
    Case("text", CONVERT.format("w.npz"), unreadable(".npz", f"it is text: {AGAIN}"), file("w.npz", b"not\nfound")),
    Case("a web page", CONVERT.format("w.pth"), unreadable(".pth", "it is a web page: download the file itself"),
         file("w.pth", b"<!DOCTYPE html>")),
    Case("a pointer of git-lfs", CONVERT.format("w.safetensors"),
         unreadable(".safetensors", "it is a pointer of git-lfs: run `git lfs pull`"),
         file("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    Case("zeros", CONVERT.format("w.pth"), unreadable(".pth", f"its first bytes are all zero: {AGAIN}"),
         file("w.pth", bytes(5000))),
    Case("noise", CONVERT.format("w.npz"), unreadable(".npz", f"its format is not known: {AGAIN}"),
         file("w.npz", np.random.default_rng(0).bytes(5000))),
    Case("noise", CONVERT.format("w.pth"), unreadable(".pth", f"its format is not known: {AGAIN}"),
         file("w.pth", np.random.default_rng(0).bytes(5000))),
    Case("a single array", CONVERT.format("w.npz"),
         unreadable(".npz", "it is a single array (.npy): expected {name: array}"),
         lambda folder: (np.save(folder / "w.npy", np.ones(3)), (folder / "w.npy").rename(folder / "w.npz"))),
    Case("Python objects", CONVERT.format("w.npz"),
         "w.npz is refused: it holds Python objects, which could run code: expected arrays of numbers",
         npz(change=lambda arrays: {"fc.weight": np.array([{}], object)})),
    Case("an archive of something else", CONVERT.format("w.npz"),
         "w.npz is an archive of readme.txt: unpack it and name a weight file from it",
         lambda folder: zipfile.ZipFile(folder / "w.npz", "w").writestr("readme.txt", "hello")),
    Case("a zip bomb", CONVERT.format("w.npz"),
         "w.npz is refused: it would unpack to 22 GiB, and no ResNet needs that much", zip_bomb),
    Case("a tensor of 1 number that claims 512 billion", CONVERT.format("w.pth"),
         "w.pth is refused: it would unpack to 1,907 GiB, and no ResNet needs that much",
         pth(lambda: trained_network(fc=tensor(1).expand(10**9, 512)))),
    Case("a pickle that runs code", CONVERT.format("w.pth"),
         "w.pth is refused: its pickle asks for posix.system, which is more than data and could run code. If you trust "
         "the file, load it in PyTorch and save only its state_dict: torch.save(model.state_dict(), PATH)",
         pth(lambda: {"fc.weight": RunsCode()})),
    Case("a whole model", CONVERT.format("w.pth"),
         "w.pth is refused: its pickle asks for torch.nn.modules.linear.Linear, which is more than data and could run "
         "code. If you trust the file, load it in PyTorch and save only its state_dict: "
         "torch.save(model.state_dict(), PATH)", pth(whole_model)),
    Case("TorchScript", CONVERT.format("w.pth"),
         unreadable(".pth", "it is TorchScript: load it in PyTorch and save its state_dict, "
                    "torch.save(model.state_dict(), PATH)"), torchscript),
    Case("a list", CONVERT.format("w.pth"), f"w.pth {NO_RESNET} 0", pth(lambda: [tensor(3)])),
    Case("numbers in place of names", CONVERT.format("w.pth"), f"w.pth {NO_RESNET} 0", pth(lambda: {0: tensor(3)})),
    Case("an optimizer's state alone", CONVERT.format("w.pth"), f"w.pth {NO_RESNET} state.0.momentum_buffer",
         pth(lambda: {"state": {0: {"momentum_buffer": tensor(3)}}, "param_groups": []})),
    Case("a sparse tensor", CONVERT.format("w.pth"),
         "w.pth has tensors that are not plain arrays: fc.weight is a sparse tensor",
         pth(lambda: trained_network(fc=tensor(3, 3).to_sparse()))),
    Case("several networks", CONVERT.format("w.pth"),
         "w.pth has several networks: in student, teacher. Name one: --entry NAME, or entry= in Python",
         pth(lambda: {"student": trained_network(), "teacher": trained_network()})),
    Case("an unknown entry", "convert w.npz out.npz --entry model_ema",
         "w.npz has no network in 'model_ema', only in the file itself", npz()),
    Case("a header longer than its file", CONVERT.format("w.safetensors"), unreadable(".safetensors", f"…; {AGAIN}"),
         file("w.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    Case("a header that is not JSON", CONVERT.format("w.safetensors"), unreadable(".safetensors", f"…; {AGAIN}"),
         safetensors_header(b"{'a': 1}")),
    Case("an array beyond the file's end", CONVERT.format("w.safetensors"), unreadable(".safetensors", f"…; {AGAIN}"),
         safetensors_header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"1234")),
    Case("eight-bit floats", CONVERT.format("w.safetensors"),
         "w.safetensors is refused: it holds F8_E4M3: save it as float32, float16 or bfloat16",
         safetensors_header({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12")),
    Case("bfloat16 in .npz", CONVERT.format("w.npz"),
         "w.npz is refused: 1 arrays, such as fc.bias, are raw bytes, 2 per value: NumPy saved bfloat16 without its "
         "type. Save it as .safetensors, or as float32",
         npz(change=lambda arrays: arrays | {"fc.bias": np.zeros(5, "V2")})),
    Case("another kind of network", CONVERT.format("w.npz"), f"w.npz {NO_RESNET} weight",
         npz(change=lambda arrays: {"weight": np.ones(3)})),
    Case("a network without classes", CONVERT.format("w.npz"),
         "w.npz does not fit a resnet18 with no classes and 3 channels:",
         npz(change=lambda arrays: arrays | {"fc.weight": np.ones((0, 512), np.float16)})),
    Case("another number of blocks", CONVERT.format("w.npz"),
         "w.npz holds a ResNet with (2, 2, 2, 1) basic blocks: not supported, or incomplete",
         npz(change=lambda arrays: {name: a for name, a in arrays.items() if not name.startswith("layer4.1")})),
    Case("a ResNeXt", CONVERT.format("w.npz"),
         "w.npz holds a ResNeXt, with 32 groups in its convolutions: not supported",
         npz(change=lambda a: a | {"layer1.0.conv2.weight": np.zeros((128, 4, 3, 3), np.float16),
                                   "layer1.0.conv3.weight": np.zeros((256, 128, 1, 1), np.float16)})),
    Case("a backbone to classify with", "classify a.png --weights w.npz",
         "w.npz has no dense layer, or one that is not a single layer: it cannot classify",
         npz(change=lambda arrays: {name: a for name, a in arrays.items() if not name.startswith("fc.")})),
    Case("a missing array", CONVERT.format("w.npz"), f"{FIT}\n  missing: bn1.bias (64,)",
         npz(change=without("bn1.bias"))),
    Case("an unexpected array", CONVERT.format("w.npz"), f"{FIT}\n  unexpected: extra (3,)",
         npz(change=lambda a: a | {"extra": np.ones(3)})),
    Case("a kernel in another layout", CONVERT.format("w.npz"),
         f"{FIT}\n  layer1.0.conv1.weight: expected (64, 64, 3, 3), the file has (3, 3, 64, 64) (transposed?)",
         npz(change=lambda a: a | {"layer1.0.conv1.weight": a["layer1.0.conv1.weight"].transpose(2, 3, 1, 0)})),
    Case("values that are not numbers", CONVERT.format("w.npz"), f"{FIT}\n  fc.bias: 5 of 5 values are not finite",
         npz(change=lambda a: a | {"fc.bias": np.full(5, np.nan, np.float16)})),
    Case("a negative variance", CONVERT.format("w.npz"), f"{FIT}\n  bn1.running_var: 64 of 64 variances are negative",
         npz(change=lambda a: a | {"bn1.running_var": -a["bn1.running_var"]})),
    Case("whole numbers", CONVERT.format("w.npz"), f"{FIT}\n  fc.bias: expected floats, the file has int8",
         npz(change=lambda a: a | {"fc.bias": np.ones(5, np.int8)})),
    Case("a pipe to start from", f"{IN_CARS} --batch-size 2 --init w.npz",
         "w.npz is a pipe or device: copy what it gives to a file",
         changed(cars(), a_pipe("w.npz")), how="process"),
    Case("another network to start from", f"{IN_CARS} --batch-size 2 --init w.npz --arch resnet34",
         "w.npz holds the weights of a resnet18 with 5 classes and 3 channels, not of a resnet34 with 2 classes and 1 "
         "channel: pass --arch resnet18", changed(cars(), npz())),
    Case("a grey network without a preparation", "classify a.png --weights w.npz",
         "w.npz is for pictures of 1 channel, but does not say how to prepare them: pass the weights.safetensors of a "
         "run of experiments.cars, whose metadata say so", lambda folder: np.savez(folder / "w.npz", **network(1))),
    Case("incomplete metadata of a run", BY_METADATA, f"{NOT_OF_A_RUN} it has no mean",
         with_metadata(**{name: value for name, value in FACTS.items() if name != "mean"})),
    Case("metadata that are not JSON", BY_METADATA, f"{NOT_OF_A_RUN} …", with_metadata(**FACTS | {"arch": "resnet18"})),
    Case("metadata of another network", BY_METADATA,
         f"{NOT_OF_A_RUN} network and numbers of classes, means, deviations and channels are ('resnet34', 5, 3, 3, 3) "
         "in the metadata and ('resnet18', 5, 3, 3, 3) in the weights",
         with_metadata(**FACTS | {"arch": '"resnet34"'})),
    Case("metadata of huge pictures", BY_METADATA,
         f"{NOT_OF_A_RUN} 'image_size' is 1000000 x 64, expected 32 to 4096 pixels each",
         with_metadata(**FACTS | {"image_size": "[1000000, 64]"})),
    Case("metadata with a deviation of 0", BY_METADATA,
         f"{NOT_OF_A_RUN} 'mean' and 'std' are [0.5, 0.5, 0.5] and [0, 1, 1], expected finite numbers, 'std' above 0",
         with_metadata(**FACTS | {"std": "[0, 1, 1]"})),
]  # fmt: skip

# Resumes a run of --model cnn on the digits.
RESUME = "mnist --model cnn --data digits --epochs 1 --batch-size 4 --framework jax --out run --resume"
GOES_ON = "--resume continues with the same ones; to train with these, begin a run in another --out"

CHECKPOINTS = [
    Case("another seed", f"{RESUME} --seed 1",
         f"run holds a run with other settings: --seed 0 there, 1 here. {GOES_ON}", stopped_run()),
    Case("another length and rate", f"{RESUME} --epochs 3 --learning-rate 0.5",
         "run holds a run with other settings: --epochs 1 there, 3 here; --learning-rate 0.001 there, 0.5 here. "
         f"{GOES_ON}", stopped_run()),
    Case("another precision", f"{RESUME} --precision float64",
         f"run holds a run with other settings: --precision float32 there, float64 here. {GOES_ON}", stopped_run()),
    Case("other pictures under the same settings", RESUME,
         f"run holds a run with other settings: the data's mean; the data's deviation. {GOES_ON}",
         stopped_run(noisy_digits(seed=1))),
    Case("averages that the run does not have", f"{RESUME} --ema 0.9",
         f"run holds a run with other settings: --ema None there, 0.9 here. {GOES_ON}", stopped_run()),
    Case("half a config.json", RESUME, "run/config.json cannot be read (…): --resume cannot know what run this was",
         stopped_run(cut("run/config.json"))),
    Case("another program's config.json", RESUME,
         "run/config.json cannot be read (…): --resume cannot know what run this was",
         stopped_run(file("run/config.json", b'["of", "mine"]'))),
    Case("shortened metrics", RESUME,
         "run/metrics.jsonl has 0 lines, and had 1 at the checkpoint: it was changed",
         stopped_run(cut("run/metrics.jsonl"))),
    Case("removed metrics", RESUME,
         "run/metrics.jsonl has 0 lines, and had 1 at the checkpoint: it was changed",
         stopped_run(removed("run/metrics.jsonl"))),
    Case("a checkpoint of another network", RESUME,
         "run/checkpoints/9 belongs to another training: … arrays differ, the first is …: … there, … here",
         stopped_run(lambda folder: foreign_checkpoint(folder / "run/checkpoints"))),
    Case("a checkpoint of another program", RESUME,
         "run/checkpoints/6 is not of a run of this program: it does not record 'best'",
         stopped_run(lambda folder: foreign_facts(folder / "run/checkpoints"))),
    Case("damaged checkpoints only", RESUME,
         "no checkpoint in run/checkpoints can be read: move the folder away to begin again",
         stopped_run(cut("run/checkpoints/5/record.json"))),
    Case("damaged arrays", RESUME,
         "no checkpoint in run/checkpoints can be read: move the folder away to begin again",
         stopped_run(cut("run/checkpoints/5/state.safetensors"))),
    Case("no config.json", RESUME, "run holds files of something else, and no config.json: choose another --out",
         stopped_run(removed("run/config.json"))),
    Case("checkpoints of an earlier version", RESUME,
         "run/checkpoints/9 was written by orbax, in an earlier version of this program: continue with that version, "
         "or start the run again", stopped_run(a_file("run/checkpoints/9/_CHECKPOINT_METADATA"))),
    Case("a file in place of the checkpoints", RESUME, "run/checkpoints is no folder",
         stopped_run(removed("run/checkpoints"), file("run/checkpoints", b"of mine"))),
]  # fmt: skip

BATTERY = {
    "Command line": COMMAND_LINE,
    "Data folders": DATA_FOLDERS,
    "Pictures": PICTURES,
    "Weight files": WEIGHT_FILES,
    "Checkpoints": CHECKPOINTS,
}


def page() -> str:
    """The text of docs/bad-input.md."""
    total = sum(map(len, BATTERY.values()))
    text = (
        "# Bad input\n\n```\nPYTHONPATH=. python tests/bad_inputs.py          # writes this page\n"
        "pytest tests/experiments/test_bad_input.py      # runs its cases\n```\n\n"
        f"The table shows what the programs say to {total} mistakes and hostile files. The exit code is always 2, no "
        "half-written file is left, and no program hangs. … replaces text that differs between machines or comes from "
        "another library; a message that ends in a colon is followed by a list.\n"
    )
    for category, cases in BATTERY.items():
        text += f"\n## {category}: {len(cases)}\n\n| input | `python -m experiments.` | message |\n|---|---|---|\n"
        text += "".join(f"| {case.what} | `{cell(case.command)}` | {cell(case.message)} |\n" for case in cases)
    return text


def cell(text: str) -> str:
    """Text for a cell of a Markdown table, on one line."""
    return printable(text.replace("\n  ", " ")).replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
