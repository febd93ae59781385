"""Comparisons of sizes that may be symbolic (`jax.export.symbolic_shape`). For numbers they are >= and <.

Symbolic dimensions are at least 1. A comparison is True if it holds for all values of the symbolic dimensions. It is
False if it depends on their values.
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
