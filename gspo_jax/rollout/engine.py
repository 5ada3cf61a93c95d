"""The sampler: prompts in, completions out, in few jitted programs that never leave the device.

    prefill   left-padded prompts -> their cache, each prompt once
    fit       rows of a cache in more slots: shares a prompt's cache with its G rows, makes room
              as decoding goes on, and leaves out rows that are done
    decode    a fixed number of steps over a donated cache that is no longer than they need

The host dispatches a chunk of steps, and only then looks at what the chunk before has drawn: the
device never waits, and at most one chunk is decoded in vain. Where at most half of the rows are
left without an EOS, they go on in half the batch. `schedule` fixes beforehand, from shapes alone,
which sizes there can be; `sampling` says how a token is drawn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gspo_jax.batch import Completions
from gspo_jax.files.stopping import raise_if_asked
from gspo_jax.mesh.distributed import host
from gspo_jax.mesh.sharding import batch_ways, constrain
from gspo_jax.models.cache import AXES, Cache, LayerCache, fit
from gspo_jax.models.qwen import Qwen, head_logits
from gspo_jax.rollout.sampling import Sampling, at_position, row_keys, sample
from gspo_jax.rollout.schedule import Schedule, bucket, schedule

PureModel = tuple[nnx.GraphDef, nnx.State]


class Rows(NamedTuple):
    """What decoding knows of each row of its batch, besides the cache."""

    token: Int[Array, " B"]  # drawn last
    start: Int[Array, " B"]  # length of its prompt
    key: Key[Array, " B"]


class Drawn(NamedTuple):
    """What `n` steps leave behind, of every row of their batch."""

    tokens: Int[Array, "n B"]
    logp: Float[Array, "n B"]
    experts: Int[Array, "n B M X"] | None = None  # at the position from which the token was drawn


class Batch(NamedTuple):
    """The rows that are decoded together."""

    number: Int[np.ndarray, " C"]  # of each, among all that are wanted
    rows: Rows
    cache: Cache


Record = list[tuple[np.ndarray, Drawn]]  # chunk by chunk: the numbers of its rows, their tokens


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
    chunk: int | None = None,
    record_routing: bool = False,
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
        chunk: decode steps between two looks at who is done; see `schedule`.
        record_routing: also return the experts that every token went to.

    Returns:
        Completions on the host. `logp` is the log-probability of each token under the full
        vocabulary at `temperature` (at 1 where that is 0), before top_p and top_k.
    """
    graphdef, params = nnx.split(model) if isinstance(model, Qwen) else model
    sampling = Sampling(float(temperature), float(top_p), int(top_k))
    tokens, mask = _pad_left(prompts, batch_ways())
    P, B, S = len(prompts), len(prompts) * group_size, tokens.shape[1]
    sizes = schedule(B, S, max_new_tokens, ways=batch_ways(), chunk=chunk)

    number = np.arange(sizes.batches[0], dtype=np.int32)
    prompt_of = np.minimum(number // group_size, P - 1)  # rows from B on are fillers
    keys = row_keys(key, prompt_of + np.int32(first_prompt), number % group_size)
    start = mask.sum(1, dtype=np.int32)[prompt_of]
    logits, cache, experts = _prefill(graphdef, params, tokens, mask, record_routing)
    rows, first = _begin(logits, experts, prompt_of, start, keys, sampling)
    if sizes.slots:
        cache = _refit(cache, prompt_of, sizes.slots[0])

    def decode(cache: Cache, rows: Rows, step: np.int32) -> tuple[Cache, Rows, Drawn]:
        fixed = {"sampling": sampling, "steps": sizes.steps, "record_routing": record_routing}
        return _decode(graphdef, params, cache, rows, np.int32(S), step, **fixed)

    eos = np.asarray(sorted(set(eos_ids)), np.int32)
    batch = Batch(np.arange(len(number)), rows, cache)
    record = _decode_all(decode, batch, first, sizes, ended=number >= B, eos=eos)
    completions, drawn_experts = _completions(record, B, max_new_tokens, eos)
    if experts is None or drawn_experts is None:
        return completions
    routing = _routing(host(experts)[:P], mask[:P], drawn_experts, completions.mask)
    return completions._replace(routing=routing)


def _decode_all(
    decode: Callable[[Cache, Rows, np.int32], tuple[Cache, Rows, Drawn]],
    batch: Batch,
    first: Drawn,
    sizes: Schedule,
    *,
    ended: Bool[np.ndarray, " B"],
    eos: Int[np.ndarray, " E"],
) -> Record:
    """Chunk after chunk, until every row has met an EOS.

    Args:
        decode: the next `sizes.steps` tokens of a batch, from this step on.
        batch, first: all rows, and the first token of each.
        ended: rows that need no decoding beforehand, the fillers; it is kept up to date.
    """
    record = [(batch.number, first)]
    for chunk in range(len(sizes.slots)):
        raise_if_asked()  # to stop: nothing has changed yet
        batch = _resized(batch, sizes, chunk, ended)
        cache, rows, drawn = decode(batch.cache, batch.rows, np.int32(1 + chunk * sizes.steps))
        batch = Batch(batch.number, rows, cache)
        jax.tree.map(lambda x: x.copy_to_host_async(), drawn)
        record.append((batch.number, drawn))
        number, before = record[-2]  # ready, or soon: the device is already at work on the last
        ended[number] |= np.isin(before.tokens, eos).any(axis=0)
        if ended.all():
            break
    return record


def _resized(batch: Batch, sizes: Schedule, chunk: int, ended: Bool[np.ndarray, " B"]) -> Batch:
    """The batch of this chunk: without some that have ended, in a cache that is long enough."""
    number, rows, cache = batch
    alive, slots = ~ended[number], sizes.slots[chunk]
    size = sizes.batch(chunk, len(number), int(alive.sum()))
    if size < len(number):  # the living first; who has ended fills up what is left
        stay = np.argsort(~alive, kind="stable")[:size]
        return Batch(number[stay], _pick(rows, stay), _refit(cache, stay, slots))
    if slots > cache[0].k.shape[2]:
        return Batch(number, rows, _refit(cache, None, slots))
    return batch


@partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    graphdef, params, tokens, mask, record_routing
) -> tuple[Float[Array, "P V"], Cache, Int[Array, "P S M X"] | None]:
    """Logits after the last prompt token, the prompt's cache, and its experts if asked for."""
    model = nnx.merge(graphdef, params)
    tokens, mask = constrain(tokens, "batch", None), constrain(mask, "batch", None)
    hidden, cache, experts = model.prefill(tokens, mask)
    logits = head_logits(hidden[:, -1], model.unembed())
    logits = constrain(logits, "batch", "vocab")
    return logits, cache, experts if record_routing else None


@partial(jax.jit, static_argnames="sampling")
def _begin(logits, experts, prompt_of, start, keys, sampling) -> tuple[Rows, Drawn]:
    """Each row's first token, drawn from its prompt's logits."""
    logits = constrain(logits[prompt_of], "batch", "vocab")
    token, logp = sample(logits, at_position(keys, jnp.int32(0)), sampling)
    experts = None if experts is None else experts[prompt_of, -1][None]
    return _split(Rows(token, start, keys)), _everywhere(Drawn(token[None], logp[None], experts))


@partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "steps", "record_routing"),
    donate_argnames="cache",
)
def _decode(
    graphdef, params, cache, rows, prompt_slots, step, *, sampling, steps, record_routing
) -> tuple[Cache, Rows, Drawn]:
    """Tokens `step` to `step + steps` of every row. Rows that have ended go on regardless."""
    model = nnx.merge(graphdef, params)
    unembed = model.unembed()
    slots = jnp.arange(cache[0].k.shape[2], dtype=jnp.int32)[None]
    real = slots >= (prompt_slots - rows.start)[:, None]  # right of the padding

    def draw_one(carry, t):
        cache, token = carry
        slot = prompt_slots + t - 1
        hidden, cache, experts = model.decode(
            token, cache, slot=slot, position=rows.start + t - 1, live=real & (slots <= slot)
        )
        token, logp = sample(head_logits(hidden, unembed), at_position(rows.key, t), sampling)
        experts = experts[:, 0] if record_routing and experts is not None else None
        return (cache, token), Drawn(token, logp, experts)

    number = step + jnp.arange(steps, dtype=jnp.int32)
    (cache, token), drawn = jax.lax.scan(draw_one, (cache, rows.token), number)
    return cache, _split(rows._replace(token=token)), _everywhere(drawn)


def _refit(cache: Cache, rows: Int[np.ndarray, " C"] | None, slots: int) -> Cache:
    """`fit` of every buffer in turn, each freed before the next: never two caches at a time."""

    def move(x: Array) -> Array:
        y = _fit(x, rows, slots)
        x.delete()
        return y

    return tuple(LayerCache(move(layer.k), move(layer.v)) for layer in cache)


@partial(jax.jit, static_argnums=2)
def _fit(x, rows, slots) -> Float[Array, "C K W H"]:
    return constrain(fit(x, rows, slots), *AXES)


@jax.jit
def _pick(rows: Rows, kept) -> Rows:
    return _split(jax.tree.map(lambda x: x[kept], rows))


def _split(rows: Rows) -> Rows:
    return jax.tree.map(lambda x: constrain(x, "batch"), rows)


def _everywhere(drawn: Drawn) -> Drawn:
    """On every device: each process looks at all rows, to know which are done."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), drawn)


def _pad_left(prompts: Sequence[Sequence[int]], ways: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as [P, S] ids and mask, their last tokens in the last column.

    The last is repeated until `ways` divides P.
    """
    prompts = [*prompts, *[prompts[-1]] * (-len(prompts) % ways)]
    S = bucket(max(len(p) for p in prompts))
    tokens, mask = np.zeros((len(prompts), S), np.int32), np.zeros((len(prompts), S), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, S - len(prompt) :] = prompt
        mask[row, S - len(prompt) :] = True
    return tokens, mask


def _completions(
    record: Record, rows: int, limit: int, eos: np.ndarray
) -> tuple[Completions, np.ndarray | None]:
    """The chunks put together, masked after the first EOS of each row, and their experts.

    Rows that were left out have zeros from there on: an EOS lies before.
    """

    def join(*chunks: Array) -> np.ndarray:
        parts = host(chunks)
        whole = np.zeros((len(record[0][0]), limit, *parts[0].shape[2:]), parts[0].dtype)
        step = 0
        for (number, _), part in zip(record, parts, strict=True):
            part = part[: limit - step].swapaxes(0, 1)
            whole[number, step : step + part.shape[1]] = part
            step += part.shape[1]
        return whole[:rows]

    drawn = jax.tree.map(join, *(drawn for _, drawn in record))
    is_eos = np.isin(drawn.tokens, eos)
    mask = np.cumsum(is_eos, axis=1) == is_eos  # no EOS to the left
    truncated = np.asarray(~is_eos.any(axis=1))
    return Completions(drawn.tokens, mask, drawn.logp, truncated), drawn.experts


def _routing(
    prompts: Int[np.ndarray, "P S M X"],
    prompt_mask: Bool[np.ndarray, "P S"],
    drawn: Int[np.ndarray, "B T M X"],
    mask: Bool[np.ndarray, "B T"],
) -> Int[np.ndarray, "B R M X"]:
    """The experts of each row's prompt, then of its response but for the last token.

    Response token t was drawn from the position before it, so those experts come one earlier.
    """
    (B, T), S = mask.shape, prompts.shape[1]
    routing = np.full((B, S + T, *drawn.shape[2:]), -1, np.int16)
    for row in range(B):
        prompt = row // (B // len(prompts))
        asked, length = prompts[prompt, prompt_mask[prompt]], mask[row].sum()
        routing[row, : len(asked)] = asked
        routing[row, len(asked) - 1 : len(asked) - 1 + length] = drawn[row, :length]
    return routing
