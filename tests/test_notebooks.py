"""The notebooks run from top to bottom, and the files in the repository hold the outputs of such a run."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="could not import nbformat: it comes with the extra test")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["adabound", "layers", "mnist"]


@every_notebook
def test_outputs_are_kept_and_small(path):
    """The cells ran once, in order. The outputs have no error, warning or local path, and the file is below 150 kB."""
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds == {("stream", "stdout"), ("display_data", None)}
    assert "/work/" not in text
    assert "/home/" not in text
    assert len(text) < 150_000


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(path, monkeypatch):
    """The notebook's own assertions hold. Without the real digits, the notebook mnist draws some."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MNIST_DIR", str(ROOT.parent / "shared" / "data" / "mnist"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
