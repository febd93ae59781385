"""Names in plots are drawn as they are; characters that no font has are replaced and noted."""

import io

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib import pyplot as plt

from experiments.output import figures
from experiments.training.plots import plot_comparison, plot_predictions

NAMES = {
    "_baseline": "_baseline",
    "Under $20k & $\\alpha": "Under $20k & $\\alpha",
    "_x^{2": "_x^{2",
    "Жигули": "Жигули",
    "汽车 Ümläut": "□□ Ümläut",
    "bad\udcff name\t": "bad□ name□",
}


@pytest.fixture
def no_other_fonts(monkeypatch):
    """DejaVu Sans is the only font but for matplotlib's font of boxes, and nothing has been noted yet."""
    usual = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu Sans", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    figures.fonts_for.cache_clear()
    figures._noted.clear()
    yield
    figures.fonts_for.cache_clear()


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(no_other_fonts, capsys):
    for _ in range(2):
        figure, axis = plt.subplots()
        for name in NAMES:
            axis.plot([1, 10], [1, 1000], label=figures.label(name))
        axis.set_xticks([1, 10], ["$a", "_b"])
        axis.set_yscale("log")
        legend = axis.legend()
        axis.set_title("汽")
        file = io.BytesIO()
        figures.save(figure, file, "png")
        assert [text.get_text() for text in legend.get_texts()] == list(NAMES.values())
        assert not any(text.get_parse_math() for text in [*legend.get_texts(), *axis.get_xticklabels()])
        assert axis.yaxis.get_ticklabels()[0].get_parse_math()  # powers of ten
        assert len(file.getvalue()) > 1000
    noted = capsys.readouterr().err.splitlines()
    assert noted == ["note: no installed font has 汽车: drawn as □ in plots"]


def test_another_font_is_found(monkeypatch):
    """One of matplotlib's fonts stands for a font with more characters than the usual one."""
    monkeypatch.setattr(figures, "_drawn_by", lambda file: frozenset("汽" if "STIXGeneral.ttf" in file else "a"))
    figures.fonts_for.cache_clear()
    families, missing = figures.fonts_for(frozenset("a汽"))
    figures.fonts_for.cache_clear()
    assert families[-1] == "STIXGeneral"
    assert not missing


@pytest.mark.filterwarnings("error")
def test_the_plots_of_a_run_take_any_name(no_other_fonts, tmp_path):
    names = list(NAMES)
    images = np.zeros((len(names), 8, 8, 1), np.uint8)
    plot_predictions(tmp_path / "a.png", images, names, names[::-1], [0.5] * len(names), "cars of $ {")
    rows = [{"epoch": 1.0, "step": 1, "train_loss": 1.0, "test_loss": 1.0, "test_top1": 0.5}]
    distances = {names[0]: [{"epoch": 1.0, "distance": 0.1}]}
    plot_comparison(tmp_path / "b.png", dict.fromkeys(names, rows), "$", names[1], distances)
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "b.png").is_file()
