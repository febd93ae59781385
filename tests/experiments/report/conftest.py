"""Studies of the fake training, and a copy of them to damage."""

import shutil
import sys

import pytest
from fake_cars import FAKE, SMALL

from experiments.study import __main__ as study
from experiments.study import worker


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Three studies of the fake training; `map` has two axes of numbers, `small_check` shows runs of `small`."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "small.toml").write_text(SMALL)
    axes = SMALL[SMALL.index("[settings]") : SMALL.index("[tuning]")]
    (folder / "small_check.toml").write_text(
        f'about = "A check."\n{axes}\n[final]\nseeds = [4, 5]\nepochs = 3\n[[contestants]]\nname = "SGD"\n'
        'settings = { opt = "sgd", learning_rate = 0.01 }\n[report]\nbeside = { small = ["AdaBound", "Adam"] }\n'
        'compare = ["AdaBound", "SGD"]\n'
    )
    (folder / "map.toml").write_text(
        f'about = "A map."\n{axes}\n[final]\nseeds = [1]\nepochs = 2\n[[contestants]]\nname = "bounds"\n'
        'settings = { opt = "adabound" }\naxes.learning_rate = [0.001, 0.01]\naxes.final_lr = [0.1, 1.0, 10.0]\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "CARS", (sys.executable, str(FAKE)))
        for name in ("small", "map", "small_check"):
            assert study.main([str(folder / f"{name}.toml"), "--out", str(folder / "results" / name)]) == 0
    return folder / "results"


@pytest.fixture
def copied(results, tmp_path):
    """A copy of the results to damage."""
    return shutil.copytree(results, tmp_path / "results")
