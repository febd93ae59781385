"""optax's own tests of its optimizers (optax/_src/alias_test.py in its package), run on AdaBound's three aliases."""

import importlib.util
import re
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import optax
import pytest

from jax_resnet.adabound import adabound, adaboundw, amsbound

# final_lr is 1e-3: above 2e-3, SGD diverges on the Rosenbrock function, whose curvature is 1000.
ENTRIES = tuple(
    {"opt_name": alias.__name__, "opt_kwargs": {"learning_rate": 1e-2, "final_lr_ratio": 0.1}}
    for alias in (adabound, amsbound, adaboundw)
)
BATTERY = Path(optax.__file__).parent / "_src" / "alias_test.py"


def battery() -> list[unittest.TestCase]:
    """optax's cases that use its table of optimizers, with our entries in the table; without complex types and pmap."""
    if not BATTERY.is_file() or importlib.util.find_spec("absl") is None:
        return []
    source, tables = re.subn(r"^_OPTIMIZERS_UNDER_TEST = \(.*?^\)$", "", BATTERY.read_text(), flags=re.M | re.S)
    assert tables == 1
    module = types.ModuleType("optax_battery")
    module._OPTIMIZERS_UNDER_TEST = ENTRIES
    with pytest.MonkeyPatch.context() as patch:  # mock.patch.dict would also forget what is imported meanwhile
        patch.setitem(sys.modules, "sklearn", mock.MagicMock())  # for tests of L-BFGS
        patch.setitem(sys.modules, "optax_battery", module)
        exec(compile(source, BATTERY, "exec"), module.__dict__)
    ours = {"adabound": adabound, "amsbound": amsbound, "adaboundw": adaboundw}
    module.alias = types.SimpleNamespace(**vars(module.alias), **ours)  # where it looks up an optimizer by name
    cases = unittest.defaultTestLoader.loadTestsFromTestCase(module.AliasTest)
    return [case for case in cases if "bound" in str(case) and not re.search("complex|with_pmap", str(case))]


CASES = battery()


@pytest.mark.skipif(not CASES, reason="needs the extra test: optax's own tests, in its package, and absl")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id().rpartition(".")[2])
def test_optaxs_battery(case):
    result = unittest.TestResult()
    case.run(result)
    assert result.testsRun == 1
    assert not result.skipped
    for _, traceback in result.failures + result.errors:
        pytest.fail(traceback)
