"""Programs and optimizers that tests of updates share: equal ones are traced and compiled once."""

from functools import cache

import optax

from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import make_programs

IDENTITY = optax.identity()
programs_of = cache(make_programs)


@cache
def optimizer_of(learning_rate, state):
    """The default chain at a constant learning rate."""
    return make_optimizer(optax.constant_schedule(learning_rate), state=state)
