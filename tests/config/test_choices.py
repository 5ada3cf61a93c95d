"""A word that chooses among ways of computing is refused where it is taken, if there is none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from gspo_jax.algo.losses import gspo
from gspo_jax.batch import TrainBatch
from gspo_jax.errors import ConfigError, check_choice
from gspo_jax.models.attention import KINDS
from gspo_jax.models.remat import POLICIES, compiler_options, recomputed
from gspo_jax.update.critic import make_critic
from gspo_jax.update.objective import Objective, forward
from gspo_jax.update.optim import make_optimizer, make_schedule
from gspo_jax.update.programs import make_programs

TOKENS = jnp.ones((1, 4), jnp.int32)
BATCH = TrainBatch(
    np.ones((1, 4), np.int32),
    np.full(1, 2, np.int32),
    np.full(1, 2, np.int32),
    np.ones((1, 2), bool),
    np.ones(1, np.float32),
)
RATE = optax.constant_schedule(1e-6)


def objective_of(tiny, **options):
    graphdef, params = nnx.split(tiny)
    return jax.eval_shape(
        lambda: forward(
            graphdef, params, jax.tree.map(jnp.asarray, BATCH), Objective(gspo, **options)
        )
    )


TAKEN = {
    "a model's remat": lambda tiny, x: tiny(TOKENS, remat=x),
    "a model's attention": lambda tiny, x: tiny(TOKENS, attention=x),
    "a layer's remat": lambda tiny, x: recomputed(lambda y: y, x),
    "a compiler's remat": lambda tiny, x: compiler_options(x),
    "an objective's remat": lambda tiny, x: objective_of(tiny, remat=x),
    "an objective's attention": lambda tiny, x: objective_of(tiny, attention=x),
    "an objective's replay": lambda tiny, x: objective_of(tiny, routing_replay=x),
    "an update's remat": lambda tiny, x: make_programs(
        nnx.split(tiny)[0], make_optimizer(RATE), Objective(gspo, remat=x)
    ),
    "an optimizer's state": lambda tiny, x: make_optimizer(RATE, state=x),
    "a schedule": lambda tiny, x: make_schedule(1e-6, kind=x),
    "a critic": lambda tiny, x: make_critic(x, *nnx.split(tiny)),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_boolean_or_an_unknown_word_is_refused_in_one_line(tiny, taken):
    """`remat=False` once recomputed everything: it is not "none", and fell through to "full"."""
    for wrong in ("auto", "fulll"):
        with pytest.raises(ConfigError, match="wanted one of '") as refused:
            TAKEN[taken](tiny, wrong)
        assert repr(wrong) in str(refused.value) and "\n" not in str(refused.value)
    for wrong in (False, True, None, 0):  # in tests, annotations may be quicker
        with pytest.raises((ConfigError, TypeCheckError)):
            TAKEN[taken](tiny, wrong)
        with pytest.raises(ConfigError, match=f"remat={wrong!r}: wanted one of 'none', 'dots'"):
            check_choice("remat", wrong, POLICIES)


def test_every_choice_that_there_is_is_taken(tiny):
    for remat in POLICIES:
        objective_of(tiny, remat=remat)
    assert KINDS == ("xla", "cudnn")
    for take in (
        partial(make_optimizer, RATE, state="8bit"),
        partial(make_schedule, 1e-6, kind="cosine"),
    ):
        take()
