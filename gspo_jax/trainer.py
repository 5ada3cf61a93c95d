"""GSPO as three objects, for those who come from a trainer class.

    from gspo_jax import GSPOConfig, GSPOCustomDataset, GSPOTrainer

    config = GSPOConfig(learning_rate=1e-6, group_size=8, batch_size=8)
    trainer = GSPOTrainer("Qwen/Qwen3-0.6B", config=config)
    data = GSPOCustomDataset(seed=42).generate_dataset(500)
    metrics = trainer.train_step(data)

These are the functions of `gspo-jax train`. Checkpoints, resuming, several devices and what else a
config can say belong to that command; here are the names and the shape of a script.
"""

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gspo_jax import train
from gspo_jax.answers.verify import counts_reasoning, list_accuracy
from gspo_jax.batch import Problem
from gspo_jax.config.load import load_config, model_dir
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.evaluation.evaluate import evaluate
from gspo_jax.files.jsonl import plain
from gspo_jax.models.hf.files import resolve
from gspo_jax.models.hf.weights import read_model_config, save_model
from gspo_jax.models.qwen import Qwen
from gspo_jax.policy import Policy, Problems, beyond_positions, load_policy
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.reward import rewards
from gspo_jax.rollout.stages import sample_completions
from gspo_jax.run.export import export_params
from gspo_jax.run.metrics import RunLog
from gspo_jax.tasks import load_task
from gspo_jax.tasks.made.reasoning import MIX, reasoning_mix
from gspo_jax.tasks.rows import ANSWER, answer_of, columns_of, problem_of
from gspo_jax.tasks.sources import Row
from gspo_jax.text.console import telling
from gspo_jax.trainer_config import GSPOConfig

Item = Mapping[str, Any]


class GSPOCustomDataset:
    """The task `reasoning` as a list of dicts: four types of problems at three levels.

    The items have the keys query, reference_answer, type, difficulty, target_answer and id, and
    "prompt", which is the query with the instruction where to put the answer. The same seed gives
    the same items; they are not those of another library's generator.
    """

    def __init__(self, seed: int = 42):
        self.seed = seed

    def generate_dataset(
        self,
        num_samples: int = 100,
        difficulty_mix: Mapping[str, float] | None = None,
        split: str = "train",
    ) -> list[dict[str, Any]]:
        """Different problems; those of the splits train, val and test never meet.

        Args:
            difficulty_mix: how often each of easy, medium and hard; 0.5, 0.3 and 0.2 by default.
        """
        sizes = {"train": 0, "val": 0, "test": 0, split: num_samples}
        task = reasoning_mix(seed=self.seed, levels=difficulty_mix or MIX, sizes=sizes)
        problems = [task.problem(split, i) for i in range(num_samples)]
        return [p.columns | {"prompt": p.prompt} for p in problems]

    def create_reward_function(self) -> Callable[..., float]:
        """1.0 where the boxed answer is right, else 0.0; nothing for form, length or cue words."""
        return verified


@counts_reasoning
def verified(query: str, response: str, item: Item) -> float:
    """1.0 where what `response` boxes is the answer of `item`, else 0.0."""
    (score,) = list_accuracy(prompts=[query], completions=[response], answer=[gold(item)])
    return float(score or 0)


def gold(item: Item, place: int = 0) -> str:
    """The answer of an item, as a row of `task.path` is read.

    Raises:
        DataError: it has none, or what it has is not one answer.
    """
    row = Row(f"item {place}", None, {"prompt": "", **item})
    column = columns_of([row], {}).get("answer")
    if column is None:
        raise DataError(
            f"item {place} has no answer to compare with, none of {list(ANSWER)}; it has "
            f"{list(item)}. Give it one, or the trainer a reward_fn."
        )
    return answer_of(row, column)


class GSPOTrainer:
    """A model in training.

    Args:
        model: a Hugging Face directory or hub id, "demo", or a `Qwen` of ours, which is copied.
        tokenizer: its directory, one of `load_tokenizer` or of transformers; None is the model's.
        config: what to do.
        reward_fn: `f(query, response)` or `f(query, response, item)` per response, or any other
            form of `reward.signatures`; by default the answer of the item, compared exactly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        config: GSPOConfig | None = None,
        reward_fn: Callable | None = None,
    ):
        self.options = config or GSPOConfig()
        self.reward_fn = reward_fn or verified
        with telling("Looking for the model's files"):  # which may come from the hub
            self.config = self.options.to_config(directory_of(model, tokenizer))
        with telling(f"Reading the weights of {self.config.model.path}"):
            policy = load_policy(self.config)
        self._policy, self._shape = policy, read_model_config(policy.directory)
        anything = Problems(
            load_task("arithmetic", sizes={"train": 1, "val": 0, "test": 0}),
            {"train": [0]},
            0,
            partial(self._score, None),
            1,
            self.config.task.max_prompt_length,
        )
        making = telling("Making the optimizer's state and the programs of a step")
        with jax.set_mesh(policy.mesh), making:
            self._loop, self.state = train.assemble(self.config, policy, anything)
        self._place = 0  # in the data that `train_step` is given

    @property
    def policy(self) -> Policy:
        """The network with the weights of the last whole update."""
        return self._policy._replace(params=self.state.params)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.policy.tokenizer

    def train_step(
        self, data: Sequence[Item | str], reward_fn: Callable | None = None
    ) -> dict[str, Any]:
        """One rollout and its updates, on the next `batch_size` items of `data`, going round.

        Interrupted, by Ctrl-C or by an error, the trainer has the weights of the last whole update,
        and asks the same items next.

        Returns:
            `loss`, `clip_fraction`, `importance_ratio_mean`, `importance_ratio_std`,
            `advantage_mean`, `advantage_std` and `reward_mean`, and every metric of a run.
        """
        count = self.options.batch_size
        if not data:
            raise DataError("train_step was given no data.")
        chosen = [data[(self._place + i) % len(data)] for i in range(count)]
        asked = self._problems(chosen, reward_fn)
        step = int(self.state.step) + 1
        with jax.set_mesh(self.policy.mesh):
            score, phase = partial(self._score, reward_fn), compiling if step == 1 else nullcontext
            asked = self._fitting(asked)
            rollout = train.respond(self._loop, self.state, step, asked, score, phase)
            begun = train.judge(self._loop, self.state, step, rollout, rollout)
            hold = partial(setattr, self, "state")
            self.state, begun = train.update(self._loop, self.state, begun, phase, hold=hold)
        self._place += count
        metrics = plain(train.step_metrics(self.config, begun))
        adv = np.asarray(begun.progress.batch.adv)
        return metrics | {
            "num_tokens": begun.tokens,
            "clip_fraction": metrics["clip_frac"],
            "importance_ratio_mean": metrics["ratio_mean"],
            "importance_ratio_std": metrics["ratio_std"],
            "advantage_mean": float(adv.mean()),
            "advantage_std": float(adv.std()),
            "reward_mean": metrics["reward"],
        }

    def train(
        self,
        data: Sequence[Item | str],
        eval_data: Sequence[Item | str] = (),
        output_dir: str | Path | None = None,
        reward_fn: Callable | None = None,
    ) -> list[dict[str, Any]]:
        """`num_epochs` passes over `data`; the metrics of every step.

        With `output_dir` they are also written there as a run's (metrics.jsonl, status.json), which
        `gspo-jax report` reads, and the model is saved in its final_model/.
        """
        if not data:
            raise DataError("train was given no data.")
        final = None if output_dir is None else Path(output_dir) / "final_model"
        if final is not None and final.exists():
            raise StorageError(
                f"{final} is there already; give another output_dir, or move it away."
            )
        count, every = self.options.batch_size, self.options.eval_frequency
        steps = -(-len(data) * self.options.num_epochs // count)
        history = []
        self._problems([*data, *eval_data], reward_fn)  # what is no item is said at the start

        def done(step: int, metrics: dict[str, Any]) -> None:
            if eval_data and (step in (0, steps) or (every and step % every == 0)):
                metrics = metrics | self.evaluate(eval_data, reward_fn)
            history.append(metrics)
            if log and metrics:
                log.step(step, metrics)

        log = None if final is None else RunLog(final.parent, of=steps)
        with log or nullcontext():  # which says how it ended, whatever ends it
            if log:
                log.start()
            done(0, {})
            for step in range(1, steps + 1):
                done(step, self.train_step(data, reward_fn))
            if final is not None and log:
                self.save(final)
                log.status("finished")
        return history

    def evaluate(
        self, data: Sequence[Item | str], reward_fn: Callable | None = None, samples: int = 0
    ) -> dict[str, float]:
        """Greedy accuracy (or mean reward), n and a 95 % interval; see `evaluate.evaluate`."""
        problems = self._fitting(self._problems(data, reward_fn))
        with jax.set_mesh(self.policy.mesh):
            return evaluate(
                self.policy.sampler(self.state.params),
                self.tokenizer,
                problems,
                partial(self._score, reward_fn),
                samples=samples,
                temperature=self.config.rollout.temperature,
                max_new_tokens=self.config.rollout.max_completion_length,
                key=jax.random.fold_in(jax.random.key(self.config.run.seed), 0),
            )

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """One response to each prompt, under the model's chat template; temperature 0 is greedy."""
        roll = self.config.rollout
        new = max_new_tokens or roll.max_completion_length
        encoded = self.tokenizer.encode_prompts(prompts)
        self._check_positions(max(map(len, encoded), default=0), new)
        with jax.set_mesh(self.policy.mesh):
            _, texts = sample_completions(
                self.policy.sampler(self.state.params),
                self.tokenizer,
                encoded,
                key=jax.random.key(seed),
                group_size=1,
                max_new_tokens=new,
                temperature=roll.temperature if temperature is None else temperature,
            )
        return texts

    def save(self, out_dir: str | Path) -> Path:
        """The weights as a Hugging Face directory, which must not be there yet."""
        return export_params(self.policy, self.state.params, Path(out_dir))

    def _problems(self, data: Sequence[Item | str], reward_fn: Callable | None) -> list[Problem]:
        answered = (reward_fn or self.reward_fn) is verified
        return [as_problem(item, i, answered=answered) for i, item in enumerate(data)]

    def _score(self, reward_fn: Callable | None, problems, texts, ids, **_: Any):
        functions = rewards.load_rewards([reward_fn or self.reward_fn])
        return rewards.score(functions, None, problems, texts, ids)

    def _fitting(self, problems: list[Problem]) -> list[Problem]:
        most = self.options.max_prompt_length
        encoded = self.tokenizer.encode_prompts([p.prompt for p in problems])
        for problem, ids in zip(problems, encoded, strict=True):
            if len(ids) > most:
                raise DataError(
                    f"item {problem.id!r:.60} has a prompt of {len(ids)} tokens, "
                    f"max_prompt_length={most}; raise it, or leave the item out."
                )
            self._check_positions(len(ids), self.config.rollout.max_completion_length)
        return problems

    def _check_positions(self, prompt: int, new: int) -> None:
        """Refuse texts that the model was not made for."""
        name = "max_length" if self.options.max_length else "max_new_tokens"
        if told := beyond_positions(self._shape, prompt, new, name):
            warnings.warn(told, stacklevel=3)


def compiling(stage: str) -> AbstractContextManager[None]:
    """A stage of the first step, which is told where it takes long."""
    return telling(f"The first step compiles as it goes: {stage}")


def as_problem(item: Item | str, place: int, *, answered: bool = False) -> Problem:
    """An item as a problem: a text, or a dict that is read as a row of `task.path`.

    Args:
        place: of the item among the others.
        answered: it has to have an answer, as `verified` needs one. Else what cannot be read as
            one is left to the reward function.

    Raises:
        DataError: no question, or no answer where there has to be one.
    """
    row = Row(f"item {place}", None, {"prompt": item} if isinstance(item, str) else dict(item))
    columns = columns_of([row], {})
    column = columns.pop("answer", None)
    problem = problem_of(row, columns, {})
    answer = None
    if answered or column:
        try:
            answer = gold(row.values, place)
        except DataError:
            if answered:
                raise
    named = problem.id if "id" in columns else str(place)
    others = {k: v for k, v in row.values.items() if k != "prompt"} | problem.columns
    return replace(problem, id=named, answer=answer, columns=others)


def directory_of(model: Any, tokenizer: Any) -> Path:
    """The Hugging Face directory of a model; one is made for a network that is only in memory.

    Raises:
        ConfigError: a network of PyTorch, or a `Qwen` without a tokenizer that has a directory.
    """
    if isinstance(model, str | Path):
        return model_dir(load_config(None, [f"model.path={model}"]))
    if not isinstance(model, Qwen):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise ConfigError(
            f"model is a {kind}; wanted a Hugging Face directory or hub id, or a Qwen of "
            "gspo_jax.load_model. Save a network of PyTorch with model.save_pretrained(DIR) and "
            "give DIR: load_model converts it."
        )
    made = Path(tempfile.mkdtemp(prefix="gspo_jax-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    if isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer.directory
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(made / "tokenizer")
        tokenizer = made / "tokenizer"
    if tokenizer is None:
        raise ConfigError("a Qwen in memory has no tokenizer; give the directory of its own.")
    save_model(model, made / "model", like=resolve(str(tokenizer)))
    return made / "model"
