"""Models on benchmarks: every response saved, what is saved not computed again, one table.

    names ─▶ tasks ─▶ responses, batch by batch, into OUT/<benchmark>/*.jsonl ─▶ results.json, .md

The same command goes on where it stopped, at a whole batch, and gets bit for bit what it would have
got; whatever differs in model, problems or sampling has a file of its own (`saved`).
"""

import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gspo_jax.batch import Problem
from gspo_jax.config.load import Config, model_dir
from gspo_jax.config.settings import TaskConfig
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.evaluation.evaluate import evaluation_key, responses
from gspo_jax.evaluation.saved import Batch, file_of, model_hash, whole_batches
from gspo_jax.files import jsonl
from gspo_jax.files.integrity import sha256
from gspo_jax.files.provenance import environment
from gspo_jax.files.whole import lock, unlock, write_whole
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.numbers import summary
from gspo_jax.numbers.statistics import Estimate
from gspo_jax.numbers.summary import Record
from gspo_jax.policy import Policy, Problems, load_policy, load_problems, resolve_dtype
from gspo_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from gspo_jax.tasks import SPLITS, TASKS, Task
from gspo_jax.tasks.published import READERS, recognised
from gspo_jax.tasks.sources import BadRows, read_rows
from gspo_jax.tasks.zebra.score import score_grid
from gspo_jax.text.console import progress
from gspo_jax.text.inert import redact
from gspo_jax.text.spelling import meant

ALL = 10**9  # eval.problems for all that there are
Asked = dict[str, dict[str, Any]]  # name of a benchmark -> name, path and options of its task


class Model(NamedTuple):
    """A model to measure.

    Attributes:
        name: as it was typed.
        config: with this model in it.
        fingerprint: a hash of its files.
    """

    name: str
    config: Config
    fingerprint: str
    tokenizer: Tokenizer


# -------------------------------------------------------------------------------- what to ask


def named(names: str) -> Asked:
    """Benchmarks from "zebra,math,mine=rows.jsonl": names of `SHORT` and of tasks, or files.

    Raises:
        ConfigError: a name that is neither.
    """
    found: Asked = {}
    for text in filter(None, (part.strip() for part in names.split(","))):
        name, equals, path = text.partition("=")
        task = SHORT.get(name, {"name": name})
        if equals and task["name"] in READERS:
            found[name] = {"name": task["name"], "options": {"path": path}}
        elif equals:
            found[name] = {"name": None, "path": path}
        elif name in SHORT or (name in TASKS and name != "mixture"):
            found[name] = task
        else:
            known = sorted({*SHORT, *TASKS} - {"mixture"})
            raise ConfigError(
                f"--benchmarks {name}: no such benchmark.{meant(name, known)} There are {known}, "
                "or NAME=PATH."
            )
    if not found:
        raise ConfigError(f"--benchmarks {names!r}: wanted at least one name.")
    return found


def for_benchmark(config: Config, task: Mapping[str, Any]) -> Config:
    """`config` with this task in place of its own, of which only `eval.split` is made up or read.

    Raises:
        DataError: a file that cannot be read.
    """
    options, path = dict(task.get("options", {})), task.get("path")
    split, wanted = config.eval.split, config.eval.problems
    if path is not None and not _names_splits(path):
        options["split"] = split  # a file without splits is a benchmark as a whole
    maker = TASKS.get(task["name"] or "")
    if maker is not None and "sizes" in inspect.signature(maker).parameters:
        options["sizes"] = {name: 0 for name in SPLITS if name != split}
        options["sizes"] |= {split: wanted} if wanted < ALL else {}
    kept = {key: getattr(config.task, key) for key in ("max_prompt_length", "long_prompts", "seed")}
    return replace(config, task=TaskConfig(name=task["name"], path=path, options=options, **kept))


def _names_splits(path: str) -> bool:
    if not Path(path).is_file() or recognised(path):
        return True
    first = next(iter(read_rows(path, BadRows(0))), None)
    return first is not None and "split" in {name.lower() for name in first.values}


# ------------------------------------------------------------------------------------ running


def run(
    config: Config,
    models: Sequence[str],
    benchmarks: Asked | None,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every model on every benchmark; results.json and results.md grow on the way.

    Args:
        config: how responses are sampled; `model.path` and, with `benchmarks`, `task` are replaced.
        models: directories or hub ids; the others are compared with the first.
        benchmarks: from `named`; None is the config's own task.
        say: takes what the user should know, one line each.

    Returns:
        What results.json holds; "missing" has the benchmarks that cannot be had, and why.

    Raises:
        DataError: a model directory is not what it should be.
        StorageError: another process uses `out`, or it cannot be written.
    """
    asked: Mapping[str, Any] = benchmarks or {_own_name(config): None}
    known = [_model(config, name) for name in dict.fromkeys(models)]
    results = _header(config, known)
    tasks: dict[str, Task] = {}
    first: dict[str, list[Record]] = {}
    with _claimed(out):
        for model in known:
            load = cache(partial(load_policy, model.config))  # if a response is missing
            for name in [name for name in asked if name not in results["missing"]]:
                try:
                    own = for_benchmark(model.config, asked[name]) if asked[name] else model.config
                    problems = load_problems(
                        own, model.tokenizer, train=False, task=tasks.get(name)
                    )
                    asking = _asking(own, problems)
                except DataError as error:
                    results["missing"][name] = redact(str(error))
                    say(f"{name} is left out: {error}")
                    _write(out, results)
                    continue
                tasks[name] = problems.task
                for doubt in (doubts := _doubts(own, problems)):
                    say(f"{name}, {model.name}: {doubt}")
                file, records = measured(own, model, problems, asking, out / name, load)
                results["benchmarks"][name] = _about(own, problems, len(asking))
                found = {"file": str(file.relative_to(out)), "notes": doubts, **_scores(records)}
                results["scores"].setdefault(name, {})[model.name] = found
                if records is not first.setdefault(name, records):
                    pairs = _told(summary.differences(first[name], records))
                    results["differences"].setdefault(name, {})[model.name] = pairs
                _write(out, results)
    return jsonl.plain(results)


def _write(out: Path, results: Mapping[str, Any]) -> None:
    jsonl.write_plain(out / "results.json", results)
    write_whole(out / "results.md", summary.markdown(jsonl.plain(results)))


def _own_name(config: Config) -> str:
    return config.task.name or Path(str(config.task.path)).stem


def measured(
    config: Config,
    model: Model,
    problems: Problems,
    asking: list[Problem],
    directory: Path,
    load: Callable[[], Policy],
) -> tuple[Path, list[Record]]:
    """The file of this model's responses to the problems `asking`, complete, and its records.

    Args:
        directory: of files for these problems.
        load: reads the model's weights; called where a response is missing.
    """
    e, task = config.eval, problems.task
    file = file_of(directory, model.name, _identity(config, model, task, len(asking)))
    batches = [
        Batch(samples, range(begin, min(begin + e.batch, len(asking))))
        for samples in dict.fromkeys((0, e.samples))
        for begin in range(0, len(asking), e.batch)
    ]
    records, left = whole_batches(file, batches)
    if not left:
        return file, records
    policy = load()
    view = policy.sampler(policy.params)
    total = sum(len(batch.places) for batch in batches)
    with (
        jax.set_mesh(policy.mesh),
        file.open("ab", buffering=0) as stream,
        progress(f"{directory.name}, {model.name}", total, len(records)) as advance,
    ):
        for samples in dict.fromkeys(batch.samples for batch in left):
            made = responses(
                view,
                policy.tokenizer,
                asking,
                problems.scorer,
                samples=samples,
                temperature=e.temperature,
                max_new_tokens=config.rollout.max_completion_length,
                key=evaluation_key(config),
                batch=e.batch,
                answer_in=task.answer_in,
                start=next(b for b in left if b.samples == samples).problems.start,
            )
            for rows in made:
                rows = [_annotated(asking[row["index"]], row) for row in rows]
                for row in rows:
                    jsonl.append(stream, row)
                os.fsync(stream.fileno())
                records += rows
                advance(len(rows))
    return file, records


def _annotated(problem: Problem, row: Record) -> Record:
    """A record with the gold answer, what the problem belongs to, and the cells of a grid."""
    columns = problem.columns
    by = {name: columns[name] for name in summary.COLUMNS if _is_label(columns.get(name))}
    extra: dict[str, Any] = {"gold": problem.answer, "by": by}
    if "puzzle" in columns and isinstance(columns.get("solution"), dict):
        grid = score_grid(row.get("opened", "") + row["text"], json.loads(problem.answer or "{}"))
        extra |= {"right": grid.right, "cells": grid.cells}
    return {**row, **extra, "text": row["text"]}


def _is_label(value: Any) -> bool:
    return isinstance(value, int | str) and len(str(value)) <= 60


# ----------------------------------------------------------------------- models and their files


def _model(config: Config, name: str) -> Model:
    own = replace(config, model=replace(config.model, path=name, init="pretrained"))
    directory = model_dir(own)
    tokenizer = load_tokenizer(directory, template_args=own.model.template_args)
    return Model(name, own, model_hash(directory), tokenizer)


@cache
def _versions() -> dict[str, str | None]:
    return environment()["versions"]


def _identity(config: Config, model: Model, task: Task, problems: int) -> dict[str, Any]:
    """All that responses and their scores depend on."""
    c, devices = config, jax.devices()
    sources = [Path(spec.rpartition(":")[0]) for spec in c.task.rewards]
    rewards = [c.task.rewards, c.task.reward_weights]
    return {
        "model": model.fingerprint,
        "template_args": c.model.template_args,
        "dtype": resolve_dtype(c, jax.default_backend()),
        "task": [task.fingerprint, c.task.options],
        "rewards": [*rewards, *(sha256(path) for path in sources if path.is_file())],
        "problems": [c.eval.split, problems, c.task.max_prompt_length],
        "samples": [c.eval.samples, c.eval.temperature, c.rollout.max_completion_length],
        "seed": c.run.seed,
        "batch": c.eval.batch,
        "devices": [devices[0].device_kind, len(devices), vars(c.mesh)],
        "versions": [_versions()[name] for name in ("gspo_jax", "jax")],
    }


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    try:
        held = lock(out)
    except StorageError as error:
        raise StorageError(f"{str(error).partition(';')[0]}; choose another --out.") from None
    try:
        yield
    finally:
        unlock(held)


# ------------------------------------------------------------------------------------ results


def _labels(names: Sequence[str]) -> list[str]:
    """Short names: a directory's own, a run's for its export, or all of it if two were alike."""
    paths = [Path(name) for name in names]
    short = [(path.parent if path.name == "export" else path).name for path in paths]
    return [s if s and short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]


def _asking(config: Config, problems: Problems) -> list[Problem]:
    """The problems that are asked.

    Raises:
        DataError: there are none.
    """
    split = config.eval.split
    count = min(config.eval.problems, len(problems.indices.get(split, ())))
    if not count:
        raise DataError(
            f"{problems.task.name} has no problems in its split {split} with prompts of at most "
            f"{config.task.max_prompt_length} tokens; its splits have {problems.task.size}."
        )
    return problems.get(split, range(count))


def _header(config: Config, models: Sequence[Model]) -> dict[str, Any]:
    e, devices = config.eval, jax.devices()
    about = environment([f"{len(devices)} x {devices[0].device_kind}"])
    program, *arguments = about.pop("command")
    about.pop("host")
    return {
        "command": redact(shlex.join([Path(program).name, *arguments])),
        "models": [
            {"label": label, "name": m.name, "fingerprint": m.fingerprint}
            for label, m in zip(_labels([m.name for m in models]), models, strict=True)
        ],
        "settings": {
            "samples": e.samples,
            "temperature": e.temperature,
            "max_new_tokens": config.rollout.max_completion_length,
            "seed": config.run.seed,
            "batch": e.batch,
            "dtype": resolve_dtype(config, jax.default_backend()),
            "template_args": config.model.template_args,
        },
        "environment": about,
        "definitions": summary.DEFINITIONS,
        "benchmarks": {},
        "missing": {},
        "scores": {},
        "differences": {},
    }


def _doubts(config: Config, problems: Problems) -> list[str]:
    """What makes a score mean less than it seems to, one line each."""
    split, doubts = config.eval.split, list(problems.task.warnings)
    if left := problems.task.size[split] - len(problems.indices[split]):
        doubts.append(f"{left} problems left out, whose prompts are too long")
    longest = problems.longest_of[split] + config.rollout.max_completion_length
    positions = read_model_config(model_dir(config)).max_position_embeddings
    if longest > positions:
        doubts.append(f"texts of up to {longest} tokens; the model was made for {positions}")
    return doubts


def _about(config: Config, problems: Problems, asked: int) -> dict[str, Any]:
    return {
        "task": problems.task.name,
        "options": config.task.options,
        "split": config.eval.split,
        "fingerprint": problems.task.fingerprint,
        "problems": asked,
    }


def _scores(records: Sequence[Record]) -> dict[str, Any]:
    by = summary.summarise_by(records)
    return {
        "metrics": _told(summary.summarise(records)),
        "by": {c: {value: _told(m) for value, m in groups.items()} for c, groups in by.items()},
    }


def _told(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: each._asdict() for name, each in metrics.items()}


SHORT: Asked = {
    "custom": {"name": "reasoning"},
    "math": {"name": "math500"},
    "zebra": {"name": "zebra-synth", "options": {"puzzles": ["all"]}},
    "zebra-mc": {"name": "zebra-synth", "options": {"puzzles": ["all"], "mode": "mc"}},
}
