"""Prompts and responses laid together in rows: what the update is given."""

import numpy as np
from jaxtyping import Float, Int

from gspo_jax.batch import Completions, Rollout, TrainBatch
from gspo_jax.rollout.schedule import bucket
from gspo_jax.rollout.truncation import trained_mask


def to_train_batch(
    rollout: Rollout,
    adv: Float[np.ndarray, " B"] | None = None,
    *,
    mask_truncated: bool = False,
    pad_id: int = 0,
    width: int = 0,
) -> TrainBatch:
    """Rows of prompt + response, right-padded to `width`, or to the longest of them (`bucket`).

    Token ids go straight from the sampler to the update, never through text. With
    `mask_truncated`, responses that ran into the length limit are not trained on.
    """
    completions = rollout.completions
    mask = trained_mask(completions, mask_truncated)
    group_size = mask.shape[0] // len(rollout.prompts)
    prompt_length, length = (x.astype(np.int32) for x in text_lengths(rollout))
    B = mask.shape[0]
    tokens = np.full((B, width or bucket(int((prompt_length + length).max()))), pad_id, np.int32)
    for row in range(B):
        response = completions.tokens[row, : length[row]]
        filled = [*rollout.prompts[row // group_size], *response.tolist()]
        tokens[row, : len(filled)] = filled
    routing = with_routing(completions, tokens.shape[1]).routing
    return TrainBatch(tokens, prompt_length, length, mask, adv, routing)


def with_routing(completions: Completions, width: int) -> Completions:
    """The same; recorded experts, if any, are cut or filled up with -1 to `width` positions."""
    if completions.routing is None:
        return completions
    cut = completions.routing[:, :width]
    fill = ((0, 0), (0, width - cut.shape[1]), (0, 0), (0, 0))
    return completions._replace(routing=np.pad(cut, fill, constant_values=-1))


def text_lengths(rollout: Rollout) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Tokens of each response's prompt, and of the response."""
    size = len(rollout.texts) // len(rollout.problems)
    prompt = np.repeat([len(ids) for ids in rollout.prompts], size)
    return prompt, rollout.completions.length
