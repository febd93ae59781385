"""The contracts of pyproject.toml hold: which part of the project may import which."""

from pathlib import Path

from importlinter import cli


def test_contracts(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    code = cli.lint_imports(no_cache=True)
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out
