"""Problems of reasoning-gym (extra `gym`), held to the rules of our own tasks.

datasets   an allow-list: others evaluate what a response says, pay for "nan" or for parts of
           an answer, or have no answer to compare with
splits     by the hash of the question, whatever the seed; reasoning-gym's own seeds overlap
scores     1 or 0 for what is boxed, by `same`; where several answers are right, by
           reasoning-gym's checker in a process that can be killed, and only for full marks
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from random import Random
from typing import Any

import numpy as np

from gspo_jax.answers.notation import unwrapped
from gspo_jax.answers.verify import boxed, counts_reasoning, numeric, one_box, own_words
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.draw import Drawn, between, chosen_sizes, chosen_weights, made_up, weighted
from gspo_jax.tasks.task import Task, fingerprint

GYM_SIZES = {"train": 1_000, "val": 50, "test": 100}
COMPARED = (
    "ab",
    "base_conversion",
    "basic_arithmetic",
    "bitwise_arithmetic",
    "caesar_cipher",
    "calendar_arithmetic",
    "chain_sum",
    "circuit_logic",
    "decimal_arithmetic",
    "decimal_chain_sum",
    "dice",
    "family_relationships",
    "futoshiki",
    "knights_knaves",
    "lcm",
    "leg_counting",
    "maze",
    "mini_sudoku",
    "needle_haystack",
    "number_format",
    "number_sequence",
    "number_sorting",
    "path_star",
    "pool_matrix",
    "products",
    "rectangle_count",
    "self_reference",
    "simple_equations",
    "sudoku",
    "syllogism",
    "time_intervals",
    "word_sorting",
    "zebra_puzzles",
)
JUDGED = (  # several answers, or several ways to write one, are right
    "cryptarithm",
    "jugs",
    "palindrome_partitioning",
    "quantum_lock",
    "shortest_path",
)
DATASETS = sorted(COMPARED + JUDGED)
LONGEST = 4_000  # characters of an answer; a longer one is never right
_BETWEEN = re.compile(r"[\s\[\]\"'`]+|,(?![0-9]{3}(?![0-9]))")
_ESCAPED = re.compile(r"\\([#&%_])")
_ANY = re.compile(r".*", re.DOTALL)
# Its checker takes the letters out of whatever stands around them.
FORM = {"quantum_lock": re.compile(r"[A-Ca-c](?: ?(?:→|->|,)? ?[A-Ca-c])*\.?")}
_ARROW = re.compile(r"\\(?:right|long|longright)?(?:arrow|to)(?![A-Za-z])")


def reasoning_gym(
    *,
    seed: int = 0,
    datasets: str | Sequence[str] | Mapping[str, Any] = ("chain_sum",),
    sizes: dict[str, int] | None = None,
) -> Task:
    """Problems of some of reasoning-gym's datasets, in the shares that are asked for.

    Args:
        seed: chooses the training problems.
        datasets: a name, several, {name: weight}, or {name: {weight: 2, ...}} with settings of
            the dataset's own.
        sizes: number of problems per split; what is not named keeps GYM_SIZES. Each one made for
            "val" costs some 14 draws, for "test" 8; some datasets take 0.1 s for one.

    Raises:
        ConfigError: the package is not installed, a dataset is not on the list, or it does not
            have such a setting.
    """
    if find_spec("reasoning_gym") is None:
        raise ConfigError(
            "task.name=gym needs the package reasoning-gym: pip install 'gspo_jax[gym]'."
        )
    weights, settings = _parsed(datasets)
    sources = {name: _dataset(name, given) for name, given in settings.items()}

    def draw(rng: Random, split: str) -> Drawn:
        name = weighted(rng, weights)
        # Item i is made from reasoning-gym's seed + i, which NumPy wants below 2**32.
        item = sources[name][between(rng, 0, 2**31)]
        question, gold = item["question"].strip(), str(item["answer"]).strip()
        key = f"{name} {' '.join(question.split())}"
        prompt = f"{question}\n\nGive the final answer in \\boxed{{}}."
        known = json.loads(json.dumps(item["metadata"], default=str)) if name in JUDGED else {}
        columns = {"dataset": name, "metadata": known, "completion": f"\\boxed{{{gold}}}"}
        return Drawn(key, key, Problem(f"{name}-{fingerprint(key)}", prompt, gold, columns))

    before = np.random.get_state()  # some datasets set NumPy's global seed
    try:
        size = chosen_sizes(GYM_SIZES, sizes)
        return made_up("gym", size, draw, gym_reward(), seed=seed, answer_in=answer_in)
    finally:
        np.random.set_state(before)


def gym_reward() -> Callable[..., list[float | None]]:
    """A reward function: 1 where the boxed answer is right, else 0.

    The process that judges starts when it is first needed. What it is lost on scores 0; the metric
    `gym/lost` counts that.
    """
    from gspo_jax.reward.remote import checker  # which imports the package of tasks on its way

    ask = checker("gspo_jax.tasks.made.gym_judge:full_marks")

    @counts_reasoning
    def gym(prompts, completions, answer, dataset, metadata, log_metric=None, **columns):
        rows = zip(prompts, completions, strict=True)
        given = [one_box(own_words(*row)) or "" for row in rows]
        given = ["" if len(text) > LONGEST else text for text in given]
        scores: list[float | None] = []
        scores += [float(same(text, gold)) for text, gold in zip(given, answer, strict=True)]
        given = [_ARROW.sub("→", unwrapped(text)) for text in given]
        left = [b for b, name in enumerate(dataset) if name in JUDGED and not scores[b]]
        asked = [b for b in left if given[b] and FORM.get(dataset[b], _ANY).fullmatch(given[b])]
        if asked:
            texts = [given[b] for b in asked]
            problems = [
                Problem(str(b), "", answer[b], {"dataset": dataset[b], "metadata": metadata[b]})
                for b in asked
            ]
            found, lost = ask(problems, texts)
            for b, value in zip(asked, found, strict=True):
                scores[b] = value
            if log_metric is not None:
                log_metric("gym/lost", lost)
        return scores

    return gym


def same(answer: str, gold: str) -> bool:
    """Do two answers consist of the same words and numbers, in this order?

    Numbers are compared exactly, words without case. Space, brackets, quotes and the commas
    between items do not matter.
    """
    return words(gold) != [] and words(answer) == words(gold)


def words(answer: str) -> list[Any]:
    """The words of an answer, as fractions where they are numbers."""
    parts = _BETWEEN.split(_ESCAPED.sub(r"\1", unwrapped(answer)))
    parts = [part.rstrip(".,;") for part in parts]
    read = [(part.casefold(), numeric(part)) for part in parts if part]
    return [word if number is None else number for word, number in read]


def answer_in(problem: Problem, text: str) -> str | None:
    """The boxed answer in one spelling, or None."""
    found = boxed(text)
    return " ".join(map(str, words(found[:LONGEST]))) if found else None


def _parsed(given: Any) -> tuple[dict[str, float | int], dict[str, dict[str, Any]]]:
    """Weights, and the settings of each dataset."""
    if isinstance(given, str):
        given = [given]
    whole = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1)
    settings = {n: dict(v) if isinstance(v, Mapping) else {"weight": v} for n, v in whole.items()}
    weights = {name: own.pop("weight", 1) for name, own in settings.items()}
    chosen = chosen_weights("task.options.datasets", weights, DATASETS)
    return chosen, {name: own for name, own in settings.items() if chosen[name]}


def _dataset(name: str, settings: Mapping[str, Any]) -> Any:
    import reasoning_gym as library  # pyright: ignore[reportMissingImports]

    if reserved := sorted({"seed", "size"} & set(settings)):
        raise ConfigError(f"task.options.datasets.{name}.{reserved[0]}: is the task's own.")
    try:
        return library.create_dataset(name, seed=0, size=2**31 + 1, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"task.options.datasets.{name}: {error}.") from None
