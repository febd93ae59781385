"""Each command of docs/bad-input.md prints its message, exits with code 2 and leaves nothing broken."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
from bad_files import MAKERS, NOISE, bad_picture, npz
from folder_changes import a_picture
from picture_folders import encoded
from PIL import Image

import experiments.bench.__main__
import experiments.classify.__main__
import experiments.parity.__main__
import experiments.report.__main__
import experiments.study.__main__
from experiments import cars, compare, convert, describe, mnist
from experiments.training.settings import DATA_VARIABLE
from jax_resnet import weights

ROOT = Path(__file__).parents[2]
MAIN = {
    "cars": cars.main,
    "mnist": mnist.main,
    "classify": experiments.classify.__main__.main,
    "convert": convert.main,
    "describe": describe.main,
    "compare": compare.main,
    "parity": experiments.parity.__main__.main,
    "bench": experiments.bench.__main__.main,
    "study": experiments.study.__main__.main,
    "report": experiments.report.__main__.main,
}
TIMEOUT = 120  # seconds; the process takes 5 on an idle machine
NOBODY = 65534


class Case(NamedTuple):
    """A row of docs/bad-input.md.

    what: describes the input, which bad_files.MAKERS makes.
    command: the program of experiments and its arguments, quoted as for a shell, with escapes such as \\n; run in its
      own folder.
    message: the text on stderr after "error: ", with paths relative to that folder; … replaces text that differs
      between machines or comes from another library.
    """

    what: str
    command: str
    message: str

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return shlex.split(self.command.encode().decode("unicode_escape"))

    @property
    def id(self) -> str:
        return f"{self.words[0]}: {self.what}"

    @property
    def how(self) -> Literal["here", "process", "nobody"]:
        """In which process it is run.

        "process" is another one with a timeout, since a faulty program would hang; "nobody" one without root's rights,
        because root may read and write everything.
        """
        if re.search("locked|read-only", self.what):
            return "nobody"
        return "process" if re.search("pipe|endless device", self.what) else "here"

    def make(self, folder: Path) -> None:
        """Makes the files that the command is to find in the folder."""
        if maker := MAKERS.get(self.words[0], {}).get(self.what):
            maker(folder)


ROW = re.compile(r"\| (.+) \| `(.+)` \| (.+) \|")
HEAD = "\n\n| input | `python -m experiments.` | message |\n|---|---|---|\n"


def read_page() -> dict[str, list[Case]]:
    """The cases of each table of docs/bad-input.md, by the title above it."""
    text = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8").replace("\\<", "<")
    tables = (section.split(HEAD) for section in text.split("\n## ")[1:])
    return {title: [Case(*ROW.fullmatch(row).groups()) for row in table.splitlines() if row] for title, table in tables}


BATTERY = read_page()
CASES = {case.id: case for of_title in BATTERY.values() for case in of_title}


def pattern(message: str) -> str:
    """The regular expression of a message; what follows a colon may be the first line of a list."""
    parts = (re.escape(part).replace(r":\ ", r":(?:\ |\n  )") for part in message.split("…"))
    return ".*".join(parts)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Modes of all files and folders in a folder; of files, also size and time."""
    found = {}
    for directory, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(directory) / name
            status = path.lstat()
            facts = (status.st_size, status.st_mtime_ns) if name in files else ()
            found[path.relative_to(folder).as_posix()] = (status.st_mode, *facts)
    return found


def check(case: Case, code: int, printed: str, folder: Path, before: dict[str, tuple]) -> None:
    """Asserts exit code 2, the case's message and an unchanged folder."""
    assert code == 2, printed
    assert "Traceback" not in printed
    lines = printed.replace(f"{folder}/", "").replace(str(folder), ".").splitlines()
    ours = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if ours:
        told = "\n".join(lines[ours[0] :])
        if case.message.endswith(":"):
            told, _, listed = told.partition("\n")
            assert all(line.startswith("  ") for line in listed.splitlines()), printed
        assert re.fullmatch(pattern(f"error: {case.message}"), told), printed
    else:  # the parser prints its errors in a box
        boxed = [line.strip(" │").removeprefix("Error parsing Settings: ") for line in lines]
        assert any(re.fullmatch(pattern(case.message), line) for line in boxed), printed
    assert snapshot(folder) == before


def check_cache(cache: Path) -> None:
    """Asserts that every entry is complete."""
    for entry in cache.glob("*/*"):
        assert not entry.name.startswith("partial-")
        assert not entry.name.startswith("stanford-cars") or (entry / "entry.json").is_file()


def cases(*ways: str) -> list:
    return [pytest.param(case, id=case.id) for case in CASES.values() if case.how in ways]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, with a cache beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    return tmp_path / "here"


def environment(cache: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(cache), "COLUMNS": "1000"}  # so that the parser breaks no lines


@pytest.mark.parametrize("case", cases("here"))
def test_bad_input(case, folder, capsys):
    case.make(folder)
    before = snapshot(folder)
    program, *arguments = case.words
    capsys.readouterr()
    try:
        code = MAIN[program](arguments)
    except SystemExit as stop:  # raised by the parser
        code = stop.code
    printed = capsys.readouterr()
    check(case, code, printed.err, folder, before)
    assert program in ("cars", "mnist") or printed.out == ""  # a training says first what it trains
    check_cache(folder.parent / "cache")


RUNNER = f"""if True:
    import contextlib, io, json, os, sys
    sys.path.insert(0, {str(ROOT)!r})
    from experiments import cars, convert, mnist
    from experiments.classify import __main__ as classify
    # Nobody may not be able to read what is imported late, so it is imported before.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        classify.main([sys.argv[2] + "/no.jpg", "--weights", sys.argv[2] + "/w.npz"])
        cars.main(["--data", sys.argv[2] + "/cars"])
    if sys.argv[1] == "nobody" and os.getuid() == 0:
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
    for folder, program, arguments in json.loads(sys.stdin.read()):
        os.chdir(folder)
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = dict(cars=cars, classify=classify, convert=convert, mnist=mnist)[program].main(arguments)
            except SystemExit as stop:
                code = stop.code
        print(json.dumps([code, printed.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere():
    """Runs the cases "process" and "nobody", each in one process: {case: (exit code, stderr, folder, snapshot)}."""
    results = {}
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)  # the user nobody cannot enter pytest's folders
        npz()(Path(top))
        bad_picture(b"")(Path(top))
        for how in ("process", "nobody"):
            orders, places = [], {}
            for number, case in enumerate(parameter.values[0] for parameter in cases(how)):
                place = Path(top) / f"{how}{number}"
                place.mkdir()
                place.chmod(0o777)
                case.make(place)
                places[case] = place, snapshot(place)
                program, *arguments = case.words
                orders.append([str(place), program, arguments])
            variables = {name: value for name, value in os.environ.items() if name != DATA_VARIABLE}
            command = [sys.executable, "-c", RUNNER, how, top]
            with contextlib.ExitStack() as stack:
                answers = stack.enter_context(open(Path(top) / f"{how}.jsonl", "w+", encoding="utf-8"))
                with contextlib.suppress(subprocess.TimeoutExpired):  # the answers before a hanging case remain
                    subprocess.run(
                        command,
                        input=json.dumps(orders),
                        stdout=answers,
                        text=True,
                        timeout=TIMEOUT,
                        env=variables | environment(Path(top) / "cache"),
                    )
                answers.seek(0)
                answered = [json.loads(line) for line in answers]
            for (case, (place, before)), (code, printed) in zip(places.items(), answered, strict=False):
                results[case] = code, printed, place, before
        check_cache(Path(top) / "cache")
        yield results


@pytest.mark.parametrize("case", cases("process", "nobody"))
def test_bad_input_in_another_process(case, elsewhere):
    assert case in elsewhere, "it, or one before it, did not end"
    check(case, *elsewhere[case])


@pytest.mark.parametrize(
    "name", ["cars: a pipe in place of a picture", "convert: a link to an endless device", "cars: no epoch"]
)
def test_as_a_command(name, tmp_path):
    """Runs `python -m`, as people do: no traceback, no hang."""
    case = CASES[name]
    (tmp_path / "here").mkdir()
    case.make(tmp_path / "here")
    before = snapshot(tmp_path / "here")
    program, *arguments = case.words
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *arguments],
        cwd=tmp_path / "here",
        env=os.environ | environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    check(case, done.returncode, done.stderr, tmp_path / "here", before)


def test_each_maker_has_one_row_and_each_row_that_needs_files_has_a_maker():
    """An input without files is a command line or says that there is no such file; each table has ten rows or more."""
    made = {f"{program}: {what}" for program, makers in MAKERS.items() for what in makers}
    assert made <= CASES.keys()
    assert len(CASES) == sum(map(len, BATTERY.values()))
    assert min(map(len, BATTERY.values())) >= 10
    not_made = {case for title in BATTERY.keys() - {"Command line"} for case in BATTERY[title] if case.id not in made}
    others = [case.what for case in not_made if not case.what.startswith("no such ")]
    assert others == ["the home folder of an unknown user"]


# What must work.

NAMES = ("two words", 'it\'s "quoted"', "a\nb", "Škoda 🚗", "$(HOME) *", "caf\udce9")  # the last is Latin-1


def test_classify_takes_any_name(folder, capsys):
    """classify also takes pictures in CMYK, of 16 bits, of several frames, with a palette or alpha."""
    npz()(folder)
    kinds = (
        NOISE.convert("CMYK"),
        Image.fromarray(np.full((64, 64), 5000, np.uint16)),
        NOISE.convert("P"),
        NOISE.convert("RGBA"),
        NOISE.convert("L"),
        NOISE,
    )
    formats = ("JPEG", "PNG", "GIF", "PNG", "PNG", "JPEG")
    for name, kind, file_format in zip(NAMES, kinds, formats, strict=True):
        more = {"save_all": True, "append_images": [kind, kind]} if file_format == "GIF" else {}
        (folder / name).write_bytes(encoded(kind, file_format, **more))
    command = [*NAMES, "--weights", "w.npz", "--framework", "numpy"]
    assert MAIN["classify"]([*command, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["pictures"]) == list(NAMES)
    assert MAIN["classify"](command[-5:]) == 0
    assert "\ncaf\\udce9\n" in capsys.readouterr().out


def test_cars_takes_any_name(folder, capsys):
    """The folder, its classes, its pictures and the run may have any name."""
    data, out = folder / NAMES[1] / "cars\n🚗", folder / "a run's\nfolder 🚗"
    for split_name in ("train", "test"):
        for name in NAMES:
            directory = data / split_name / name
            a_picture(f"{name}.png", f"{name} 2.png")(directory)
    command = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "4", "--epochs", "1"]
    command += ["--framework", "numpy", "--limit", "4", "--opt", "sgd", "--augmentation", "none"]
    assert cars.main([*command, "--data", str(data), "--out", str(out)]) == 0
    assert all("\n" not in name for name in json.loads((out / "config.json").read_text())["input"]["class_names"])
    facts = weights.read_file(out / "weights.safetensors").metadata
    expected = sorted(["two words", 'it\'s "quoted"', r"a\nb", "Škoda 🚗", "$(HOME) *", r"caf\udce9"])
    assert sorted(json.loads(facts["class_names"])) == expected
