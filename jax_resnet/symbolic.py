"""Comparisons of sizes that may be symbolic, as `jax.export.symbolic_shape` makes them; with numbers >= and <.

Each says whether something holds for all values of the symbolic dimensions, which are at least 1: where it depends on
the values the answer is False.
"""

from __future__ import annotations

from typing import Any

try:
    from jax.errors import InconclusiveDimensionOperation
except ImportError:  # JAX 0.8
    from jax.core import InconclusiveDimensionOperation

__all__ = ["at_least", "below"]


def at_least(size: Any, bound: int) -> bool:
    """Whether size >= bound."""
    try:
        return bool(size >= bound)
    except InconclusiveDimensionOperation:
        return False


def below(size: Any, bound: int) -> bool:
    """Whether size < bound."""
    try:
        return bool(size < bound)
    except InconclusiveDimensionOperation:
        return False
