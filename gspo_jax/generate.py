"""The sampler: prompts in, completions out, in three jitted programs that never leave the device.

    prefill   left-padded prompts -> their cache, each prompt once
    share     the cache and the first logits repeated for the G rows of a group, first token drawn
    decode    a fixed number of steps over donated buffers; the host looks between chunks whether
              every row has met an EOS

Keys are stateless: row (prompt p, sample g) draws token t with fold_in(fold_in(fold_in(key, p),
g), t). So the samples do not depend on batch layout, device count, chunk length or when other
rows stop.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gspo_jax.batch import Completions
from gspo_jax.models.cache import Cache, share
from gspo_jax.models.qwen import Qwen, head_logits
from gspo_jax.sharding import constrain

PureModel = tuple[nnx.GraphDef, nnx.State]


class Sampling(NamedTuple):
    """How a token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class DecodeState(NamedTuple):
    """All that changes while decoding; donated from chunk to chunk."""

    cache: Cache  # W slots: the prompt's S, then one per response token
    live: Bool[Array, "B W"]  # slots that hold real tokens
    tokens: Int[Array, "B T"]
    logp: Float[Array, "B T"]
    done: Bool[Array, " B"]  # rows that have drawn an EOS
    step: Int[Array, ""]  # tokens drawn so far


def generate(
    model: Qwen | PureModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int],
    key: Key[Array, ""],
    first_prompt: int = 0,
    chunk: int = 16,
) -> Completions:
    """Sample `group_size` completions of each prompt; row b answers prompt b // group_size.

    Args:
        model: the network, or its pure view `nnx.split(model)`; it computes in the dtype of its
            parameters.
        prompts: token ids of each prompt, at least one token long.
        group_size: completions per prompt; the prompt is run once for all of them.
        max_new_tokens: response tokens at most; a row without EOS by then is `truncated`.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        eos_ids: any of these ends a row; it is kept, and is part of `mask`.
        key: a `jax.random.key`, folded with prompt, sample and position.
        first_prompt: the first prompt's own number, where `prompts` is part of a longer list.
        chunk: decode steps between two looks at who is done.

    Returns:
        Completions on the host. `logp` is the log-probability of each token under the full
        vocabulary at `temperature` (at 1 where that is 0), before top_p and top_k.
    """
    graphdef, params = nnx.split(model) if isinstance(model, Qwen) else model
    sampling = Sampling(float(temperature), float(top_p), int(top_k))
    chunk = max(1, min(chunk, max_new_tokens - 1))
    chunks = -(-(max_new_tokens - 1) // chunk)
    capacity = 1 + chunks * chunk

    tokens, mask = _pad_left(prompts)
    numbers = jnp.arange(len(prompts), dtype=jnp.int32) + jnp.int32(first_prompt)
    row_keys = _row_keys(key, numbers, group_size)
    eos = jnp.asarray(sorted(set(eos_ids)), jnp.int32)
    start = jnp.asarray(np.repeat(mask.sum(1), group_size), jnp.int32)

    last, cache = _prefill(graphdef, params, tokens, mask)
    state = _share(last, cache, mask, row_keys, eos, group_size, capacity, sampling)
    for _ in range(chunks):
        if bool(state.done.all()):
            break
        state = _decode(graphdef, params, state, start, row_keys, eos, chunk, sampling)
    return _completions(state, eos_ids, max_new_tokens)


@partial(jax.jit, static_argnums=0)
def _prefill(graphdef, params, tokens, mask) -> tuple[Float[Array, "P V"], Cache]:
    """Logits after the last prompt token, and the prompt's cache."""
    model = nnx.merge(graphdef, params)
    tokens, mask = constrain(tokens, "batch", None), constrain(mask, "batch", None)
    hidden, cache = model.prefill(tokens, mask)
    return head_logits(hidden[:, -1], model.unembed()), cache


@partial(jax.jit, static_argnums=(5, 6, 7))
def _share(logits, cache, mask, row_keys, eos, group_size, capacity, sampling) -> DecodeState:
    """The state of all B rows after their first token, which is drawn from the prompt's logits."""
    B, S = logits.shape[0] * group_size, mask.shape[1]
    logits = constrain(jnp.repeat(logits, group_size, axis=0), "batch", None)
    token, logp = sample(logits, _fold(row_keys, jnp.int32(0)), sampling)
    cache = jax.tree.map(
        lambda x: constrain(x, "batch", None, None, None), share(cache, group_size, S + capacity)
    )
    live = jnp.repeat(mask, group_size, axis=0)
    return DecodeState(
        cache=cache,
        live=jnp.pad(live, ((0, 0), (0, capacity))),
        tokens=jnp.zeros((B, capacity), jnp.int32).at[:, 0].set(token),
        logp=jnp.zeros((B, capacity), logp.dtype).at[:, 0].set(logp),
        done=_is_eos(token, eos),
        step=jnp.int32(1),
    )


@partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def _decode(graphdef, params, state, start, row_keys, eos, steps, sampling) -> DecodeState:
    """`steps` more tokens for every row. Rows that are done go on, and are masked at the end."""
    model = nnx.merge(graphdef, params)
    unembed = model.unembed()
    prompt_slots = state.live.shape[1] - state.tokens.shape[1]

    def draw_one(_, s: DecodeState) -> DecodeState:
        previous = jax.lax.dynamic_index_in_dim(s.tokens, s.step - 1, axis=1, keepdims=False)
        slot = prompt_slots + s.step - 1
        live = s.live | (jnp.arange(s.live.shape[1]) == slot)[None]
        hidden, cache = model.decode(
            previous, s.cache, slot=slot, position=start + s.step - 1, live=live
        )
        token, logp = sample(head_logits(hidden, unembed), _fold(row_keys, s.step), sampling)
        return DecodeState(
            cache=cache,
            live=live,
            tokens=jax.lax.dynamic_update_index_in_dim(s.tokens, token, s.step, axis=1),
            logp=jax.lax.dynamic_update_index_in_dim(s.logp, logp, s.step, axis=1),
            done=s.done | _is_eos(token, eos),
            step=s.step + 1,
        )

    return jax.lax.fori_loop(0, steps, draw_one, state)


def bucket(length: int) -> int:
    """`length` rounded up so that few different shapes, and so few compilations, arise.

    At most an eighth is padding beyond 128 positions, in at most eight steps per octave; below,
    multiples of 16.
    """
    octave = 1 << (length - 1).bit_length()
    step = max(octave // 16, 16)
    return -(-length // step) * step


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per row by the Gumbel-max rule, with its log-probability.

    argmax(z / temperature + gumbel) is a draw from softmax(z / temperature). The log-probability
    is that of the full vocabulary at this temperature, as the training program computes it.
    """
    z = logits / sampling.temperature if sampling.temperature > 0 else logits
    choice = z
    if sampling.temperature > 0:
        choice = keep_likely(z, sampling.top_p, sampling.top_k)
        choice = choice + jax.vmap(lambda k: jax.random.gumbel(k, z.shape[1:], z.dtype))(keys)
    token = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    logp = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(z, axis=-1)
    return token, logp


def keep_likely(z: Float[Array, "B V"], top_p: float, top_k: int) -> Float[Array, "B V"]:
    """Logits with -inf outside the top_k most likely tokens and the top_p nucleus of those.

    The nucleus is { p >= τ } for the largest τ whose mass reaches top_p. 40 bisections find τ to
    1e-12 of the largest probability: a few passes over the row, and no sort of the vocabulary.
    """
    if top_k:
        kth = jax.lax.top_k(z, top_k)[0][:, -1:]
        z = jnp.where(z >= kth, z, -jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(z, axis=-1)

        def halve(_, bounds):
            low, high = bounds  # mass(p >= low) >= top_p > mass(p >= high)
            mid = (low + high) / 2
            enough = jnp.sum(p, axis=-1, keepdims=True, where=p >= mid) >= top_p
            return jnp.where(enough, mid, low), jnp.where(enough, high, mid)

        top = jnp.max(p, axis=-1, keepdims=True)
        low, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(top), top * 1.0001))
        z = jnp.where(p >= low, z, -jnp.inf)
    return z


@partial(jax.jit, static_argnums=2)
def _row_keys(key, numbers, group_size) -> Key[Array, " B"]:
    prompt_keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
    samples = jnp.arange(group_size, dtype=jnp.int32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(prompt_keys, samples).reshape(-1)


def _fold(row_keys: Key[Array, " B"], position: Int[Array, ""]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(row_keys, position)


def _is_eos(token: Int[Array, " B"], eos: Int[Array, " E"]) -> Bool[Array, " B"]:
    return jnp.any(token[:, None] == eos[None], axis=1)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as [P, S] ids and mask, their last tokens in the last column."""
    S = bucket(max(len(p) for p in prompts))
    tokens, mask = np.zeros((len(prompts), S), np.int32), np.zeros((len(prompts), S), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, S - len(prompt) :] = prompt
        mask[row, S - len(prompt) :] = True
    return tokens, mask


def _completions(state: DecodeState, eos_ids: Sequence[int], limit: int) -> Completions:
    """Cut at the limit, and mask what lies after the first EOS of each row."""
    tokens, logp = jax.device_get((state.tokens, state.logp))
    tokens, logp = tokens[:, :limit], logp[:, :limit]
    drawn = np.arange(limit)[None] < int(state.step)
    is_eos = np.isin(tokens, list(eos_ids)) & drawn
    before = np.cumsum(is_eos, axis=1) - is_eos  # EOS tokens to the left
    mask = (before == 0) & drawn
    return Completions(tokens, mask, logp, truncated=np.asarray(~is_eos.any(axis=1)))
