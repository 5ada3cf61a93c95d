"""Work of a step in floating-point operations and bytes moved, from shapes; rates by measurement.

A multiply-add counts as two. Attention counts whole squares of positions, as they are computed:
the causal half is masked, not skipped. Every response is taken to have full length.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gspo_jax.generate import bucket, schedule
from gspo_jax.models.config import QwenConfig
from gspo_jax.settings import AlgoConfig, RolloutConfig


class Work(NamedTuple):
    """One step's, over all devices.

    Attributes:
        matmul: operations of prefill, scores and gradients, which large matmuls bound.
        decode: (operations, bytes read) of each decode step, whichever takes longer.
        tokens: of prompts, once per response, and of responses.
    """

    matmul: float
    decode: list[tuple[float, float]]
    tokens: int

    @property
    def total(self) -> float:
        """All operations."""
        return self.matmul + sum(operations for operations, _ in self.decode)


class Rates(NamedTuple):
    """What one device does per second."""

    matmul: float  # operations
    copy: float  # bytes read and written


def layer_parameters(c: QwenConfig) -> int:
    """Weights that multiply each token, of all layers: of experts those that serve it."""
    D, H = c.hidden_size, c.head_dim
    attention = 2 * D * c.num_heads * H + 2 * D * c.num_kv_heads * H
    total = 0
    for i in range(c.num_layers):
        total += attention
        if c.experts is not None and c.is_sparse(i):
            total += D * c.experts.count + 3 * D * c.experts.size * c.experts.per_token
        else:
            total += 3 * D * c.intermediate_size
    return total


def forward(c: QwenConfig, rows: int, length: int, scored: int) -> int:
    """Operations of a forward pass: `scored` positions of each row meet the vocabulary."""
    dense = length * layer_parameters(c) + scored * c.hidden_size * c.vocab_size
    attention = c.num_layers * c.num_heads * c.head_dim * length**2
    return rows * (2 * dense + 4 * attention)


def step_work(
    c: QwenConfig,
    rollout: RolloutConfig,
    algo: AlgoConfig,
    prompt: int,
    *,
    remat: bool = False,
    itemsize: int = 4,
    ways: int = 1,
) -> Work:
    """A step with prompts of `prompt` tokens; without the critic's own passes.

    Args:
        itemsize: bytes of a weight and of a number in the cache.
        ways: devices that split the rows.
    """
    B, T = rollout.prompts * rollout.group_size, rollout.max_completion_length
    S, text = bucket(prompt), bucket(prompt + T)
    one = forward(c, B, text, T)
    scores = (algo.minibatches - 1) / algo.minibatches + (algo.kl.coef > 0)
    passes = scores + algo.epochs * (4 if remat else 3)
    decode, per_token = [], layer_parameters(c) + c.hidden_size * c.vocab_size
    sizes = schedule(B, S, T, ways=ways)
    for slots in sizes.slots:
        attention = 4 * c.num_layers * c.num_heads * c.head_dim * slots
        cache = 2 * c.num_layers * B * c.num_kv_heads * c.head_dim * slots
        operations = B * (2.0 * per_token + attention)
        # every device reads all weights, and its own share of the cache
        moved = float(itemsize * (per_token * ways + cache))
        decode += [(operations, moved)] * sizes.steps
    prefill = forward(c, rollout.prompts, S, 1)
    return Work(prefill + passes * one, decode, B * (prompt + T))


def seconds(work: Work, rates: Rates, devices: int = 1) -> float:
    """The step at these rates: no step is faster whose responses all have full length."""
    decode = sum(max(f / rates.matmul, m / rates.copy) for f, m in work.decode)
    return (work.matmul / rates.matmul + decode) / devices


def measured_rates(dtype: str) -> Rates:
    """Of the first device, in well under a second: a square matmul, and a copy."""
    large = jax.default_backend() != "cpu"
    n, m = (8192, 2**28) if large else (1024, 2**25)
    x, y = jnp.ones((n, n), dtype), jnp.zeros(m, jnp.uint8)
    matmul, copy = jax.jit(lambda x: x @ x), jax.jit(lambda y: y + jnp.uint8(1))
    return Rates(2 * n**3 / _best(matmul, x), 2 * m / _best(copy, y))


def _best(function, x, times: int = 4) -> float:
    """Seconds of the fastest call after the first."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function(x))
        found.append(time.perf_counter() - began)
    return min(found[1:])
