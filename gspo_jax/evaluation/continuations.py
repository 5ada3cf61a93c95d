"""What follows given texts: log-likelihoods of continuations, and texts up to stop strings."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gspo_jax.algo.logps import token_logps
from gspo_jax.batch import TrainBatch
from gspo_jax.errors import DataError
from gspo_jax.mesh.sharding import batch_ways, constrain
from gspo_jax.models.qwen import head_logits
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.rollout.engine import PureModel, generate
from gspo_jax.rollout.schedule import bucket
from gspo_jax.update.objective import before_response

Pair = tuple[list[int], list[int]]  # ids of a context, not empty, and of its continuation

CHUNK = 1024  # positions whose logits are looked at together


def continuation_logps(
    model: PureModel, pairs: Sequence[Pair], *, longest: int, tokens: int = 16_384
) -> list[tuple[float, bool]]:
    """log π(continuation | context) in nats, and whether greedy decoding would say the same.

    Texts of similar length run together, about `tokens` positions at a time, in few shapes.

    Args:
        pairs: token ids; a context that does not fit loses its beginning.
        longest: tokens that the network reads at most.

    Raises:
        DataError: a continuation that is longer than that by itself.
    """
    if too_long := [len(c) for _, c in pairs if len(c) > longest]:
        raise DataError(f"a continuation has {too_long[0]} tokens; the model reads {longest}.")
    # The last token of a text is predicted, and need not be read.
    cut = [(context[-(longest + 1 - len(c)) :], c) for context, c in pairs]
    left = sorted(range(len(cut)), key=lambda i: -sum(map(len, cut[i])))
    found: dict[int, tuple[float, bool]] = {}
    while left:
        width = bucket(sum(map(len, cut[left[0]])))
        rows = min(max(tokens // width, 1), 1 << (len(left) - 1).bit_length())
        rows = -(-rows // batch_ways()) * batch_ways()
        chosen, left = left[:rows], left[rows:]
        filled = chosen + chosen[-1:] * (rows - len(chosen))
        logp, greedy = _scores(*model, _batch([cut[i] for i in filled], width))
        both = zip(np.asarray(logp).tolist(), np.asarray(greedy).tolist(), strict=True)
        found |= zip(chosen, both, strict=False)
    return [found[i] for i in range(len(cut))]


def complete(
    model: PureModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    key: Key[Array, ""],
    batch: int = 64,
    **sampling: Any,
) -> list[str]:
    """The texts that follow the prompts, up to the first of the stop strings.

    Decoding ends early at a token that holds a stop string; one that is spread over several tokens
    is cut off afterwards.

    Args:
        sampling: `temperature`, `top_p`, `top_k` of `generate`.
    """
    ends = [*tokenizer.eos_ids, *stop_ids(tokenizer, stops)]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found = generate(
            model,
            [prompts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            key=key,
            first_prompt=start,
            **sampling,
        )
        texts |= zip(chosen, tokenizer.decode_batch(found.ids), strict=True)
    return [until(texts[i], stops) for i in range(len(prompts))]


def until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> list[int]:
    """Tokens whose own text holds a stop string: where one is drawn, the text is over."""
    if not stops:
        return []
    words = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
    return [i for i, word in enumerate(words) if any(stop in word for stop in stops)]


def _batch(pairs: list[Pair], width: int) -> TrainBatch:
    """Rows of context and continuation, as the update has prompt and response."""
    T = bucket(max(len(c) for _, c in pairs))
    tokens = np.zeros((len(pairs), width), np.int32)
    for row, (context, continuation) in zip(tokens, pairs, strict=True):
        row[: len(context) + len(continuation)] = context + continuation
    lengths = np.array([[len(context), len(c)] for context, c in pairs], np.int32)
    mask = np.arange(T)[None] < lengths[:, 1:]
    context_length, length = lengths.T
    adv = np.zeros(len(pairs), np.float32)
    return TrainBatch(tokens, context_length, length, mask, adv)


@partial(jax.jit, static_argnums=0)
def _scores(
    graphdef: nnx.GraphDef, params: Any, batch: TrainBatch
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The sum of log-probabilities of each row's response, and whether each of it is the top."""
    model = nnx.merge(graphdef, params)
    hidden, head = model(constrain(batch.tokens, "batch", None)), model.unembed()
    before, targets = before_response(hidden, batch, min(batch.mask.shape[1], hidden.shape[1]))
    mask = batch.mask[:, : targets.shape[1]]
    logp, _ = token_logps(before, head, targets)
    is_top = _likeliest(before, head) == targets
    return jnp.sum(logp, axis=1, where=mask), jnp.all(is_top, axis=1, where=mask)


def _likeliest(hidden: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Int[Array, "B T"]:
    """The most likely token after each state, without [B, T, V] logits."""
    B, T, D = hidden.shape
    rows = jnp.pad(hidden.reshape(B * T, D), ((0, -(B * T) % CHUNK), (0, 0)))
    best = jax.lax.map(
        lambda h: jnp.argmax(head_logits(h, head), axis=-1).astype(jnp.int32),
        rows.reshape(-1, CHUNK, D),
    )
    return best.reshape(-1)[: B * T].reshape(B, T)
