"""Runs of tiny networks on devices that are not here, and their programs, each compiled once."""

from functools import cache
from typing import Any

from mesh_cases import CONFIGS

from gspo_jax.config.load import load_config
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.config import QwenConfig
from gspo_jax.plan.account import Account, compiled
from gspo_jax.plan.memory import Sketch
from gspo_jax.plan.programs import programs, sketch
from gspo_jax.plan.target import target_of
from gspo_jax.policy import Problems
from gspo_jax.tasks import Task

PROMPT, T = 56, 144
S = PROMPT + T  # no other size of the networks: [S, S] says what it is
Axes = tuple[tuple[str, int], ...]


@cache
def described(kind: str, target: str, axes: Axes, dtype: str = "bfloat16") -> Sketch:
    """A run of a tiny network with full recomputation, in microbatches of 16 rows."""
    settings = {
        "model.dtype": dtype,
        "model.remat": "full",
        "rollout.prompts": 16,
        "rollout.group_size": 4,
        "rollout.max_completion_length": T,
        "algo.microbatch": 16,
        "algo.routing_replay": "R2" if kind == "moe" else "off",
        **{f"mesh.{axis}": n for axis, n in axes},
    }
    config = load_config(None, [f"{name}={value}" for name, value in settings.items()])
    task = Task("none", {}, _nothing, _nothing)
    problems = Problems(task, {"train": [], "test": []}, 0, _nothing, PROMPT, PROMPT)
    to = target_of(target)
    mesh = make_mesh(**vars(config.mesh), devices=to.devices)
    return sketch(config, QwenConfig.from_hf(CONFIGS[kind]), problems, mesh, limit=to.limit)


def _nothing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("shapes alone")


@cache
def account_of(name: str, kind: str, target: str, axes: Axes) -> Account:
    """The largest program of this name."""
    planned = [p for p in programs(described(kind, target, axes)) if p.name == name]
    planned = [p for p in planned if p.stage != "evaluate"] or planned
    return compiled(max(planned, key=lambda p: p.alive))  # of equal ones the first, the widest
