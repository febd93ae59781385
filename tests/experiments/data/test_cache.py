"""A cache entry is complete or absent, whatever happens to processes and files."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from experiments.data import cache

KEY = {"files": [["a.jpg", 12, 34]], "size": [2, 3]}
ITEMS = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3, 1)


class Maker:
    """Fills "images" with ITEMS and "labels" with 0 to 4; counts how often it is called."""

    calls = 0

    def __call__(self, create):
        self.calls += 1
        images, labels = create("images", (2, 3, 1), "uint8"), create("labels", (), "int32")
        for number, item in enumerate(ITEMS):
            images.append(item)
            labels.append(np.int32(number))
        return {"skipped": [("b.jpg", "empty")]}


def load(root, make, key=KEY, **options):
    return cache.load_or_make(root, "cars", key, ITEMS.nbytes, make, **options)


def check(entry, in_cache=True):
    np.testing.assert_array_equal(entry.arrays["images"], ITEMS)
    np.testing.assert_array_equal(entry.arrays["labels"], np.arange(5))
    assert entry.arrays["images"].dtype == np.uint8
    assert entry.arrays["labels"].dtype == np.int32
    assert entry.facts == {"skipped": [["b.jpg", "empty"]]}
    assert not entry.arrays["images"].flags.writeable
    assert isinstance(entry.arrays["images"], np.memmap) == in_cache
    assert (entry.directory is not None) == in_cache


def test_the_second_start_opens_what_the_first_made(tmp_path):
    make = Maker()
    for _ in range(2):
        entry = load(tmp_path / "not" / "yet", make)
        check(entry)
        assert entry.notes == ()
    assert make.calls == 1
    assert [path.name for path in (tmp_path / "not" / "yet").iterdir()] == [entry.directory.name]


@pytest.mark.parametrize("other", [{"files": [["a.jpg", 12, 35]], "size": [2, 3]}, KEY | {"size": [3, 2]}, {}, None])
def test_another_key_or_format_is_another_entry(tmp_path, other, monkeypatch):
    make = Maker()
    first = load(tmp_path, make)
    if other is None:
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert load(tmp_path, make, key=KEY if other is None else other).directory != first.directory
    assert make.calls == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {  # what happens to an entry, what is said of it
    "an array cut short": (lambda entry: os.truncate(entry / "images.npy", 140), "has 140 bytes, but 158 were"),
    "an empty array": (lambda entry: os.truncate(entry / "images.npy", 0), "has 0 bytes"),
    "a pixel changed": (lambda entry: flip(entry / "images.npy"), "images.npy is not what was written"),
    "a label changed": (lambda entry: flip(entry / "labels.npy"), "labels.npy is not what was written"),
    "an array missing": (lambda entry: (entry / "labels.npy").unlink(), "FileNotFoundError"),
    "no description": (lambda entry: (entry / "entry.json").unlink(), "FileNotFoundError"),
    "half a description": (lambda entry: os.truncate(entry / "entry.json", 20), "JSONDecodeError"),
    "another description": (lambda entry: (entry / "entry.json").write_text("[]"), "TypeError"),
    "an empty folder": (lambda entry: [path.unlink() for path in entry.iterdir()], "FileNotFoundError"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again_and_said_so(tmp_path, damage, told):
    make = Maker()
    directory = load(tmp_path, make).directory
    damage(directory)
    entry = load(tmp_path, make)
    check(entry)
    assert make.calls == 2
    assert len(entry.notes) == 1
    assert re.search(rf"is made again \(it is damaged: .*{told}", entry.notes[0])
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    assert load(tmp_path, make).notes == ()


def test_of_two_that_make_an_entry_the_first_one_stays(tmp_path):
    def slow(create):
        load(tmp_path, Maker())  # meanwhile another load is faster
        return {**Maker()(create), "slow": True}

    check(load(tmp_path, slow))
    check(load(tmp_path, slow))


def test_a_large_file_is_checked_at_its_beginning_end_and_in_between(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(1_000_000))
    clean = cache.sampled_checksum(path)
    for start in (0, 300_000, 999_999):
        content = bytearray(1_000_000)
        content[start : start + 20_000] = b"\1" * min(20_000, 1_000_000 - start)
        path.write_bytes(content)
        assert cache.sampled_checksum(path) != clean, start


def test_an_undamaged_entry_may_be_refused(tmp_path):
    make = Maker()
    load(tmp_path, make)
    entry = load(tmp_path, make, refuse=lambda facts: f"{facts['skipped'][0][0]} is back")
    check(entry)
    assert make.calls == 2
    assert "made again (b.jpg is back" in entry.notes[0]


def test_what_the_maker_raises_leaves_nothing(tmp_path):
    def make(create):
        create("images", (2, 3, 1), "uint8").append(ITEMS[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, make)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_falls_back_to_memory(tmp_path):
    """A file is in the folder's place: permissions would not stop root."""
    (tmp_path / "file").write_text("")
    make = Maker()
    entry = load(tmp_path / "file" / "cache", make)
    check(entry, in_cache=False)
    assert make.calls == 1
    assert "decodes the pictures again" in entry.notes[0]
    assert "Not a directory" in entry.notes[0]


def test_too_little_space_is_seen_beforehand(tmp_path):
    make = Maker()
    entry = cache.load_or_make(tmp_path, "cars", KEY, 10**18, make)
    check(entry, in_cache=False)
    assert make.calls == 1
    assert "MB free, but 1,000,000,000,000 MB are needed" in entry.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_falls_back_to_memory(tmp_path):
    """The kernel's limit on a file's size stands for the full disk: write() fails in the middle."""

    def make(create):
        images = create("images", (1000,), "uint8")
        for number in range(300):
            images.append(np.full(1000, number % 256, np.uint8))
        return {}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        entry = load(tmp_path, make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entry.directory is None
    assert entry.arrays["images"].shape == (300, 1000)
    assert entry.arrays["images"][299, 999] == 299 % 256
    assert "File too large" in entry.notes[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [
        ("{tmp}/x", "{tmp}/x/resnet-adabound"),
        ("", "{tmp}/home/.cache/resnet-adabound"),
        ("rel", "{tmp}/home/.cache/resnet-adabound"),
    ],
)
def test_where_the_cache_is(tmp_path, monkeypatch, xdg, expected):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg.format(tmp=tmp_path))
    assert str(cache.cache_folder(None)) == expected.format(tmp=tmp_path)
    assert cache.cache_folder(tmp_path / "mine") == tmp_path / "mine"


PROGRAM = textwrap.dedent(
    """
    import sys, time
    import numpy as np
    from experiments.data import cache
    root, pause = sys.argv[1], float(sys.argv[2])
    def make(create):
        images = create("images", (2, 3, 1), "uint8")
        for number in range(50):
            images.append(np.full((2, 3, 1), number, np.uint8))
            if number == 3:
                images.file.flush()
                print("started", flush=True)
                time.sleep(pause)
        return {}
    entry = cache.load_or_make(root, "cars", {}, 300, make)
    assert entry.directory is not None and entry.notes == (), entry
    assert (entry.arrays["images"][:, 0, 0, 0] == np.arange(50)).all()
    """
)


def start(root, pause):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(root), str(pause)], stdout=subprocess.PIPE, text=True)


def test_several_processes_at_once_make_one_entry(tmp_path):
    programs = [start(tmp_path, 0.5) for _ in range(4)]
    for program in programs:
        program.communicate(timeout=60)
    assert [program.returncode for program in programs] == [0] * 4
    (directory,) = tmp_path.iterdir()
    assert json.loads((directory / "entry.json").read_text())["arrays"]["images"]["shape"] == [50, 2, 3, 1]


def test_a_killed_process_leaves_nothing_that_looks_complete(tmp_path):
    killed = start(tmp_path, 60)
    assert killed.stdout.readline() == "started\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("partial-")

    after = start(tmp_path, 0)
    after.communicate(timeout=60)
    assert after.returncode == 0
    assert left.is_dir()  # another process might still be writing it

    (complete,) = set(tmp_path.iterdir()) - {left}
    (complete / "entry.json").unlink()
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (two_days_ago, two_days_ago))
    cache.load_or_make(tmp_path, "cars", {}, 300, Maker())
    assert list(tmp_path.iterdir()) == [complete]
