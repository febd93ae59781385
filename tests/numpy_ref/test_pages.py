"""The numbers in docs/batchnorm.md are those that its script measures; docs/figures.py draws the figures."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

from numpy_ref import layers

DOCS = Path(__file__).parents[2] / "docs"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_mistakes_is_what_the_script_measures():
    measured, page = script("batchnorm_mistakes"), (DOCS / "batchnorm.md").read_text(encoding="utf-8")
    assert "\n".join(measured.rows()) in page
    assert f"without ReLU it is at most {measured.text(measured.most_without_relu())}." in page


def test_the_page_shows_the_code_of_batch_norm():
    (lines,) = re.findall("\n```\n(dbias = .*?)```", (DOCS / "batchnorm.md").read_text(encoding="utf-8"), re.S)
    code = inspect.getsource(layers.batch_norm)
    assert [line for line in lines.splitlines() if line not in code] == []


def test_every_figure_of_the_pages_is_drawn_at_the_width_of_a_phone(tmp_path, monkeypatch):
    figures = script("figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    for draw in figures.FIGURES:
        draw()
    pages = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("batchnorm.md", "backprop-resnet.md"))
    drawn = sorted(tmp_path.iterdir())
    for path in drawn:
        assert f"]({path.name})" in pages
        with Image.open(DOCS / path.name) as picture:
            assert picture.width == pytest.approx(figures.WIDTH * figures.DPI)
            assert picture.text["Description"] == figures.DIGEST, "run python docs/figures.py"
    assert pages.count("![") == len(drawn)
