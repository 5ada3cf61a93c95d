"""The records that travel from stage to stage, every axis named.

    Problem ──prompt──▶ Completions ──reward, advantage──▶ Rollout ──▶ TrainBatch ──▶ update

Axes: P prompts of a step, G responses to each, B = P * G rows (row b answers prompt b // G),
T response tokens, S positions of prompt and response together. Response arrays are aligned to
the token they speak of: `logp[b, t]` is the log-probability of response token t of row b.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gspo_jax.numbers.tally import Tally


@dataclass(frozen=True)
class Problem:
    """One question, with all that is known of it.

    Attributes:
        id: a name for the logs, unique within its task.
        prompt: the question, or a chat as a list of `{"role": ..., "content": ...}`, whose turns
            may hold more that a chat template reads, such as "tool_calls".
        answer: the gold answer; None where only a user's reward function can tell.
        columns: every other field of the data row, passed by name to reward functions.
        opened: what the rendered prompt opened and left to the response to close: "<think>" where
            the chat template begins the reasoning itself, else "". `stages.with_opened` sets it.
    """

    id: str
    prompt: str | list[dict[str, Any]]
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    opened: str = ""


class Completions(NamedTuple):
    """What the sampler returns, on the host.

    Attributes:
        tokens: the sampled ids, EOS included; what lies after it has no meaning.
        mask: true on the tokens that were sampled, EOS included. Between them there may be others,
            which are read and not sampled.
        logp: log-probability of each token at the sampling temperature, in nats.
        truncated: true where the response ended at the length limit instead of an EOS.
        routing: where it was asked for, the X experts of each token of the row's prompt and then
            of its response, in the M layers that have experts; -1 where the sampler ran no token:
            from the last one on.
    """

    tokens: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    logp: Float[np.ndarray, "B T"]
    truncated: Bool[np.ndarray, " B"]
    routing: Int[np.ndarray, "B R M X"] | None = None

    @property
    def ids(self) -> list[list[int]]:
        """The sampled ids of each response."""
        return [row[m].tolist() for row, m in zip(self.tokens, self.mask, strict=True)]

    @property
    def length(self) -> Int[np.ndarray, " B"]:
        """Tokens of each response up to the last sampled one: nothing reads what lies behind."""
        place = np.arange(1, self.mask.shape[1] + 1, dtype=np.int32)
        return np.where(self.mask, place, 0).max(axis=1, initial=0)


@dataclass(frozen=True)
class Rollout:
    """One step's prompts, responses and scores, on the host.

    Attributes:
        problems: P problems.
        prompts: their token ids.
        completions: G responses to each.
        texts: the responses decoded without special tokens, for rewards and logs.
        rewards: each reward function's own scores by its name; NaN where it did not score.
        reward: their weighted sum; NaN means "not scored".
        log: what reward functions asked to have logged.
    """

    problems: list[Problem]
    prompts: list[list[int]]
    completions: Completions
    texts: list[str]
    rewards: dict[str, Float[np.ndarray, " B"]]
    reward: Float[np.ndarray, " B"]
    log: dict[str, Tally] = field(default_factory=dict)


class TrainBatch(NamedTuple):
    """What the update sees: rows of prompt + response, right-padded; NumPy or JAX arrays.

    Attributes:
        tokens: prompt ids, then response ids, then padding.
        prompt_length: where each response starts: response token t of row b is
            `tokens[b, prompt_length[b] + t]`.
        length: tokens of each response, trained on or not: the text ends after them.
        mask: true on response tokens that are trained on; it may have holes, and end before the
            response does. A row without any is not run.
        adv: one advantage per response, or one per token where the loss takes them; None where
            they have still to be made of these rows.
        routing: the X experts chosen earlier for each token in the M layers that have experts,
            -1 where not known; None where nobody recorded them.
    """

    tokens: Int[Any, "B S"]
    prompt_length: Int[Any, " B"]
    length: Int[Any, " B"]
    mask: Bool[Any, "B T"]
    adv: Float[Any, " B"] | Float[Any, "B T"] | None = None
    routing: Int[Any, "B S M X"] | None = None
