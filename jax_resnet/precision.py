"""Optimizers that compute in at least float32, whatever the type of the gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

__all__ = ["at_least_float32", "chain_in_float32", "one_minus_power", "wide_dtype"]


def wide_dtype(x: Any) -> jnp.dtype:
    """float32, or the type of x if that is wider.

    Raises:
      TypeError: for a complex x.
    """
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"AdaBound takes real parameters and gradients, got {dtype}")
    return dtype


def at_least_float32(tree: Any) -> Any:
    """The same tree, in which float16 and bfloat16 have become float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x)), tree)


def chain_in_float32(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` whose updates are rounded once, at its end, to the gradients' dtypes.

    In float16 learning_rate · 100 · g may be finite where 100 · g is not.
    """
    chain = optax.chain(*transforms)

    def update_fn(updates, state, params=None, **extra_args):
        wide_updates, state = chain.update(at_least_float32(updates), state, at_least_float32(params), **extra_args)
        return optax.tree.cast_like(wide_updates, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def one_minus_power(b: ArrayLike, t: jax.Array) -> jax.Array:
    """1 - b**t without the cancellation of `optax.tree.bias_correction`, which costs half of float32's digits."""
    if isinstance(b, int | float):
        return -jnp.expm1(t * (math.log(b) if b else -math.inf))
    return -jnp.expm1(t * jnp.log(jnp.asarray(b, t.dtype)))
