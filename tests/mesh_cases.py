"""Two tiny networks, a batch and its update on any mesh: what the tests of meshes compare."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gspo_jax.algo.losses import gspo
from gspo_jax.batch import Completions, TrainBatch
from gspo_jax.mesh.sharding import make_mesh, shard_batch, state_shardings
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen
from gspo_jax.numbers.tally import numbers
from gspo_jax.policy import compiled_to_sample
from gspo_jax.rollout.engine import generate
from gspo_jax.update.objective import Gradients, Objective
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import Programs, make_programs
from gspo_jax.update.state import TrainState, init_state

# The sizes are unlike each other, so that a shape in a compiled program says what it is.
DENSE = {
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Nothing of these divides: rows, vocabulary, width, MLP; heads and experts do by 2, as they must.
ODD = DENSE | {
    "vocab_size": 161,
    "hidden_size": 54,
    "intermediate_size": 99,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "model_type": "qwen3",
}
ODD_MOE = MOE | ODD | {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 41}
CONFIGS = {"dense": DENSE, "moe": MOE, "odd": ODD, "odd_moe": ODD_MOE}
B, S, T = 16, 24, 12
ODD_B = 13
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


@cache
def network(kind: str) -> tuple[nnx.GraphDef, Any]:
    """The pure view; its logits spread enough for samples to differ."""
    model = Qwen(QwenConfig.from_hf(CONFIGS[kind]), rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 4
    graphdef, params = nnx.split(model)
    return graphdef, jax.device_get(params)  # of no mesh


def batch(kind: str) -> TrainBatch:
    """Rows of random lengths; of a mixture every other row has experts to be replayed."""
    rng = np.random.default_rng(0)
    rows = ODD_B if "odd" in kind else B
    routing = None
    if kind == "moe":
        draws = rng.permuted(np.tile(np.arange(8, dtype=np.int16), (rows, S, 2, 1)), axis=-1)
        routing = draws[..., :2].copy()
        routing[::2] = -1
    tokens = rng.integers(0, 160, (rows, S)).astype("int32")
    prompt_length = rng.integers(3, 12, rows).astype("int32")
    length = rng.integers(1, T, rows).astype("int32")
    return TrainBatch(
        tokens,
        prompt_length,
        length,
        np.arange(T)[None] < length[:, None],
        rng.normal(size=rows).astype("float32"),
        routing,
    )


def objective(kind: str) -> Objective:
    """GSPO with everything that sums over rows or experts; two microbatches of 8 rows."""
    more = {"routing_replay": "R3", "router_aux_coef": 0.1, "router_z_coef": 0.01}
    if kind == "odd_moe":  # the balance of experts depends on which rows share a microbatch
        more |= {"router_aux_coef": 0.0}
    more = more if "moe" in kind else {}
    loss = partial(gspo, clip_low=0.02, clip_high=0.03)
    return Objective(loss, microbatch_tokens=8 * S, longest=S, entropy_coef=0.1, **more)


def placed(kind: str, mesh) -> tuple[TrainState, Programs]:
    """The state before the first update in its shardings, and the programs of the update."""
    graphdef, params = network(kind)
    optimizer = make_optimizer(optax.constant_schedule(1e-3), state="8bit")
    state = jax.jit(partial(init_state, optimizer=optimizer))(params)
    shardings = state_shardings(state, params, mesh)
    place = partial(shard_batch, mesh=mesh)
    programs = make_programs(graphdef, optimizer, objective(kind), shardings, place=place)
    return jax.device_put(state, shardings), programs


def updated(kind: str, **axes: int) -> tuple[Any, dict[str, Any]]:
    """The gradients of one update on this mesh, and its metrics."""
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        state, programs = placed(kind, mesh)
        total, *given = programs.accumulate(Gradients(state.params), batch(kind))
        gradients = jax.device_get(total.grads.policy)
        _, metrics, _ = programs.apply(state, total, *given)
        return gradients, numbers(jax.device_get(metrics))


def sampled(kind: str, **axes: int) -> Completions:
    """Responses to three prompts, drawn on this mesh."""
    mesh = make_mesh(**axes)
    graphdef, params = network(kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(params, params, mesh))
        return generate(
            compiled_to_sample(graphdef, params, "float32"),
            PROMPTS,
            group_size=5,
            max_new_tokens=8,
            eos_ids=(0,),
            key=jax.random.key(3),
            record_routing="moe" in kind,
        )


def apart(got: Any, want: Any) -> float:
    """The largest difference of any leaf, relative to the largest number in that leaf."""
    each = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), got, want)
    return max(jax.tree.leaves(each))


@cache
def on_one_device(kind: str) -> tuple[Any, Completions]:
    """What every mesh is compared with."""
    return updated(kind, data=1), sampled(kind, data=1)


def assert_as_on_one_device(kind: str, axes: dict[str, int]) -> None:
    """Gradients and metrics within 1e-5 of their size; token ids and experts the same."""
    gradients, metrics = updated(kind, **axes)
    (wanted, wanted_metrics), want = on_one_device(kind)
    assert apart(gradients, wanted) < 1e-5
    assert metrics.keys() == wanted_metrics.keys()
    for key, value in wanted_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    got = sampled(kind, **axes)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-5, atol=1e-6)
    if want.routing is not None:
        np.testing.assert_array_equal(got.routing, want.routing)
