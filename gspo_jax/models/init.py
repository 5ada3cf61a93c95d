"""Parameters before training: drawn as Qwen's own initialiser does, with their logical axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike


def kernel(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike
) -> nnx.Param:
    """A matrix, or one per expert: normal with standard deviation 0.02."""
    return nnx.Param((jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype), axes=axes)


def constant(
    value: int, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike
) -> nnx.Param:
    """A bias (0) or the scale of a norm (1)."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)
