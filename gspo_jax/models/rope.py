"""Frequencies of the rotary position embedding, and what stretches them to longer texts.

    default   f_i = theta^(-2i/H)                                      i = 0 .. H/2 - 1
    linear    f_i / factor
    yarn      f_i where dimension i turns often within the original length, f_i / factor where it
              turns hardly once, a blend in between; cos and sin grow with log(factor)

YaRN: Peng et al., 2023, https://arxiv.org/abs/2309.00071. A model was trained with certain
frequencies in float32, and at position 30000 their last bit is an angle: what is computed here is
rounded step by step as transformers rounds it.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float32

from gspo_jax.errors import DataError
from gspo_jax.models.fields import as_float, check_number, check_size, either, one_of, short

POSITIONS = 2**30  # more than any model has; as in the limits of the sizes
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
KEYS = {  # kind -> the keys that it has besides the common ones
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions are stretched; all but the first two fields are YaRN's.

    Attributes:
        kind: "linear" or "yarn".
        factor: how many times longer texts become; at least 1.
        original_max_position_embeddings: the longest text before the stretching.
        attention_factor: scales cos and sin; None takes it from `factor` and the mscales.
        beta_fast: dimensions that turn more often in the original length keep their frequency.
        beta_slow: dimensions that turn less often are stretched in full.
        mscale: with `mscale_all_dim`, the attention factor is a ratio of two logarithmic terms.
        mscale_all_dim: see `mscale`.
        truncate: the blend begins and ends at whole dimensions.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check(vars(self))

    def to_hf(self) -> dict[str, Any]:
        """The object that a `config.json` has under `rope_scaling`; defaults are left out."""
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        changed = {k: v for k, v, default in values if k in KEYS[self.kind] and v != default}
        return {"rope_type": self.kind, **changed}


def read_rope(hf: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The position base, still to be checked, and the scaling that a `config.json` asks for.

    Both are at the top level (transformers 4: `rope_theta`, `rope_scaling`) or in
    `rope_parameters` (transformers 5). Where a file has both forms they must agree: each version
    would believe another one.

    Raises:
        DataError: a kind, key or value that is not implemented, or impossible.
    """
    base = hf.get("rope_theta")
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise DataError(f"{key}={short(rope)}: wanted an object.")
        inner = rope.get("rope_theta")
        if base is not None and inner is not None and inner != base:
            raise DataError(f"rope_theta={short(base)}, but {key}.rope_theta={short(inner)}.")
        found[key] = (either(inner, base), _read_scaling(key, rope, hf))
    theta, scaling = next(iter(found.values()), (base, None))
    if found.get("rope_parameters", (theta, scaling)) != (theta, scaling):
        raise DataError(
            "rope_scaling and rope_parameters differ; remove one of them, or make them agree "
            "(rope_theta included)."
        )
    theta = as_float(either(theta, 10000.0))
    if scaling is not None and scaling.kind == "yarn":
        check_number("rope_theta", theta, low=1.0, high=1e15)  # its logarithm is a divisor
    return theta, scaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float32[np.ndarray, " half"], float]:
    """f_i in radians per position, [H/2], and the factor on cos and sin: constants of a model."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A power that is rounded once; float32 powers differ from machine to machine.
    power = np.float64(np.float32(theta)) ** exponent.astype(np.float64)
    turn = power.astype(np.float32)  # positions per radian
    if scaling is None:
        return np.float32(1) / turn, 1.0
    if scaling.kind == "linear":
        return np.float32(1) / turn / np.float32(scaling.factor), 1.0
    kept = np.float32(1) - _stretched_share(head_dim, theta, scaling)
    stretched = np.float32(1) / (np.float32(scaling.factor) * turn)
    frequencies = stretched * (np.float32(1) - kept) + np.float32(1) / turn * kept
    return frequencies, _attention_factor(scaling)


def _stretched_share(
    head_dim: int, theta: float, scaling: RopeScaling
) -> Float32[np.ndarray, " half"]:
    """0 where a dimension keeps its frequency, 1 where it is divided by the factor."""
    original = scaling.original_max_position_embeddings
    assert original is not None  # checked in __post_init__

    def dimension(turns: float) -> float:
        """The i whose pair makes so many turns in the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return np.clip(ramp, 0, 1)


def _attention_factor(scaling: RopeScaling) -> float:
    """What is given, or 0.1 log(factor) + 1; a ratio of two such terms where both mscales are."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    log = math.log(scaling.factor)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (0.1 * scaling.mscale * log + 1) / (0.1 * scaling.mscale_all_dim * log + 1)
    return 0.1 * log + 1


def _check(settings: dict[str, Any]) -> None:
    """Raise unless these are fields of a `RopeScaling`: each of its type, and possible together."""
    c = settings
    one_of("rope_type", c["kind"], ("linear", "yarn"))
    check_number("factor", c["factor"], high=1e6)
    if c["factor"] < 1:
        raise DataError(f"factor={c['factor']!r}: wanted at least 1; texts become longer.")
    if c["kind"] == "linear":
        return
    check_size("original_max_position_embeddings", c["original_max_position_embeddings"], POSITIONS)
    for key in ("beta_fast", "beta_slow"):
        check_number(key, c[key], high=1e6)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if c[key] is not None:
            check_number(key, c[key], high=1e6)
    if c["beta_fast"] < c["beta_slow"]:
        raise DataError(
            f"beta_fast={c['beta_fast']!r} is below beta_slow={c['beta_slow']!r}; wanted it above."
        )
    one_of("truncate", c["truncate"], (False, True))


def _read_scaling(key: str, rope: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    """One of the two objects; None where it is the default kind."""
    kind = either(either(rope.get("rope_type"), rope.get("type")), "default")
    if kind != either(rope.get("type"), kind):
        raise DataError(f"{key}.rope_type={short(kind)}, but {key}.type={short(rope['type'])}.")
    if kind not in tuple(KEYS):
        raise DataError(
            f"{key}.rope_type={short(kind)} is not implemented; wanted one of {', '.join(KEYS)}."
        )
    if kind == "yarn" and "attn_factor" in rope:
        # Some libraries multiply their default by it; transformers does not know it.
        raise DataError(
            f"{key}.attn_factor={short(rope['attn_factor'])} is not read; remove it to compute as "
            "transformers, which ignores it, or write attention_factor, the whole factor of cos "
            "and sin."
        )
    extra = sorted(set(rope) - {*COMMON, *KEYS[kind]})
    if extra:
        raise DataError(f"{key}: {short(extra[0])} is not implemented for rope_type {kind!r}.")
    if rope.get("partial_rotary_factor", 1) != 1:
        part = short(rope["partial_rotary_factor"])
        raise DataError(f"{key}.partial_rotary_factor={part} is not implemented; wanted 1.")
    if kind == "default":
        return None
    if "factor" not in rope:
        raise DataError(f"{key}.factor is missing; wanted a number from 1 on.")
    values: dict[str, Any] = {f.name: f.default for f in fields(RopeScaling)} | {"kind": kind}
    values |= {k: as_float(v) for k, v in rope.items() if k in KEYS[kind]}
    if kind == "yarn":
        values |= _yarn_defaults(key, rope, hf)
    try:
        _check(values)
    except DataError as error:
        raise DataError(f"{key}.{error}") from None
    return RopeScaling(**values)


def _yarn_defaults(key: str, rope: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    """The values that transformers takes from elsewhere; to it a zero is as good as no value."""
    name = "original_max_position_embeddings"
    outer, longest = hf.get(name), hf.get("max_position_embeddings", 32768)
    if outer is not None and outer != rope.get(name):  # its versions disagree which one counts
        raise DataError(f"{name}={short(outer)}, but {key}.{name}={short(rope.get(name))}.")
    check_size("max_position_embeddings", longest, POSITIONS)
    original = either(rope.get(name), longest)
    check_size(f"{key}.{name}", original, POSITIONS)
    values = {name: original, "factor": as_float(either(rope["factor"], longest / original))}
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": None, "mscale_all_dim": None}
    return values | {k: d for k, d in defaults.items() if rope.get(k) in (None, 0)}
