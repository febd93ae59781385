"""Helpers for optimizers that compute in at least float32 for gradients of any type."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

__all__ = ["at_least_float32", "chain_in_float32", "one_minus_power", "wide_dtype"]


def wide_dtype(x: Any) -> jnp.dtype:
    """Returns float32, or the type of x if the type is wider.

    Raises:
      TypeError: x is complex.
    """
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"AdaBound takes real parameters and gradients, got {dtype}")
    return dtype


def at_least_float32(tree: Any) -> Any:
    """Converts float16 and bfloat16 leaves of a tree to float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x)), tree)


def chain_in_float32(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an `optax.chain` that rounds updates only once, at its end, to the gradients' dtypes.

    In float16, 100 · g may overflow although learning_rate · 100 · g does not.
    """
    chain = optax.chain(*transforms)

    def update_fn(updates, state, params=None, **extra_args):
        wide_updates, state = chain.update(at_least_float32(updates), state, at_least_float32(params), **extra_args)
        return optax.tree.cast_like(wide_updates, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def one_minus_power(b: ArrayLike, t: jax.Array) -> jax.Array:
    """1 - b**t without the cancellation in `optax.tree.bias_correction`, which costs half of float32's digits."""
    if isinstance(b, int | float):
        return -jnp.expm1(t * (math.log(b) if b else -math.inf))
    return -jnp.expm1(t * jnp.log(jnp.asarray(b, t.dtype)))
