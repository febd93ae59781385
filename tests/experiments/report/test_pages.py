"""Tables of Markdown files, written from results."""

import json

import pytest

from experiments.report.__main__ import main
from experiments.report.pages import fill

PARITY = "<!-- table parity small -->\nwhat stood here\n<!-- end of table -->\nthe rest\n"


def write_parity(results):
    quantities = ("logits", "loss", "activations", "running statistics", "parameter gradients", "image gradient")
    rows = [
        {"what": f"{quantity}, {mode}, {dtype}", "framework": framework, "error": error}
        for quantity in quantities
        for mode, error in (("train", 2e-14), ("eval", 1e-15))
        for dtype in ("float64", "float32")
        for framework in ("numpy", "torch_ref", "torchvision")
    ]
    (results / "parity").mkdir(parents=True)
    (results / "parity" / "small.json").write_text(json.dumps({"tables": {"a network": rows}}))


def test_tables_are_written_and_then_left_alone(tmp_path, capsys):
    write_parity(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{PARITY}", encoding="utf-8")
    assert main([str(tmp_path), "--readme", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| logits | 2.0e-14 / 1.0e-15 |" in text
    assert "what stood here" not in text
    assert (text[:7], text[-9:]) == ("before\n", "the rest\n")
    assert main([str(tmp_path), "--readme", str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote the tables of {page}", "all tables are up to date"]


def test_times_are_compared_round_by_round(tmp_path):
    (tmp_path / "bench").mkdir()
    seconds = {"jax": [[0.1, 0.1], [0.2, 0.2]], "flax": [[0.3, 0.3], [0.4, 0.4]], "torch": [[0.1, 0.1], [0.1, 0.1]]}
    rows = {name: {"ratio": 1.5} for name in seconds}
    table = {"title": "resnet18, batch 8 of 32x32x3, float32, training step: loss", "rows": rows, "seconds": seconds}
    bench = {"benchmark": "step", "machine": "two cores", "tables": [table]}
    (tmp_path / "bench" / "step-1.json").write_text(json.dumps(bench))
    beside = fill("<!-- table beside-jax step -->\n<!-- end of table -->", tmp_path)
    assert beside.splitlines()[3:-1] == ["| Flax (linen) | 2.50 |", "| PyTorch, eager | 0.75 |"]
    assert "| ResNet-18, 8 of 32×32×3: JAX | 1.50 |" in fill(
        "<!-- table speed step -->\n<!-- end of table -->", tmp_path
    )


@pytest.mark.parametrize("table", ["parity small", "speed step", "answer study", "weather today", "answer"])
def test_a_table_without_its_source_is_named(table, tmp_path):
    with pytest.raises(ValueError, match=f"the table `{table}` cannot be written"):
        fill(f"<!-- table {table} -->\n<!-- end of table -->", tmp_path)


def test_a_damaged_measurement_is_named(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "step-1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-1\.json is not what experiments\.bench --json writes"):
        fill("<!-- table speed step -->\n<!-- end of table -->", tmp_path)
