"""Row 16: no two samples share their randomness, on any mesh."""

from functools import partial

import jax
import numpy as np
import pytest
from mesh_cases import PROMPTS, network

from gspo_jax.mesh.sharding import make_mesh, state_shardings
from gspo_jax.rollout import sampling
from gspo_jax.rollout.engine import generate
from gspo_jax.update.objective import cast

STEPS, P, G, T = 3, 64, 32, 8  # 49,152 draws


def row_keys(step):
    """As `generate` makes them: 64 prompts with 32 samples each."""
    key = jax.random.fold_in(jax.random.key(0), step)
    number = np.arange(P * G, dtype=np.int32)
    return sampling.row_keys(key, number // G, number % G)


def test_row_16_every_prompt_sample_and_position_of_every_step_draws_by_a_key_of_its_own():
    fold = jax.jit(jax.vmap(sampling.at_position, (None, 0)))
    position = np.arange(T, dtype=np.int32)
    keys = [jax.random.key_data(fold(row_keys(step), position)) for step in range(STEPS)]
    keys = np.concatenate([np.asarray(k).reshape(-1, 2) for k in keys])
    assert len(np.unique(keys, axis=0)) == len(keys) == STEPS * P * G * T == 49_152


def responses(axes):
    """Of a network that finds all tokens equally likely, to one prompt over and over."""
    graphdef, params = network("dense")
    params = jax.tree.map(np.zeros_like, params)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        params = jax.device_put(cast(params, "float32"), state_shardings(params, params, mesh))
        sample = partial(generate, (graphdef, params), group_size=G, max_new_tokens=T)
        return sample([PROMPTS[0]] * P, eos_ids=(-1,), key=jax.random.key(1)).tokens


@pytest.fixture(scope="module")
def alone():
    return responses({"data": 1})


@pytest.mark.faults
def test_row_16_samples_of_one_prompt_are_all_different(alone):
    # 2,048 responses of 8 tokens of 160: two alike by chance once in 10^11 tries.
    assert alone.shape == (P * G, T)
    assert len(np.unique(alone, axis=0)) == P * G == 2_048
    assert len(np.unique(alone)) > 150  # of 160 tokens: they are draws, not one choice


@pytest.mark.faults
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_row_16_the_draws_do_not_depend_on_how_rows_and_vocabulary_are_split(alone, axes):
    np.testing.assert_array_equal(responses(axes), alone)
