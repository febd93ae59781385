"""experiments.classify: pictures prepared bit for bit as in torchvision, class names, weight files."""

import functools
import hashlib
import http.server
import threading

import numpy as np
import pytest
import torchvision
from picture_folders import encoded
from PIL import Image
from torchvision.datasets.folder import pil_loader

from experiments.classify import imagenet
from experiments.classify.preparation import MEAN, STD, Middle
from experiments.data.augment import normalize, to_unit_range

ResNet18 = torchvision.models.ResNet18_Weights
ResNet101 = torchvision.models.ResNet101_Weights
VERSIONS = {"V1": ResNet101.IMAGENET1K_V1, "V2": ResNet101.IMAGENET1K_V2}


def ours(path, version):
    pixels = Middle(({"V1": imagenet.V1_RESIZE, "V2": imagenet.V2_RESIZE}[version],)).decode(path.read_bytes())
    assert (pixels.dtype, pixels.shape) == (np.uint8, (224, 224, 3))
    return normalize(to_unit_range(pixels), MEAN, STD)


def torchvisions(path, version):
    return VERSIONS[version].transforms()(pil_loader(path)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("version", VERSIONS)
def test_photographs_are_prepared_as_in_torchvision(version, photos_dir):
    """The normalized pixels agree to the bit."""
    photos = sorted(photos_dir.iterdir())
    assert {Image.open(photo).mode for photo in photos} == {"RGB", "L"}
    for photo in photos:
        np.testing.assert_array_equal(ours(photo, version), torchvisions(photo, version), err_msg=photo.name)


PICTURES = {  # mode, width, height, suffix
    "odd": ("RGB", 333, 517, ".jpg"),
    "odd, lying": ("RGB", 517, 333, ".jpg"),
    "the crop's rounding": ("RGB", 256, 257, ".png"),
    "the crop's rounding, lying": ("RGB", 259, 256, ".png"),
    "as large as V2 wants": ("RGB", 232, 232, ".png"),
    "a pixel": ("RGB", 1, 1, ".png"),
    "a thin one": ("RGB", 3, 400, ".png"),
    "small": ("RGB", 47, 33, ".webp"),
    "large": ("RGB", 1999, 1501, ".jpg"),
    "grey": ("L", 300, 401, ".png"),
    "transparent": ("RGBA", 301, 400, ".png"),
    "transparent grey": ("LA", 301, 400, ".png"),
    "palette": ("P", 300, 400, ".png"),
    "gif": ("P", 300, 400, ".gif"),
    "black and white": ("1", 300, 400, ".png"),
    "for print": ("CMYK", 300, 400, ".jpg"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("mode", "width", "height", "suffix"), PICTURES.values(), ids=PICTURES)
def test_every_size_and_mode_is_prepared_as_in_torchvision(mode, width, height, suffix, version, tmp_path):
    """The pixels agree to the bit; noise shows each wrong one."""
    path = tmp_path / f"picture{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(noise).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode).save(path)
    assert Image.open(path).mode == mode
    np.testing.assert_array_equal(ours(path, version), torchvisions(path, version))


def test_orientation_is_left_alone_as_in_torchvision(tmp_path):
    path, exif = tmp_path / "picture.jpg", Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    np.testing.assert_array_equal(ours(path, "V1"), torchvisions(path, "V1"))


def test_16_bits_keep_their_upper_8():
    noise = np.random.default_rng(0).integers(0, 65536, (256, 256), np.uint16)
    pixels = Middle((256,)).decode(encoded(noise))
    np.testing.assert_array_equal(pixels[..., 1], (noise >> 8)[16:240, 16:240])


def test_class_names_are_torchvisions():
    assert list(imagenet.class_names()) == ResNet101.IMAGENET1K_V1.meta["categories"]
    assert (imagenet.class_names()[0], len(imagenet.class_names())) == ("tench", 1000)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_torchvisions_files_are_known_by_their_names(arch, tmp_path):
    for weights in torchvision.models.get_model_weights(arch):
        name = weights.url.rpartition("/")[2]
        assert imagenet.resize_for(tmp_path / name) == weights.transforms().resize_size[0], name
    assert imagenet.resize_for(tmp_path / f"{arch}.pth") == imagenet.V1_RESIZE


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that serves a file in place of torchvision's server, and returns the file's URL."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def serve(name, contents):
            (folder / name).write_bytes(contents)
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            monkeypatch.setattr(ResNet18.IMAGENET1K_V1.value, "url", url)
            return url

        yield serve
        server.shutdown()


def test_a_download_is_kept(served, tmp_path, monkeypatch):
    """The file is downloaded once, into torch.hub's folder."""
    contents = b"weights"
    name = f"resnet18-{hashlib.sha256(contents).hexdigest()[:8]}.pth"
    served(name, contents)
    path, resize = imagenet.torchvision_weights("resnet18", None)
    assert (path, resize) == (tmp_path / "home" / "hub" / "checkpoints" / name, 256)
    assert path.read_bytes() == contents
    monkeypatch.setattr("torch.hub.download_url_to_file", None)
    assert imagenet.torchvision_weights("resnet18", "V1") == (path, resize)


@pytest.mark.parametrize("case", ["another checksum", "not there", "nobody listens"])
def test_a_failed_download_says_where_to_put_the_file(case, served, tmp_path, monkeypatch):
    url = served("resnet18-00000000.pth", b"damaged")
    if case == "not there":
        (tmp_path / "served" / "resnet18-00000000.pth").unlink()
    if case == "nobody listens":
        url = "http://127.0.0.1:9/resnet18-00000000.pth"
        monkeypatch.setattr(ResNet18.IMAGENET1K_V1.value, "url", url)
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        imagenet.torchvision_weights("resnet18", None)
    path = tmp_path / "home" / "hub" / "checkpoints" / "resnet18-00000000.pth"
    assert f"put the file at {path}, or pass --weights FILE" in str(error.value)
    assert str(error.value).startswith(url)
    assert not list(path.parent.iterdir())


def test_the_version_is_torchvisions_unless_asked_for(tmp_path, monkeypatch):
    """Empty files stand for the weights in torch.hub's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("resnet101-63fe2227.pth", "resnet101-cd907fc2.pth"):
        (folder / name).touch()
    assert imagenet.torchvision_weights("resnet101", None) == (folder / "resnet101-cd907fc2.pth", 232)
    assert imagenet.torchvision_weights("resnet101", "V1") == (folder / "resnet101-63fe2227.pth", 256)
    with pytest.raises(ValueError, match="torchvision has no V2 weights of resnet18: it has IMAGENET1K_V1"):
        imagenet.torchvision_weights("resnet18", "V2")
