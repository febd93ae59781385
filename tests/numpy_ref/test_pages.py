"""The numbers in docs/batchnorm.md are those that its script measures; docs/figures.py draws the figures."""

import importlib.util
import struct
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_mistakes_is_what_the_script_measures():
    assert "\n".join(script("batchnorm_mistakes").rows()) in (DOCS / "batchnorm.md").read_text(encoding="utf-8")


def test_every_figure_of_the_pages_is_drawn_at_the_width_of_a_phone(tmp_path, monkeypatch):
    figures = script("figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    for draw in figures.FIGURES:
        draw()
    pages = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("batchnorm.md", "backprop-resnet.md"))
    drawn = sorted(tmp_path.iterdir())
    for path in drawn:
        assert f"]({path.name})" in pages
        sizes = [struct.unpack(">II", picture.read_bytes()[16:24]) for picture in (path, DOCS / path.name)]
        assert sizes[0] == sizes[1]  # the committed figure has the size of the drawn one
        assert sizes[0][0] == pytest.approx(figures.WIDTH * figures.DPI)
    assert pages.count("![") == len(drawn)
