"""`python -m experiments.classify`: three frameworks give one answer, with a run's weights or anybody else's."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from picture_folders import encoded, noise
from PIL import Image
from torchvision.datasets.folder import pil_loader

from experiments.classify import __main__ as classify
from experiments.classify import classifier, hub_pictures, imagenet
from experiments.data.dataset import channel_statistics
from experiments.data.drawn_cars import drawn_cars
from experiments.training.prepare import describe_input
from experiments.training.run_folder import WEIGHTS as RUN_WEIGHTS
from jax_resnet import weights
from numpy_ref import resnet

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ["jax", "numpy", "torch"]


def torchvision_inputs(pictures):
    transforms = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.transforms()
    return torch.stack([transforms(pil_loader(picture)) for picture in pictures])


def torchvision_model(arch, images):
    """A seeded torchvision model in evaluation mode, with these images' statistics, and logits of deviation 2 for them.

    Blocks add little to their input, as in trained networks. If a block added as much as its input, PyTorch's own
    float32 logits would be 4e-4 from the float64 logits (ResNet-101, photographs); here they are 8e-6 off.
    """
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch)
    last = ".bn3" if "layer1.0.bn3.weight" in model.state_dict() else ".bn2"
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(*((0.1, 0.3) if name.endswith(last) else (0.5, 1.5)))
                module.bias.normal_(0, 0.1)
                module.momentum = None  # the plain average of all batches
        model.train()(images)
        model.fc.weight *= 2 / model.eval()(images).std()
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of patches, in three sizes and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for mode, size in {"RGB": (300, 400), "L": (500, 260), "RGBA": (224, 224)}.items():
        patches = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8)).resize(size)
        patches.convert(mode).save(folder / f"{mode}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def resnet18(pictures, tmp_path_factory):
    """torchvision's ResNet-18 and its file, as torch.save writes it."""
    model = torchvision_model("resnet18", torchvision_inputs(pictures))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def draw(**settings):
    """The weights of a new ResNet-18."""
    return resnet.init(resnet.resnet18(**settings), np.random.default_rng(0))


def asked(capsys, *arguments):
    """What the command answers with --json."""
    capsys.readouterr()
    assert classify.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits_of(pictures, path, framework):
    settings = classify.Settings(pictures=tuple(pictures), weights=str(path), framework=framework)
    found = classifier.load_classifier(settings)
    images = classifier.read_pictures(settings.pictures, found.preparation.decode)
    return classifier.compute_logits(framework, found, images)


def check_frameworks_against_torchvision(model, path, pictures):
    """Logits of deviation 2 agree to 1e-4, the project's target in float32; the top five have the same order."""
    with torch.inference_mode():
        expected = model(torchvision_inputs(pictures)).numpy()
    for framework in FRAMEWORKS:
        logits = logits_of(pictures, path, framework)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4, err_msg=framework)
        np.testing.assert_array_equal(np.argsort(-logits)[:, :5], np.argsort(-expected)[:, :5], err_msg=framework)


def test_frameworks_answer_as_torchvision(resnet18, pictures):
    check_frameworks_against_torchvision(*resnet18, pictures)


DEEPER = [pytest.param(f"resnet{depth}", marks=pytest.mark.slow) for depth in (34, 50, 101, 152)]


@pytest.mark.parametrize("arch", ["resnet18", *DEEPER])
def test_frameworks_answer_as_torchvision_on_photographs(arch, photos_dir, tmp_path):
    photos = sorted(photos_dir.iterdir())
    model = torchvision_model(arch, torchvision_inputs(photos))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    check_frameworks_against_torchvision(model, tmp_path / "weights.pth", photos)


ASSUMED = "the preparation of the pictures and the names are assumed to be ImageNet's"


def test_json_and_table_say_the_same(resnet18, pictures, capsys):
    path = resnet18[1]
    answer = asked(capsys, *pictures, "--weights", path, "--framework", "torch", "--top", "1000")
    assert (answer["arch"], answer["framework"]) == ("resnet18", "torch")
    assert list(answer["pictures"]) == [str(picture) for picture in pictures]
    for rows in answer["pictures"].values():
        probabilities = [row["probability"] for row in rows]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-12)  # of 1,000 float64 numbers
        assert sorted(row["number"] for row in rows) == list(range(1000))
        assert all(row["class"] == imagenet.class_names()[row["number"]] for row in rows)
    assert classify.main([*map(str, pictures), "--weights", str(path), "--framework", "torch"]) == 0
    head, *blocks = capsys.readouterr().out.split("\n\n")
    assert answer["notes"] == [ASSUMED]
    assert head == f"resnet18, {path}, torch; pictures: {answer['preparation']}\n{ASSUMED}"
    for block, (picture, rows) in zip(blocks, answer["pictures"].items(), strict=True):
        lines = [f"  {row['probability']:8.3%}  {row['class']}" for row in rows[:5]]
        assert block.strip().splitlines() == [picture, *lines]


def test_more_pictures_than_a_batch(resnet18, pictures, monkeypatch):
    """Each picture has the logits that it has alone, also in a half-filled batch; 1e-5 is for the order of sums."""
    alone = np.concatenate([logits_of([picture], resnet18[1], "numpy") for picture in pictures])
    monkeypatch.setattr(classifier, "BATCH_SIZE", 2)
    np.testing.assert_allclose(logits_of(pictures, resnet18[1], "numpy"), alone, rtol=0, atol=1e-5)


TIMM = {"input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center"}
TIMM |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
BICUBIC = torchvision.transforms.InterpolationMode.BICUBIC
OF_TIMM = {"crop_size": 160, "resize_size": 168, "mean": TIMM["mean"], "std": TIMM["std"], "interpolation": BICUBIC}
PREPARATIONS = {  # a file's name, what is asked for, torchvision's preparation
    "any file": ("weights.npz", [], {"resize_size": 256}),
    "torchvision's V1": ("resnet50-0676ba61.npz", [], {"resize_size": 256}),
    "torchvision's V2": ("resnet50-11ad3fa6.npz", [], {"resize_size": 232}),
    "as asked for": ("resnet50-11ad3fa6.npz", ["--resize", "256"], {"resize_size": 256}),
    "timm's settings": ("model.safetensors", [], OF_TIMM),
}


@pytest.mark.parametrize(("name", "arguments", "options"), PREPARATIONS.values(), ids=PREPARATIONS)
def test_pictures_are_prepared_as_the_weights_want(name, arguments, options, resnet18, tmp_path, capsys):
    """The file's name, the settings beside it or --resize decide. On noise, another size gives another answer."""
    picture = Image.fromarray(noise(300, 400, 3))
    picture.save(tmp_path / "noise.png")
    weights.save(tmp_path / name, *weights.from_torch(resnet18[0].state_dict()))
    names = imagenet.class_names()
    if options is OF_TIMM:
        names = [f"name {number}" for number in range(1000)]
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM, "label_names": names}))
    answer = asked(capsys, tmp_path / "noise.png", "--weights", tmp_path / name, "--framework", "torch", *arguments)
    crop, how = options.get("crop_size", 224), " (bicubic)" if options is OF_TIMM else ""
    assert answer["preparation"] == f"shorter side resized to {options['resize_size']}{how}, middle {crop}x{crop}"
    assert answer["notes"] == ([] if options is OF_TIMM else [ASSUMED])
    transforms = torchvision.transforms._presets.ImageClassification(**{"crop_size": 224} | options)
    with torch.inference_mode():
        expected = resnet18[0](transforms(picture)[None]).softmax(-1)[0].max().item()
    (rows,) = answer["pictures"].values()
    assert rows[0]["class"] == names[rows[0]["number"]]
    assert rows[0]["probability"] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def cars_dataset():
    return drawn_cars((32, 48), train_count=24, test_count=12, grey=True, seed=0)


@pytest.fixture(scope="module")
def run(cars_dataset, tmp_path_factory):
    """The folder of an untrained network, as experiments.cars writes it, for grey pictures that are not square."""
    folder = tmp_path_factory.mktemp("run")
    mean, std = channel_statistics(cars_dataset.train.images)
    description = describe_input("resnet18", cars_dataset, {"mean": mean.tolist(), "std": std.tolist()})
    tree = draw(num_classes=len(cars_dataset.class_names), in_channels=1)
    metadata = {name: json.dumps(value) for name, value in description.items()}
    weights.write_arrays(folder / RUN_WEIGHTS, weights.to_torch(*tree), metadata=metadata)
    return folder


def test_what_was_white_in_the_run_is_white_here(run, cars_dataset):
    """On its own, a dark picture of 12 bits in 16 would be four times as light."""
    source = cars_dataset.source | {"white": {"whole numbers": 4095}}
    description = describe_input(
        "resnet18", dataclasses.replace(cars_dataset, source=source), {"mean": [0], "std": [1]}
    )
    facts = {name: json.dumps(value) for name, value in description.items()}
    config = resnet.resnet18(num_classes=len(cars_dataset.class_names), in_channels=1)
    dark = encoded(np.full((9, 9), 1000, np.uint16))
    for told, expected in ((facts, 1000 >> 4), ({**facts, "white": "{}"}, 1000 >> 2)):
        _, preparation = classifier.as_trained(told, "resnet18", config)
        np.testing.assert_array_equal(preparation.decode(dark), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_classifies_with_its_own_preparation_and_names(framework, run, cars_dataset, tmp_path, capsys):
    """torchvision's ResNet-18 gives the same probabilities to the run's names, for pictures of the run's size.

    The tolerance is 1e-4 as for logits; probabilities differ less.
    """
    folder, dataset = run, cars_dataset
    images = dataset.test.images[:3]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    mean, std = channel_statistics(dataset.train.images)
    model = torchvision.models.resnet18(num_classes=len(dataset.class_names)).eval()
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    arrays = weights.read_arrays(folder / RUN_WEIGHTS)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    with torch.inference_mode():
        inputs = torch.from_numpy((images / 255 - mean) / std).float()
        expected = model(inputs.permute(0, 3, 1, 2)).softmax(-1).numpy()

    answer = asked(capsys, *paths, "--weights", folder, "--framework", framework, "--top", "100")
    assert (answer["arch"], answer["preparation"]) == ("resnet18", "stretched to 32x48, grey")
    for row, of_picture in zip(expected, answer["pictures"].values(), strict=True):
        given = {entry["class"]: entry["probability"] for entry in of_picture}
        assert list(given) == [dataset.class_names[number] for number in np.argsort(-row)]
        np.testing.assert_allclose([given[name] for name in dataset.class_names], row, rtol=0, atol=1e-4)


def test_an_exported_run_answers_the_same(run, resnet18, pictures, tmp_path, capsys):
    """A run's network and one for ImageNet keep their preparation; 1e-5 leaves room for another compilation."""
    told = ("arch", "preparation", "notes")
    for source, name in ((run, "run.stablehlo"), (resnet18[1], "imagenet.stablehlo")):
        assert classify.main(["--weights", str(source), "--export", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.startswith(f"wrote {tmp_path / name} and ")
        expected = asked(capsys, *pictures, "--weights", source, "--top", "1000")
        answer = asked(capsys, *pictures, "--weights", tmp_path / name, "--top", "1000")
        assert {k: answer[k] for k in told} == {k: expected[k] for k in told}
        for ours, theirs in zip(answer["pictures"].values(), expected["pictures"].values(), strict=True):
            by_class = {row["class"]: row["probability"] for row in theirs}
            assert {row["class"]: pytest.approx(row["probability"], abs=1e-5) for row in ours} == by_class
    largest = sum(a.nbytes for a in weights.read_arrays(resnet18[1]).values())
    assert (tmp_path / "imagenet.stablehlo").stat().st_size < 1.05 * largest  # the weights are in it once

    program = tmp_path / "run.stablehlo"
    for change, message in (
        (lambda: program.write_bytes(program.read_bytes()[:-1]), "their checksums differ"),
        (lambda: (tmp_path / "run.stablehlo.json").write_text("{}"), "is not what --export wrote"),
        (lambda: (tmp_path / "run.stablehlo.json").unlink(), "run.stablehlo.json"),
    ):
        change()
        assert classify.main([str(pictures[0]), "--weights", str(program)]) == 2
        assert message in capsys.readouterr().err


def test_a_runs_file_alone_is_enough_and_takes_pictures_of_any_size_and_colour(run, pictures, capsys):
    answers = [asked(capsys, *pictures, "--weights", w, "--framework", "numpy") for w in (run, run / RUN_WEIGHTS)]
    assert answers[0]["pictures"] == answers[1]["pictures"]
    assert len(answers[0]["pictures"]) == 3


def test_it_needs_no_torch(resnet18, pictures, tmp_path):
    """If torch and torchvision cannot be imported, JAX and NumPy answer, and torch is a clear error."""
    path = tmp_path / "weights.safetensors"
    weights.save(path, *weights.from_torch(resnet18[0].state_dict()))
    program = """if True:
        import sys

        class Missing:
            def find_spec(self, name, *_):
                if name.partition(".")[0] in ("torch", "torchvision"):
                    raise ModuleNotFoundError(f"No module named {name!r}")

        sys.meta_path.insert(0, Missing())
        from experiments.classify.__main__ import main

        print([main([*sys.argv[1:], "--framework", name]) for name in ("jax", "numpy", "torch")])
        print(main([sys.argv[1], "--weights", "torchvision"]))
    """
    command = [sys.executable, "-c", program, str(pictures[0]), "--weights", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 2]", "2"], done.stderr
    missing, no_download = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert missing.startswith("error: --framework torch needs PyTorch, which is missing")
    assert no_download.startswith("error: --weights torchvision needs torchvision, which is missing")


def test_torchvisions_weights_are_read_where_torch_hub_keeps_them(resnet18, pictures, tmp_path, capsys, monkeypatch):
    """A file that is put where the error says needs no network, and is refused if it is more than data."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/resnet18-00000000.pth"  # nothing listens there
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
    arguments = [str(pictures[0]), "--weights", "torchvision", "--arch", "resnet18", "--framework", "numpy"]
    assert classify.main(arguments) == 2
    *_, error = capsys.readouterr().err.splitlines()
    place = Path(re.search("put the file at (.*), or pass --weights FILE", error)[1])
    place.write_bytes(resnet18[1].read_bytes())
    assert (
        asked(capsys, *arguments)["pictures"]
        == asked(capsys, pictures[0], "--weights", resnet18[1], "--framework", "numpy")["pictures"]
    )
    torch.save(resnet18[0], place)  # a pickle of a module, which needs code
    assert classify.main(arguments) == 2
    assert "which is more than data and could run code" in capsys.readouterr().err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of weight files of a network for three classes."""
    folder = tmp_path_factory.mktemp("files")
    params, batch_stats = draw(num_classes=3)
    huge = params | {"bn1": params["bn1"] | {"weight": np.full(64, 3e38, np.float32)}}
    weights.save(folder / "good.npz", params, batch_stats)
    weights.save(folder / "huge.npz", huge, batch_stats)
    weights.save(folder / "timm.safetensors", params, batch_stats, metadata={"arch": "resnet18", "mean": "0.5,0.5,0.5"})
    return folder


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_overflow_is_exit_code_2_and_one_line(framework, files, pictures, capsys):
    """XLA may lose a nan in a maximum, as at 224x224; JAX must report a nan there, too."""
    assert classify.main([str(pictures[0]), "--weights", str(files / "huge.npz"), "--framework", framework]) == 2
    out, error = capsys.readouterr()
    assert (out, error[:7], error.count("\n")) == ("", "error: ", 1)
    assert "are not finite" in error


@pytest.mark.parametrize("name", ["good.npz", "timm.safetensors"])
def test_classes_without_names_are_numbered(name, files, pictures, capsys):
    """Another program's metadata may have two of a run's names."""
    answer = asked(capsys, pictures[0], "--weights", files / name, "--framework", "torch")
    (rows,) = answer["pictures"].values()
    assert sorted(row["class"] for row in rows) == ["class 0", "class 1", "class 2"]


MIDDLE, BOTH = {"shortest_edge": 224}, {"height": 192, "width": 160}
HUB_SETTINGS = {  # what stands beside the weights; the shorter side or both, the crop and the filter
    "timm": ({"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"}, (256,), (224, 224), 2),
    "timm, squashed": (
        {"input_size": [3, 224, 160], "crop_pct": 1.0, "interpolation": "lanczos", "crop_mode": "squash"},
        (224, 160), (224, 160), 1,
    ),
    "microsoft/resnet-50": ({"size": MIDDLE, "crop_pct": 0.875, "resample": 3}, (256,), (224, 224), 3),
    "its older form": ({"size": 224, "crop_pct": 0.875, "resample": 3}, (256,), (224, 224), 3),
    "large": ({"size": {"shortest_edge": 384}, "resample": 3}, (384, 384), (384, 384), 3),
    "a crop": ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (256,), (224, 224), 2),
    "ViT's": ({"size": BOTH, "resample": 2}, (192, 160), (192, 160), 2),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "shorter", "crop", "resample"), HUB_SETTINGS.values(), ids=HUB_SETTINGS)
def test_settings_of_a_hub(settings, shorter, crop, resample):
    """timm 1.0 and transformers 5.24 do the same."""
    of_timm = "input_size" in settings
    numbers = ("mean", "std") if of_timm else ("image_mean", "image_std")
    settings = settings | {name: [0.5, 0.4, 0.3] for name in numbers}
    told = hub_pictures.preparation({"pretrained_cfg": settings} if of_timm else settings)
    assert (told.shorter, told.crop, told.resample) == (shorter, crop, resample)
    assert told.mean == told.std == (0.5, 0.4, 0.3)


MEAN_AND_STD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
BAD_HUB_SETTINGS = {
    "no size": MEAN_AND_STD,
    "no deviation": MEAN_AND_STD | {"image_std": [0] * 3, "size": 224},
    "a huge size": MEAN_AND_STD | {"size": 10**6},
    "an unknown filter": MEAN_AND_STD | {"size": 224, "resample": 9},
    "text for numbers": MEAN_AND_STD | {"image_mean": "abc", "size": 224},
    "a crop of nothing": {"input_size": [3, 224, 224], "crop_pct": 0, "interpolation": "bicubic"},
    "no object": {"pretrained_cfg": {"input_size": 3}},
}


@pytest.mark.parametrize("settings", BAD_HUB_SETTINGS.values(), ids=BAD_HUB_SETTINGS)
def test_settings_of_a_hub_that_say_nothing(settings, tmp_path):
    file = weights.WeightFile(tmp_path, {}, "", "torchvision", "fc", (), {}, settings, None)
    with pytest.raises(ValueError, match="do not say how pictures are prepared"):
        classifier.told_beside(file)
