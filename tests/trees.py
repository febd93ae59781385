"""Trees of arrays: whether two are the same or close."""

import math

import jax
import numpy as np


def pairs(ours, theirs):
    """{path: both arrays} of two trees with the same structure, whose arrays have the same shapes and types."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    found = {}
    for (path, our), their in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        our, their = found[jax.tree_util.keystr(path)] = np.asarray(our), np.asarray(their)
        assert (our.shape, our.dtype) == (their.shape, their.dtype), jax.tree_util.keystr(path)
    return found


def same(ours, theirs):
    """Asserts that all arrays are the same to the bit."""
    different = [path for path, (our, their) in pairs(ours, theirs).items() if our.tobytes() != their.tobytes()]
    assert not different


def relative_errors(ours, theirs):
    """{path: the largest difference over the largest entry of theirs}; inf if all of theirs is 0, but not all of ours.

    The largest entry is the measure because some directions before a BatchNorm have tiny gradients.
    """
    errors = {}
    for path, arrays in pairs(ours, theirs).items():
        our, their = (array.astype(np.float64) for array in arrays)
        difference, largest = (np.abs(array).max(initial=0) for array in (our - their, their))
        errors[path] = difference / largest if largest else (math.inf if difference else 0.0)
    return errors


def close(ours, theirs, tolerance):
    """Asserts that no array is off by more than this part of its largest entry."""
    assert not {path: error for path, error in relative_errors(ours, theirs).items() if not error <= tolerance}
