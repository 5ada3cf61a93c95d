"""The sampler: prompts in, completions out, in few jitted programs that never leave the device.

    prefill   left-padded prompts -> their cache, each prompt once
    fit       rows of a cache in more slots: shares a prompt's cache with its G rows, makes room
              as decoding goes on, and leaves out rows that are done
    decode    a fixed number of steps over a donated cache that is no longer than they need

The host dispatches a chunk of steps, and only then looks at what the chunk before has drawn: the
device never waits, and at most one chunk is decoded in vain. Where at most half of the rows are
left without an EOS, they go on in half the batch. `schedule` fixes beforehand, from shapes alone,
which sizes there can be; `programs_for` lists them.

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
from gspo_jax.files.stopping import raise_if_asked
from gspo_jax.mesh.distributed import host
from gspo_jax.mesh.sharding import batch_ways, constrain
from gspo_jax.models.cache import AXES, Cache, LayerCache, fit
from gspo_jax.models.qwen import Qwen, head_logits

PureModel = tuple[nnx.GraphDef, nnx.State]

BATCHES = 5  # sizes of the batch at most, each half of the one before ...
SMALLEST_BATCH = 8  # ... and none below this many rows
LAST_SHRINK = 16  # with fewer steps left, a smaller batch is not worth its compilation
LENGTHS = 8  # lengths of the cache at most, and none ...
SHORTEST_GROWTH = 128  # ... that adds fewer slots than this


class Sampling(NamedTuple):
    """How a token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


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


Record = list[tuple[np.ndarray, Drawn]]  # chunk by chunk: the numbers of its rows, their tokens


class Schedule(NamedTuple):
    """Sizes that one call can need: `steps` per chunk, and the cache's slots in each chunk."""

    steps: int
    slots: tuple[int, ...]
    batches: tuple[int, ...]  # rows, largest first

    def batch(self, chunk: int, now: int, alive: int) -> int:
        """Rows of a chunk: the smallest size that holds the living; near the end, as it is."""
        if (len(self.slots) - chunk) * self.steps < LAST_SHRINK:
            return now
        return min(b for b in self.batches if b >= alive)


class Program(NamedTuple):
    """The shape of one compiled decode program."""

    batch: int
    slots: int
    steps: int


def schedule(
    rows: int, prompt_slots: int, max_new_tokens: int, *, ways: int = 1, chunk: int | None = None
) -> Schedule:
    """How `rows` rows are decoded, from shapes alone.

    A chunk is a sixteenth of the response, within 4 and 32 steps: the end of a row takes effect
    one to two chunks later. Slots come in at most 8 portions of 128 or more; batches are halved
    four times at most.

    Args:
        rows: completions wanted.
        prompt_slots: padded length of the prompts.
        max_new_tokens: response tokens at most; the first comes with the prompts.
        ways: devices that the rows are split over; every batch is a multiple of it.
        chunk: decode steps between two looks at who is done.
    """
    rest = max_new_tokens - 1
    chunks = -(-rest // (chunk or min(max(max_new_tokens // 16, 4), 32)))
    steps = -(-rest // max(chunks, 1))
    portion = max(SHORTEST_GROWTH, (1 << rest.bit_length()) // LENGTHS)
    ends = [(n + 1) * steps for n in range(chunks)]
    slots = tuple(prompt_slots + min(_round_up(end, portion), ends[-1]) for end in ends)
    batches = [_round_up(rows, ways)]
    while len(batches) < BATCHES and (chunks - 1) * steps >= LAST_SHRINK:
        half = _round_up(-(-batches[-1] // 2), ways)
        if half < SMALLEST_BATCH or half == batches[-1]:
            break
        batches.append(half)
    return Schedule(steps, slots, tuple(batches))


def programs_for(
    rows: int, prompt_slots: int, max_new_tokens: int, *, ways: int = 1, chunk: int | None = None
) -> list[Program]:
    """Every decode program that `generate` may compile for these sizes; arguments as `schedule`.

    Which of them it does compile depends on when rows end: a batch that no row leaves takes
    one program per length of the cache.
    """
    s = schedule(rows, prompt_slots, max_new_tokens, ways=ways, chunk=chunk)
    first = [Program(s.batches[0], s.slots[0], s.steps)] if s.slots else []
    later = [Program(b, slots, s.steps) for b in s.batches for slots in s.slots[1:]]
    return list(dict.fromkeys(first + later))


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
    B, S = len(prompts) * group_size, tokens.shape[1]
    sizes = schedule(B, S, max_new_tokens, ways=batch_ways(), chunk=chunk)

    number = np.arange(sizes.batches[0], dtype=np.int32)
    prompt_of = np.minimum(number // group_size, len(prompts) - 1)  # rows from B on are fillers
    keys = _row_keys(key, prompt_of + np.int32(first_prompt), number % group_size)
    start = mask.sum(1, dtype=np.int32)[prompt_of]
    last, cache, experts = _prefill(graphdef, params, tokens, mask, record_routing)
    rows, first = _begin(last, experts, prompt_of, start, keys, sampling)

    decode = partial(_decode, graphdef, params, sampling=sampling, steps=sizes.steps)
    decode = partial(decode, record_routing=record_routing)
    eos = np.asarray(sorted(set(eos_ids)))
    if sizes.slots:
        cache = _refit(cache, prompt_of, sizes.slots[0])
    record = _decode_all(decode, sizes, cache, rows, first, S, number >= B, eos)
    found, drawn_experts = _completions(record, B, max_new_tokens, eos)
    if experts is None or drawn_experts is None:
        return found
    P = len(prompts)
    routing = _routing(host(experts)[:P], mask[:P], drawn_experts, found.mask)
    return found._replace(routing=routing)


def _decode_all(decode, sizes: Schedule, cache, rows, first, prompt_slots, ended, eos) -> Record:
    """All chunks until every row has met an EOS; `ended` holds for the fillers beforehand."""
    number = np.arange(len(ended))
    record = [(number, first)]
    for n, slots in enumerate(sizes.slots):
        raise_if_asked()  # to stop: nothing has changed yet
        alive = ~ended[number]
        batch = sizes.batch(n, len(number), int(alive.sum()))
        if batch < len(number):  # the living first; who has ended fills up what is left
            kept = np.argsort(~alive, kind="stable")[:batch]
            number, rows, cache = number[kept], _pick(rows, kept), _refit(cache, kept, slots)
        elif slots > cache[0].k.shape[2]:
            cache = _refit(cache, None, slots)
        step = np.int32(1 + n * sizes.steps)
        cache, rows, drawn = decode(cache, rows, np.int32(prompt_slots), step)
        jax.tree.map(lambda x: x.copy_to_host_async(), drawn)
        record.append((number, drawn))
        seen, before = record[n]  # ready, or soon: the device is already at work on the next
        ended[seen] |= np.isin(before.tokens, eos).any(axis=0)
        if ended.all():
            break
    return record


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
    token, logp = sample(logits, _fold(keys, jnp.int32(0)), sampling)
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
        token, logp = sample(head_logits(hidden, unembed), _fold(rows.key, t), sampling)
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

    argmax(z / temperature + gumbel) is a draw from softmax(z / temperature). With gumbel =
    -log(-log u) it is argmax(p / -log u): one logarithm less, and p is wanted for the
    log-probability anyway. That one is of the full vocabulary at this temperature, as the
    training program computes it.
    """
    z = logits / sampling.temperature if sampling.temperature > 0 else logits
    top = jnp.max(z, axis=-1, keepdims=True)
    p = jnp.exp(z - top)  # up to a factor
    choice = z
    if sampling.temperature > 0:
        kept = keep_likely(z, sampling.top_p, sampling.top_k)
        tiny = jnp.finfo(z.dtype).tiny
        draw = partial(jax.random.uniform, shape=z.shape[1:], dtype=z.dtype, minval=tiny)
        choice = jnp.where(kept > -jnp.inf, p, 0) / -jnp.log(jax.vmap(draw)(keys))
    token = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)
    return token, (chosen - top)[:, 0] - jnp.log(jnp.sum(p, axis=-1))


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


@jax.jit
def _row_keys(key, prompt, sample) -> Key[Array, " B"]:
    fold = jax.vmap(jax.random.fold_in, (0, 0))
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, prompt), sample)


def _fold(row_keys: Key[Array, " B"], position: Int[Array, ""]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(row_keys, position)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


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
        own, length = prompts[prompt, prompt_mask[prompt]], mask[row].sum()
        routing[row, : len(own)] = own
        routing[row, len(own) - 1 : len(own) - 1 + length] = drawn[row, :length]
    return routing
