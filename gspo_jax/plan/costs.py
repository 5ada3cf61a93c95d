"""Work of a step in floating-point operations and bytes moved, from shapes; rates by measurement.

    step_work     before the run: every response at full length, attention over whole squares of
                  positions, as it is computed (the causal half is masked, not skipped)
    utilisation   of a step that was run: its own texts without padding, attention over the causal
                  half, no recomputation; so what padding and masks waste counts against us

A multiply-add counts as two.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from gspo_jax.config.settings import AlgoConfig, RolloutConfig
from gspo_jax.models.config import QwenConfig
from gspo_jax.rollout.schedule import bucket, schedule


class Work(NamedTuple):
    """One step's, over all devices.

    Attributes:
        matmul: operations of prefill, log-probs and gradients, which large matmuls bound.
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


DATASHEET = {  # dense bfloat16 operations per second, by a part of the device's name
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Peak(NamedTuple):
    """What utilisation is measured against, and where that figure is from."""

    rates: Rates
    matmul: float  # operations per second
    source: str


def peak(dtype: str) -> Peak:
    """The datasheet's matmul rate where the device is known and computes in bfloat16, else ours."""
    rates, kind = measured_rates(dtype), jax.devices()[0].device_kind
    stated = [value for name, value in DATASHEET.items() if name in kind]
    if stated and dtype == "bfloat16":
        return Peak(rates, stated[0], f"{kind}'s datasheet")
    return Peak(rates, rates.matmul, "measured")


def faster(a: Peak, b: Peak) -> Peak:
    """The better of two measurements in each figure: others' work only ever slows one down."""
    rates = Rates(max(a.rates.matmul, b.rates.matmul), max(a.rates.copy, b.rates.copy))
    return Peak(rates, max(a.matmul, b.matmul), a.source)


def metered(
    of: Callable[..., dict[str, float]],
    measure: Callable[[], Peak],
    first: Peak,
    say: Callable[[str], None],
) -> Callable[..., dict[str, float]]:
    """`of(..., peak=)` of each step against the best peak of the run so far.

    Measured once, at a moment when the machine was busy with something else, a peak would make
    every later share too large. So it is measured again after 2, 4, 8, ... steps, and at once
    where a share is above 1; what stays above 1 then is told, once.
    """
    best, steps, told = first, 0, False

    def meter(*lengths: Any) -> dict[str, float]:
        nonlocal best, steps, told
        steps += 1
        found = of(*lengths, peak=best)
        if (steps > 1 and steps & (steps - 1) == 0) or _above_one(found):
            best = faster(best, measure())
            found = of(*lengths, peak=best)
        if _above_one(found) and not told:
            told = True
            name = max(found, key=lambda name: found[name])
            say(
                f"warning: {name} is {found[name]:.0%}: faster than this machine was when its "
                "rates were measured; something else kept it busy. Such figures mean nothing."
            )
        return found

    return meter


def _above_one(found: Mapping[str, float]) -> bool:
    return any(share > 1 for share in found.values())


def shown(peak: Peak) -> str:
    """For people, in one line."""
    return (
        f"{peak.rates.matmul / 1e12:,.3g} TFLOP/s in matmuls and {peak.rates.copy / 1e9:,.3g} GB/s "
        f"in copies, measured on a device; speed/mfu is the share of {peak.matmul / 1e12:,.3g} "
        f"TFLOP/s ({peak.source})"
    )


def utilisation(
    c: QwenConfig,
    prompt: Int[np.ndarray, " B"],
    length: Int[np.ndarray, " B"],
    seconds: Mapping[str, float],
    *,
    peak: Peak,
    group_size: int,
    epochs: int = 1,
    itemsize: int = 4,
    devices: int = 1,
) -> dict[str, float]:
    """How near a step came to what its devices can do.

        speed/mfu                 3 forward passes' operations / (time/update * peak matmul rate)
        speed/generate_of_floor   the least time that the sampling could take / time/generate

    Args:
        prompt, length: tokens of each response's prompt and of the response.
        seconds: of the step's phases; those that are missing or 0 give no figure.
    """
    found = {}
    if spent := seconds.get("time/update"):
        work = 3 * epochs * operations(c, prompt, length)  # the gradient costs two more passes
        found["speed/mfu"] = work / (spent * peak.matmul * devices)
    if spent := seconds.get("time/generate"):
        shared = prompt[::group_size]
        floor = operations(c, shared, np.ones_like(shared)) / (peak.rates.matmul * devices)
        floor += decode_floor(c, prompt, length, peak.rates, itemsize=itemsize, devices=devices)
        found["speed/generate_of_floor"] = floor / spent
    return found


def operations(
    c: QwenConfig, prompt: Int[np.ndarray, " B"], length: Int[np.ndarray, " B"]
) -> float:
    """Of one forward pass over these texts, whose responses meet the vocabulary."""
    total = (prompt + length).astype(np.float64)
    dense = total.sum() * layer_parameters(c) + length.sum() * c.hidden_size * c.vocab_size
    return float(2 * dense + _attention(c, (total**2 / 2).sum()))


def decode_floor(
    c: QwenConfig,
    prompt: Int[np.ndarray, " B"],
    length: Int[np.ndarray, " B"],
    rates: Rates,
    *,
    itemsize: int = 4,
    devices: int = 1,
) -> float:
    """Seconds: each step reads all weights and the live rows' cache, or computes, if that is more.

    The first token comes with the prompts. Of experts, those of one token: a lower bound.
    """
    ended = np.bincount(length, minlength=length.max() + 1)
    rows = (len(length) - np.cumsum(ended))[1:].astype(np.float64)  # alive at token 1, 2, ...
    asked = (prompt.sum() - np.cumsum(np.bincount(length, weights=prompt)))[1:]
    context = asked + rows * np.arange(1, len(rows) + 1)  # positions of all live rows
    weights = layer_parameters(c) + c.hidden_size * c.vocab_size
    work = (2 * weights * rows + _attention(c, context)) / devices / rates.matmul
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * context / devices
    moved = itemsize * (weights + cache) / rates.copy
    return float(np.maximum(work, moved)[rows > 0].sum())


def _attention(c: QwenConfig, pairs):
    """Operations of scores and of weighted sums over so many pairs of positions."""
    return 4.0 * c.num_layers * c.num_heads * c.head_dim * pairs


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


def forward(c: QwenConfig, rows: int, length: int, predicted: int) -> int:
    """Operations of a forward pass: `predicted` positions of each row meet the vocabulary."""
    dense = length * layer_parameters(c) + predicted * c.hidden_size * c.vocab_size
    return rows * (2 * dense + int(_attention(c, length**2)))


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
    logps = (algo.minibatches - 1) / algo.minibatches + (algo.kl.coef > 0)
    passes = logps + algo.epochs * (4 if remat else 3)
    decode, per_token = [], layer_parameters(c) + c.hidden_size * c.vocab_size
    sizes = schedule(B, S, T, ways=ways)
    for slots in sizes.slots:
        cache = 2 * c.num_layers * B * c.num_kv_heads * c.head_dim * slots
        operations = B * (2.0 * per_token + _attention(c, slots))
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
    return Rates(2 * n**3 / _best(_square, x), 2 * m / _best(_copy, y))


@jax.jit
def _square(x: jax.Array) -> jax.Array:
    return x @ x


@jax.jit
def _copy(y: jax.Array) -> jax.Array:
    return y + jnp.uint8(1)


def _best(function, x, times: int = 4) -> float:
    """Seconds of the fastest call after the first."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function(x))
        found.append(time.perf_counter() - began)
    return min(found[1:])
