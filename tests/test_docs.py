"""The Python in the code fences of the pages runs, programs accept the shell commands, and links lead to files."""

import functools
import importlib
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from experiments.report.pages import fill

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def shell_commands():
    """The commands `python -m experiments.…` of all pages, with shell variables replaced by their values."""
    found = []
    for page in PAGES:
        whole = page.read_text(encoding="utf-8")
        inline = [" ".join(code.split()) for code in re.findall(r"`(python -m [^`]*)`", FENCE.sub("", whole))]
        for language, text in [*FENCE.findall(whole), *(("", code) for code in inline)]:
            if language:
                continue
            variables = dict(re.findall(r"^(\w+)=(\S+)$", text, re.M))
            for line in re.findall(r"python -m experiments\.\w[^\n#]*", text):
                line = re.sub(r"\$(\w+)", lambda match, known=variables: known.get(match[1], match[0]), line)
                found.append(pytest.param(shlex.split(line)[2:], id=f"{page.stem}: {line[10:60]}"))
    return found


class Parsed(BaseException):
    """The command line was read."""


@pytest.mark.parametrize("command", shell_commands())
def test_shell_commands_are_taken(command, monkeypatch):
    """Nothing is run: only the program's parser reads all arguments, and it exits at one that it does not know."""
    parse, from_dict = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def cli(f, **kwargs):
        parse(f if isinstance(f, type) else functools.wraps(f)(lambda *args, **kwargs: None), **kwargs)
        raise Parsed

    def subcommand_cli(*args, **kwargs):
        from_dict(*args, **kwargs)
        raise Parsed

    program = importlib.import_module(command[0])
    if hasattr(program, "__path__"):
        program = importlib.import_module(f"{command[0]}.__main__")
    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", subcommand_cli)
    with pytest.raises(Parsed):
        program.main(command[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the weight files that pages load."""
    folder = tmp_path_factory.mktemp("docs")
    for make in (models.resnet18, models.resnet50):
        torch.save(make().state_dict(), folder / f"{make.__name__}.pth")
    (folder / "checkpoint.pth").symlink_to("resnet18.pth")
    (folder / "results").symlink_to(ROOT / "results")
    Image.new("RGB", (300, 200), "orange").save(folder / "lynx.jpg")
    repository = folder / "hub" / "models--timm--resnet50.a1_in1k"  # the layout of huggingface_hub's cache
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(models.resnet50().state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    return folder


QUICK = ("describe --arch", "convert checkpoint.pth", "classify lynx.jpg --weights resnet50", "report results/ --out")


@pytest.mark.slow
@pytest.mark.parametrize("begin", QUICK)
def test_quick_shell_commands_run(begin, folder, monkeypatch):
    """The names of files in the commands are those of `folder`."""
    commands = [case.values[0] for case in shell_commands()]
    module, *arguments = next(found for found in commands if " ".join(found).startswith(f"experiments.{begin}"))
    monkeypatch.chdir(folder)
    program = importlib.import_module(module)
    program = importlib.import_module(f"{module}.__main__") if hasattr(program, "__path__") else program
    assert program.main(arguments) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs(page, folder, monkeypatch):
    """All Python fences of a page run in order, as a reader would type them."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    assert {language for language, _ in found} <= {"python", ""}, "a fence of this language would not be tested"
    fences = [text for language, text in found if language == "python"]
    monkeypatch.chdir(folder)
    if any('"hf:' in fence for fence in fences):
        constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names = {"images": np.zeros((1, 64, 64, 3), np.float32), "labels": np.zeros(1, np.int32)}
    for fence in fences:
        exec(compile(fence, str(page), "exec"), names)


def test_tables_are_as_the_results_are():
    """If they differ, `python -m experiments.report results/ --readme PAGES` updates them."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    assert [name for name, text in texts.items() if fill(text, ROOT / "results") != text] == []


def test_the_architecture_is_drawn_as_the_contracts_are():
    """If it differs, `python docs/architecture.py` draws it again."""
    floors = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["floors"]
    with Image.open(ROOT / "docs" / "architecture.png") as picture:
        assert picture.text["Description"] == str(floors())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short_and_nothing_is_left_to_fill_in(page):
    text = page.read_text(encoding="utf-8")
    assert page.stem in ("bad-input", "CHANGELOG") or len(text.split()) <= (1200 if page.stem == "README" else 900)
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX|[A-Z]+_(?:LINE|SECTION|TIME))\b", text)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page):
    """Only files that git tracks count, since a clone has no others."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git clone")
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)  # code has brackets too
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    targets = {os.path.relpath(page.parent / link, ROOT) for link in links}
    assert targets <= set(listed.stdout.splitlines())
