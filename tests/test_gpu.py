"""On a GPU in bfloat16 the library agrees with itself in float32 on the CPU (`make gpu-check`)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gspo_jax.algo.logps import token_logps
from gspo_jax.algo.losses import gspo
from gspo_jax.batch import TrainBatch
from gspo_jax.models.attention import Choice, choose
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen
from gspo_jax.rollout.engine import generate
from gspo_jax.update.objective import Objective, cast, forward
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import make_programs
from gspo_jax.update.state import init_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU here"),
]
# Head dimension 64 and widths of hundreds, as kernels for attention want them.
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
ROWS, WIDTH, PROMPT = 8, 256, 64
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def view():
    """A network whose log-probabilities spread over some nats; parameters on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return nnx.split(Qwen(QwenConfig.from_hf(SHAPE), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def batch():
    """Rows of different lengths, poisoned with a constant token where they are padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, SHAPE["vocab_size"], (ROWS, WIDTH), dtype=np.int32)
    length = np.linspace(40, WIDTH - PROMPT, ROWS).astype(np.int32)
    mask = np.arange(WIDTH - PROMPT)[None] < length[:, None]
    tokens[:, PROMPT:][~mask] = 7
    adv = rng.normal(size=ROWS).astype(np.float32)
    return TrainBatch(tokens, np.full(ROWS, PROMPT, np.int32), length, mask, adv)


def on(device, function, *args):
    """The function's result on the host, computed on this device."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(function)(*jax.device_put(args, device)))


def test_log_probabilities_in_bfloat16_agree_with_float32_on_the_cpu(view, batch):
    graphdef, params = view

    def logps(dtype):
        objective = Objective(gspo, dtype=dtype)
        return lambda p, b: forward(graphdef, p, b, objective)[1].logp

    exact = on(jax.devices("cpu")[0], logps("float32"), params, batch)
    coarse = on(jax.devices()[0], logps("bfloat16"), params, batch)
    error = np.abs(exact - coarse)[batch.mask]
    # bfloat16 keeps 8 bits: 0.4 % per rounding of logits of size 1 to 4, over two layers.
    assert error.mean() < 0.02 and error.max() < 0.2
    # GSPO's ratio is the mean over a response: its error must average out, not add up.
    means = [(x * batch.mask).sum(1) / batch.mask.sum(1) for x in (exact, coarse)]
    np.testing.assert_allclose(*means, atol=5e-3)


def test_an_update_in_bfloat16_goes_where_float32_on_the_cpu_goes(view, batch):
    graphdef, params = view
    optimizer = make_optimizer(optax.constant_schedule(1e-3), state="8bit")

    def update(dtype, device):
        with jax.default_device(device):
            objective = Objective(gspo, dtype=dtype, microbatch_tokens=2 * WIDTH)
            programs = make_programs(graphdef, optimizer, objective)
            mine = jax.tree.map(lambda x: jnp.array(x, copy=True), jax.device_put(params, device))
            state, metrics, _ = programs.update(init_state(mine, optimizer), batch)
            return jax.device_get((state.params, state.skipped, metrics))

    exact, _, told = update("float32", jax.devices("cpu")[0])
    coarse, skipped, found = update("bfloat16", jax.devices()[0])
    assert skipped == 0
    np.testing.assert_allclose(
        found["ratio_mean"].value, 1.0, atol=1e-6
    )  # on-policy, to the last bit
    np.testing.assert_allclose(found["grad_norm"].value, told["grad_norm"].value, rtol=0.03)
    start = jax.device_get(params)
    moves = [
        np.concatenate(
            [np.ravel(b - a) for a, b in zip(*map(jax.tree.leaves, (start, end)), strict=True)]
        )
        for end in (exact, coarse)
    ]
    # Adam's first step is near the gradients' signs, so small ones flip: a cosine, not a bound.
    cosine = np.dot(*moves) / np.prod([np.linalg.norm(m) for m in moves])
    assert cosine > 0.97


def test_sampling_in_bfloat16_reports_the_log_probabilities_of_float32(view):
    graphdef, params = view
    sampler = jax.device_put(cast(params, "bfloat16"), jax.devices()[0])
    prompts = [[5, 6, 7, 8] * 8, [9, 10, 11]]
    drawn = generate(
        (graphdef, sampler), prompts, group_size=4, max_new_tokens=64, eos_ids=(), key=KEY
    )
    assert drawn.mask.all()  # no id ends a row
    rows = [prompts[b // 4] + drawn.tokens[b].tolist() for b in range(8)]
    start = np.array([len(prompts[b // 4]) for b in range(8)], np.int32)
    tokens = np.array([row + [0] * (96 - len(row)) for row in rows], np.int32)
    batch = TrainBatch(tokens, start, np.full(8, 64, np.int32), drawn.mask, np.zeros(8, np.float32))
    exact = on(
        jax.devices("cpu")[0],
        lambda p, b: forward(graphdef, p, b, Objective(gspo))[1].logp,
        params,
        batch,
    )
    error = np.abs(exact - drawn.logp)
    assert error.mean() < 0.02 and error.max() < 0.2


def test_the_head_never_holds_the_logits_of_all_tokens():
    """By the allocator's own peak: [16384, 32768] float32 would be 2 GiB, a chunk is 1/16 of it."""
    tokens, width, vocabulary, chunk = 16384, 512, 32768, 1024
    stats = jax.devices()[0].memory_stats()
    if not stats:
        pytest.skip("this backend keeps no memory statistics")
    hidden = jnp.ones((1, tokens, width), jnp.bfloat16)
    head = jnp.ones((width, vocabulary), jnp.bfloat16)
    ids = jnp.zeros((1, tokens), jnp.int32)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(hidden, head):
        return jnp.sum(token_logps(hidden, head, ids, chunk=chunk)[0])

    compiled = gradient.lower(hidden, head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
    # The peak is that of the process: it only says something where it was low before.
    if stats["peak_bytes_in_use"] < 2**30:
        jax.block_until_ready(compiled(hidden, head))
        assert jax.devices()[0].memory_stats()["peak_bytes_in_use"] < 2**30


def test_cudnn_attention_is_right_here_and_chosen():
    """Or `choose` says what is wrong with it; heads as of R1-Distill-1.5B and of Qwen3-8B."""
    for heads, kv_heads in ((12, 2), (32, 8)):
        assert choose("bfloat16", heads, kv_heads, 128) == Choice("cudnn")
