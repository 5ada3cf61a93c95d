"""Our models in lm-eval, EleutherAI's evaluation harness (extra `lm-eval`).

from lm_eval import simple_evaluate
results = simple_evaluate(Harness("runs/demo/export"), tasks=["gsm8k"])
"""

from collections.abc import Sequence
from typing import Any

import jax

from gspo_jax.answers.verify import after_reasoning
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.evaluation.continuations import Pair, complete, continuation_logps
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.policy import load_policy
from gspo_jax.prompt.tokenizer import THINK

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
        normalize_gen_kwargs,
    )
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ConfigError(
        f"lm-eval cannot be imported ({error}): pip install 'gspo_jax[lm-eval]'."
    ) from None


class Harness(TemplateLM):
    """A model directory as lm-eval's language model, on the devices of the configuration.

    Args:
        model_path: a Hugging Face directory.
        overrides: settings as on the command line, such as `mesh.tensor=2` or `model.dtype=...`.
        batch: prompts that are answered together.
        tokens: positions that are scored together.
        max_length: tokens that the network reads at most; None is what its config.json says.
        max_gen_toks: of an answer, where the task does not say.
        seed: of samples, where a task asks for them.
    """

    def __init__(
        self,
        model_path: str,
        *,
        overrides: Sequence[str] = (),
        batch: int = 64,
        tokens: int = 16_384,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        self.policy = load_policy(load_config(None, [f"model.path={model_path}", *overrides]))
        self.max_length = (
            max_length or read_model_config(self.policy.directory).max_position_embeddings
        )
        self.batch, self.tokens, self.max_gen_toks, self.seed = batch, tokens, max_gen_toks, seed
        with jax.set_mesh(self.policy.mesh):
            self.model = self.policy.sampler(self.policy.params)

    @property
    def eot_token_id(self) -> int:
        """The model's own end of a response."""
        return self.policy.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: its beginning token, if it has one."""
        backend, specials = self.policy.tokenizer.backend, self.policy.tokenizer.specials
        found = backend.token_to_id(specials.get("bos_token", ""))
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """For the keys of lm-eval's caches."""
        return str(self.policy.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the keys of lm-eval's caches; a directory has one template."""
        return self.tokenizer_name if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the model reads it, up to where its answer begins.

        Raises:
            ConfigError: an answer is already begun (`gen_prefix`), which no template here does.
        """
        if not add_generation_prompt:
            raise ConfigError("tasks with gen_prefix are not supported with a chat template.")
        return self.policy.tokenizer.render(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with what the tokenizer adds to any text, unless that is already there."""
        first = self.policy.tokenizer.specials.get("bos_token")
        if add_special_tokens is None:
            add_special_tokens = not (first and string.startswith(first))
        backend = self.policy.tokenizer.backend
        return backend.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Any]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with jax.set_mesh(self.policy.mesh):
            found = continuation_logps(
                self.model, pairs, longest=self.max_length, tokens=self.tokens
            )
        for (asked, *_), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log π of whole texts, in windows of `max_length`."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens([(None, *w) for own in windows for w in own]))
        totals = [sum((next(scores)[0] for _ in own), 0.0) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text, add_special_tokens=False)
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in rolling]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the stop strings, those of one way of decoding together."""
        asked = [normalize_gen_kwargs(r.args[1], self.max_gen_toks) for r in requests]
        texts: dict[int, str] = {}
        for same in dict.fromkeys(map(repr, asked)):
            mine = [i for i, given in enumerate(asked) if repr(given) == same]
            answers = self._answers([requests[i].args[0] for i in mine], asked[mine[0]])
            texts |= zip(mine, answers, strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _answers(self, contexts: list[str], given: dict[str, Any]) -> list[str]:
        room = self.max_length - given["max_gen_toks"]
        if room < 1:
            raise ConfigError(f"max_gen_toks={given['max_gen_toks']} of {self.max_length} tokens.")
        sampled = {name: given[name] for name in ("top_p", "top_k") if name in given}
        with jax.set_mesh(self.policy.mesh):
            texts = complete(
                self.model,
                self.policy.tokenizer,
                [self.tok_encode(c)[-room:] or [self.prefix_token_id] for c in contexts],
                stops=given["until"],
                max_new_tokens=given["max_gen_toks"],
                key=jax.random.key(self.seed),
                batch=self.batch,
                temperature=given.get("temperature", 0.0),
                **sampled,
            )
        # What the context opens is reasoning, and lm-eval looks for the answer in all that it gets.
        opens = [THINK if c.rstrip().endswith(THINK) else "" for c in contexts]
        return [
            after_reasoning(o + text) if o else text for o, text in zip(opens, texts, strict=True)
        ]
