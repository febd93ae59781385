"""Leaves torch_ref's examples out where torch, an optional package, is not installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["torch_ref/*.py"]
