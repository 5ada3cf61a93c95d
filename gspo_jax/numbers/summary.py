"""From single responses to tables: every score with n and a 95 % interval. No JAX.

A record is one response to one problem, as `evaluate.responses` makes it and a line of a saved
file holds it:

    id, index      of the problem: its name, and its place among those that were asked
    sample         0 is the greedy response, 1 ... K are the samples
    text           without special tokens
    answer         what was read out of it; None where there is none; not there where the problem
                   has no answer to compare it with, and then nothing is said of answers
    score          None where no function scored it, which counts as 0
    tokens         its length, EOS included
    truncated      it ended at the length limit
    by             optional: what the problem belongs to, such as {"size": "3*4"}
    right, cells   optional: right cells of a logic grid, and all of its cells
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gspo_jax.errors import DataError
from gspo_jax.numbers.shown import measured
from gspo_jax.numbers.statistics import (
    Estimate,
    difference,
    estimate,
    majority,
    mean_interval,
    pass_at_k,
)

Record = dict[str, Any]

DEFINITIONS = {
    "n": "problems; intervals are 95 % intervals over problems: Wilson's where each counts 0 or "
    "1, else an expanded percentile bootstrap: 4,000 resamples of the problems, a 0 and a 1",
    "greedy": "mean score of the most likely response",
    "avg@k": "mean score of k samples, averaged over problems",
    "pass@k": "best score among k samples; of right and wrong ones the unbiased estimate of the "
    "chance that one of k is right (Chen et al., 2021)",
    "maj@k": "score of the most frequent answer among k samples; of equally frequent ones the "
    "first; 0 where no sample has an answer",
    "cells": "right cells of all cells of all grids; cells without an answer are wrong",
    "no answer": "share of responses in which no answer can be read",
    "truncated": "share of responses that ended at the length limit",
    "tokens": "mean length of a response, EOS included",
    "not scored": "share of responses that no function scored; they count as 0",
    "difference": "mean difference on the same problems, in points; pairs are resampled, together "
    "with one problem more that each model alone solves",
}
COLUMNS = ("task", "subject", "type", "difficulty", "level", "size")  # of a problem, to group by
MOST_VALUES = 60  # of a column that is worth a table
ORDER = ("easy", "small", "medium", "hard", "large", "xl")


class Measure(NamedTuple):
    """One number per problem, and what it is a part of; None is 1 each."""

    values: np.ndarray
    weights: np.ndarray | None = None


def measures(records: Iterable[Record]) -> dict[str, Measure]:
    """Every metric as one number per problem, the problems in the order of their indices.

    Raises:
        DataError: no records, or some problems have responses that others lack.
    """
    problems: dict[int, dict[int, Record]] = {}
    for record in records:
        problems.setdefault(record["index"], {})[record["sample"]] = record
    kinds = {tuple(sorted(responses)) for responses in problems.values()}
    if len(kinds) != 1:
        raise DataError(f"{len(problems)} problems with {len(kinds)} sets of samples; wanted one.")
    table = [[own[s] for s in sorted(own)] for _, own in sorted(problems.items())]
    found: dict[str, Measure] = {}
    first = 0 in next(iter(kinds))
    if first:
        greedy = [own[:1] for own in table]
        found["greedy"] = Measure(_scores(greedy)[:, 0])
        found |= _of_responses(greedy, "greedy")
    samples = [own[first:] for own in table]
    if k := len(samples[0]):
        scores = _scores(samples)
        found[f"avg@{k}"] = Measure(scores.mean(1))
        ks = {2**i for i in range(1, k.bit_length()) if 2**i < k} | ({k} - {1})
        found |= {f"pass@{i}": Measure(pass_at_k(scores, i)) for i in sorted(ks)}
        if k > 1 and all("answer" in r for own in samples for r in own):
            found[f"maj@{k}"] = Measure(np.array([_voted(own) for own in samples]))
        found |= _of_responses(samples, f"avg@{k}")
    return found


def summarise(records: Iterable[Record]) -> dict[str, Estimate]:
    """Metric -> value, interval and number of problems; names as in `DEFINITIONS`.

    Those of responses follow what they are of: "greedy/truncated", "avg@8/no answer".
    """
    return {name: _estimate(name, each) for name, each in measures(records).items()}


def summarise_by(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Column -> its value -> `summarise` of the problems that have it."""
    found = {}
    for column in dict.fromkeys(name for record in records for name in record.get("by", {})):
        groups: dict[str, list[Record]] = {}
        for record in records:
            if column in record.get("by", {}):
                groups.setdefault(str(record["by"][column]), []).append(record)
        if 1 < len(groups) <= MOST_VALUES:
            found[column] = {
                value: summarise(groups[value]) for value in sorted(groups, key=_place)
            }
    return found


def differences(before: Iterable[Record], after: Iterable[Record]) -> dict[str, Estimate]:
    """Metric -> `after` minus `before`, on the problems that both were asked."""
    before, after = list(before), list(after)
    shared = {r["id"] for r in before} & {r["id"] for r in after}
    if not shared:
        return {}
    numbers = {name: i for i, name in enumerate(sorted(shared))}
    one, two = (
        measures({**r, "index": numbers[r["id"]]} for r in rows if r["id"] in shared)
        for rows in (before, after)
    )
    return {
        name: difference(one[name].values, two[name].values, one[name].weights)
        for name in one
        if name in two
    }


def _scores(table: Sequence[Sequence[Record]]) -> np.ndarray:
    """[N, K]; what was not scored counts as 0."""
    return np.array([[r["score"] or 0.0 for r in own] for own in table], float)


def _voted(own: Sequence[Record]) -> float:
    """The score of the majority's answer: its mean, should texts with one answer score apart."""
    answer = majority([r["answer"] for r in own])
    votes = [r["score"] or 0.0 for r in own if r["answer"] == answer]
    return 0.0 if answer is None else float(np.mean(votes))


def _of_responses(table: Sequence[Sequence[Record]], kind: str) -> dict[str, Measure]:
    def share(test) -> Measure:
        return Measure(np.array([np.mean([test(r) for r in own]) for own in table], float))

    found = {}
    if all("cells" in r for own in table for r in own):
        right = [np.mean([r["right"] for r in own]) for own in table]
        cells = [own[0]["cells"] for own in table]
        found["cells"] = Measure(np.array(right, float), np.array(cells, float))
    if all("answer" in r for own in table for r in own):
        found["no answer"] = share(lambda r: r["answer"] is None)
    found["truncated"] = share(lambda r: r["truncated"])
    found["tokens"] = share(lambda r: r["tokens"])
    found["not scored"] = share(lambda r: r["score"] is None)
    return {f"{kind}/{name}": each for name, each in found.items()}


def _estimate(name: str, measure: Measure) -> Estimate:
    if name.endswith("/tokens"):
        values = measure.values
        return Estimate(float(values.mean()), *mean_interval(values[:, None]), len(values))
    return estimate(*measure)


def _place(value: str) -> tuple[int, float, str]:
    """Known names in their order, then numbers by size, then texts."""
    if value in ORDER:
        return ORDER.index(value), 0.0, ""
    return (len(ORDER), float(value), "") if value.isdigit() else (len(ORDER) + 1, 0.0, value)


# ------------------------------------------------------------------------------------- tables


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """results.json as one table: benchmark, metric, n, one column per model, then differences."""
    names, labels = _models(results)
    apart = [f"{label} - {labels[0]}" for label in labels[1:]]
    table = [["benchmark", "metric", "n", *labels, *apart]]
    for benchmark, scores in results["scores"].items():
        title = benchmark
        named = dict.fromkeys(n for score in scores.values() for n in score["metrics"])
        for name in sorted(named, key=lambda n: "/" in n and not n.endswith("/cells")):
            if name.startswith("pass@") and name.replace("pass", "avg") not in named:
                continue  # of fewer samples than there are: in results.json alone
            found = [scores.get(m, {}).get("metrics", {}).get(name) for m in names]
            if name.endswith("/not scored") and not any(e and e["value"] for e in found):
                continue
            pairs = results["differences"].get(benchmark, {})
            cells = [_shown(name, e) for e in found]
            cells += [_change(name, pairs.get(m, {}).get(name)) for m in names[1:]]
            table.append([title, _label(name), _counts(found), *cells])
            title = ""
    return table


def rows_by(results: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """ "benchmark by column" -> a table of what is right, for each value of the column."""
    tables = {}
    for benchmark, scores in results["scores"].items():
        models = [pair for pair in zip(*_models(results), strict=True) if pair[0] in scores]
        for column in dict.fromkeys(c for score in scores.values() for c in score["by"]):
            by = {m: scores[m]["by"].get(column, {}) for m, _ in models}
            groups = {value for own in by.values() for value in own}
            named = dict.fromkeys(
                n for own in by.values() for group in own.values() for n in group if _is_score(n)
            )
            wanted = [(model, label, n) for n in named for model, label in models]
            table = [[column, "n", *(f"{label}: {_label(n)}" for _, label, n in wanted)]]
            for value in sorted(groups, key=_place):
                found = [by[model].get(value, {}).get(n) for model, _, n in wanted]
                cells = [_shown(n, e) for (*_, n), e in zip(wanted, found, strict=True)]
                table.append([value, _counts(found), *cells])
            tables[f"{benchmark} by {column}"] = table
    return tables


def markdown(results: Mapping[str, Any]) -> str:
    """results.json as a page of tables, with what was measured and how."""
    parts = ["# Benchmarks", f"`{results['command']}`", _as_markdown(rows(results))]
    parts += ["\n".join(notes)] if (notes := _notes(results)) else []
    for title, table in rows_by(results).items():
        parts += [f"## {title}", _as_markdown(table)]
    about = {
        **{m["label"]: f"{m['name']} ({m['fingerprint']})" for m in results["models"]},
        **{name: _asked(b) for name, b in results["benchmarks"].items()},
        "settings": ", ".join(f"{k}={v}" for k, v in results["settings"].items()),
        "commit": results["environment"].get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in results["environment"]["versions"].items()),
        "devices": ", ".join(results["environment"]["devices"]),
    }
    parts += [
        "## What was measured",
        _as_markdown([["", ""], *([k, str(v)] for k, v in about.items())]),
    ]
    known = [["metric", "definition"], *([k, v] for k, v in results["definitions"].items())]
    return "\n\n".join([*parts, "## Metrics", _as_markdown(known)]) + "\n"


def _asked(benchmark: Mapping[str, Any]) -> str:
    b = benchmark
    return f"{b['problems']} problems of {b['task']}, {b['split']} ({b['fingerprint']})"


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = [f"- {name} is missing: {why}" for name, why in results["missing"].items()]
    for name, scores in results["scores"].items():
        notes += [
            f"- {name}, {m}: {note}" for m, score in scores.items() for note in score["notes"]
        ]
    return notes


def _is_score(name: str) -> bool:
    kind, _, what = name.partition("/")
    return what == "cells" or (not what and kind.startswith(("greedy", "avg@")))


def _label(name: str) -> str:
    kind, _, what = name.partition("/")
    return f"{what}, {kind}" if what else kind


def _models(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the models, and what to call them in tables."""
    return [m["name"] for m in results["models"]], [m["label"] for m in results["models"]]


def _counts(found: Sequence[Mapping[str, Any] | None]) -> str:
    return "/".join(map(str, sorted({each["n"] for each in found if each})))


def _shown(name: str, each: Mapping[str, Any] | None) -> str:
    """ "12.5% [10.1, 15.2]", or a number of tokens; nothing where it was not measured."""
    is_count = name.endswith("/tokens")
    return _text(each, scale=1 if is_count else 100, unit="" if is_count else "%")


def _change(name: str, each: Mapping[str, Any] | None) -> str:
    """The same of a difference, in points or in tokens."""
    return _text(each, scale=1 if name.endswith("/tokens") else 100, sign="+")


def _text(each: Mapping[str, Any] | None, **form: Any) -> str:
    if not each:
        return ""
    return measured(each["value"], each["low"], each["high"], **form).replace("100.0", "100")


def _as_markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = (["".join(_escaped(c)) for c in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|").replace("*", "\\*")
