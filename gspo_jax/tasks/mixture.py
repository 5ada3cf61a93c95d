"""Several tasks as one: problems in fixed shares, each scored by its own task."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gspo_jax.answers.verify import counts_reasoning
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.task import SPLITS, Task, fingerprint


class Part(NamedTuple):
    """One task of a mixture, and its share of the problems relative to the others'."""

    task: Task
    weight: float


def mix(parts: Mapping[str, Part], *, sizes: Mapping[str, int] | None = None) -> Task:
    """The first problems of each part in the shares that the weights say, evenly interleaved.

    A split is as large as the shares allow: it ends where one part runs out of problems. Parts
    without problems in a split have no share in it. Every problem has the column "task", the name
    of its part, by which its response is scored; ids begin with that name.

    Args:
        parts: by name; weights above 0.
        sizes: the most problems of each split, such as {"val": 200}.
    """
    places = {}
    for split in SPLITS:
        there = {name: p for name, p in parts.items() if p.task.size[split] and p.weight}
        total = sum(part.weight for part in there.values())
        share = {name: part.weight / total for name, part in there.items()}
        most = min((p.task.size[split] / share[name] for name, p in there.items()), default=0)
        most = min(most, (sizes or {}).get(split, most))
        # Rounding: a share of 10 * (1 / 3) / (1 / 3) problems may come out as 9.999...
        counts = {name: int(most * share[name] + 1e-9) for name in there}
        # Problem j of n stands at (j + 1/2) / n of the split, so that every stretch has the shares.
        order = sorted(((j + 0.5) / n, name, j) for name, n in counts.items() for j in range(n))
        places[split] = [(name, j) for _, name, j in order]

    def problem(split: str, index: int) -> Problem:
        name, j = places[split][index]
        found = parts[name].task.problem(split, j)
        columns = found.columns | {"task": name}
        return replace(found, id=f"{name}/{found.id}", columns=columns)

    return Task(
        name="mixture",
        size={split: len(places[split]) for split in SPLITS},
        problem=problem,
        reward=mixed_reward({name: part.task for name, part in parts.items()}),
        warnings=tuple(f"{n}: {line}" for n, p in parts.items() for line in p.task.warnings),
        fingerprint=fingerprint([[n, p.task.fingerprint] for n, p in parts.items()] + [places]),
        answer_in=lambda problem, text: parts[problem.columns["task"]].task.answer_in(
            problem, text
        ),
        unscored=" ".join(f"{n}: {t}" for n, p in parts.items() if (t := p.task.unscored)),
        unboxed=" ".join(f"{n}: {t}" for n, p in parts.items() if (t := p.task.unboxed)),
    )


def mixed_reward(tasks: Mapping[str, Task]) -> Any:
    """A reward function that gives each response to the one of its problem's task."""

    @counts_reasoning
    def mixture(prompts, completions, task, **columns):
        rows = range(len(completions))
        scores: list[float | None] = [None] * len(completions)
        for name in dict.fromkeys(task):
            mine = [b for b in rows if task[b] == name]
            given = {"prompts": prompts, "completions": completions, **columns}
            part = {
                key: [values[b] for b in mine] if _per_response(values, rows) else values
                for key, values in given.items()
            }
            for b, value in zip(mine, tasks[name].reward(**part), strict=True):
                scores[b] = value
        return scores

    return mixture


def _per_response(values: Any, rows: range) -> bool:
    return isinstance(values, list) and len(values) == len(rows)


def parsed_parts(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The option `tasks` of a mixture, {name: weight} or {name: {weight, ...}}, checked.

    Raises:
        ConfigError: not of this form.
    """
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"task.options.tasks={given}: wanted {{name: weight}}, at least one.")
    parts = {}
    for name, value in given.items():
        part = dict(value) if isinstance(value, Mapping) else {"weight": value}
        unknown = sorted(set(part) - {"weight", "name", "path", "fields", "options"})
        if unknown:
            raise ConfigError(
                f"task.options.tasks.{name}: got {unknown}, wanted some of weight, name, path, "
                "fields, options."
            )
        weight = part.setdefault("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(
                f"task.options.tasks.{name}.weight={weight}: wanted a number above 0."
            )
        if "name" not in part and "path" not in part:
            part["name"] = str(name)
        parts[str(name)] = part
    return parts
