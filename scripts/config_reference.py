"""Write docs/configuration.md from the settings themselves.

    python scripts/config_reference.py [FILE]

Names, types, smallest values, defaults, rules and meanings are those of
gspo_jax/config/settings.py, options those of the functions' signatures.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gspo_jax.algo.advantages import ADVANTAGES
from gspo_jax.algo.losses import LOSSES
from gspo_jax.config import settings
from gspo_jax.config.load import Config
from gspo_jax.config.names import ALIASES, AT_LEAST, ON_RESUME, SETTINGS, default
from gspo_jax.tasks import TASKS, user_data
from gspo_jax.text.spelling import ELSEWHERE

OUT = Path(__file__).parent.parent / "docs" / "configuration.md"

# Bounds that are no smallest value: what the page says, and a value that is refused.
FURTHER: dict[str, tuple[str, str]] = {
    "task.curriculum": ("shares below 1, one of them 0", "{easy: 1}"),
    "task.reward_timeout": ("> 0", "0"),
    "rollout.group_size": ("≥ 2 without a critic", "1"),
    "rollout.temperature": ("> 0", "0"),
    "rollout.top_p": ("> 0, ≤ 1", "1.01"),
    "algo.critic.clip": ("> 0", "0"),
    "optim.b1": ("≥ 0, < 1", "1"),
    "optim.b2": ("≥ 0, < 1", "1"),
    "optim.eps": ("> 0", "0"),
    "optim.max_grad_norm": ("> 0", "0"),
    "mesh.data": ("≥ 1, or -1", "0"),
    "mesh.fsdp": ("≥ 1, or -1", "0"),
    "mesh.tensor": ("≥ 1, or -1", "0"),
    "mesh.expert": ("≥ 1, or -1", "0"),
    "eval.split": ("one of train, val and test", "dev"),
}

HEAD = """\
# Configuration

A run is one YAML file, which says only what differs from the defaults, and overrides on the command
line. The path in the YAML, the override and the attribute in Python have the same name:

```yaml
model:
  path: demo
rollout:
  group_size: 16
algo:
  loss: {name: gspo, clip_low: 3e-4, clip_high: 4e-4}
```

```bash
gspo-jax train mine.yaml rollout.group_size=8 algo.loss=grpo run.name=mine
gspo-jax train mine.yaml --print-config
```

The first trains, the second shows every setting with its value. In Python it is
`gspo_jax.load_config("mine.yaml", ["rollout.group_size=8"])`.

- A name that does not exist is refused with the one that was probably meant, before anything is
  loaded; so are values of another type or out of range, and combinations that cannot work.
- A value is written as in YAML: `task.rewards=[judge.py:polite, judge.py:right]`,
  `task.fields={prompt: question}`, `task.name=null`. In the shell, quote what has spaces or braces.
- One text may stand for a list of one, and `algo.loss=grpo` for `{name: grpo}`.
- In `algo.loss` and `algo.advantage`, null undoes what the file says: the function's own default.
- `${oc.env:NAME}` is read from the environment, and saved as it is written.
- Naming another task clears `task.options`; setting `task.path` sets `task.name` to null, and the
  other way round.

`runs/NAME/config.yaml` has all settings of a run. "On resume" says what becomes of another
value where the run continues: [what may change](checkpoints.md#what-may-change).

*This page is written by [`scripts/config_reference.py`](../scripts/config_reference.py)
from the settings.*
"""

OPTIONS = """\
## Options of `algo.loss`

`algo.loss={name: gspo, clip_low: 1e-3}`, or `algo.loss.clip_low=1e-3`. What they mean:
[equations](equations.md).

| `name` | options and their defaults |
|---|---|
LOSSES

## Options of `algo.advantage`

| `name` | options and their defaults |
|---|---|
ADVANTAGES

## Options of `task.options`

What they mean: [tasks](tasks.md). `task.path` is data of your own.

| task | options and their defaults |
|---|---|
TASKS

## Names from elsewhere

ALIASES These are refused, with the name to use:

| elsewhere | here |
|---|---|
ELSEWHERE
"""


def page() -> str:
    """The whole page."""
    chapters = [chapter(f.name, f.type) for f in fields(Config) if is_dataclass(f.type)]
    rows = {
        "LOSSES": [_options(f"[`{n}`](equations.md#{n})", f) for n, f in LOSSES.items()],
        "ADVANTAGES": [
            *(_options(f"`{n}`", f) for n, f in ADVANTAGES.items()),
            f"| `gae` | {_given(settings.GAE)} |",
        ],
        "TASKS": _tasks(),
        "ALIASES": [f"`{alias}` stands for `{name}`." for alias, name in ALIASES.items()],
        "ELSEWHERE": [f"| `{theirs}` | `{ours}` |" for theirs, ours in ELSEWHERE.items()],
    }
    tail = OPTIONS
    for mark, lines in rows.items():
        tail = re.sub(rf"\b{mark}\b", lambda _, lines=lines: "\n".join(lines), tail, count=1)
    return "\n".join([HEAD, *chapters, tail])


def chapter(name: str, kind: Any, level: str = "##") -> str:
    """A section of settings and, below it, the sections within."""
    own = [f for f in fields(kind) if not is_dataclass(f.type)]
    within = [f for f in fields(kind) if is_dataclass(f.type)]
    meaning = meanings(kind)
    lines = [
        f"{level} {name}",
        "",
        str(inspect.getdoc(kind)),
        "",
        "| setting | values | default | on resume | meaning |",
        "|---|---|---|---|---|",
        *(row(f"{name}.{f.name}", meaning[f.name]) for f in own),
        "",
    ]
    lines += [chapter(f"{name}.{f.name}", f.type, f"{level}#") for f in within]
    return "\n".join(lines)


def row(name: str, meaning: str) -> str:
    cells = [f"`{name}`", values(name), f"`{shown(default(name))}`", ON_RESUME[name], meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def values(name: str) -> str:
    """What may be written, with its bounds."""
    kind = SETTINGS[name]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    if get_origin(kind) is list:
        text = f"list of {words[get_args(kind)[0]]}s"
    elif get_origin(kind) is dict:
        text = "mapping"
    else:
        text = words.get(kind, "text or `null`")
    bounds = [f"≥ {AT_LEAST[name]}"] if name in AT_LEAST else []
    bounds += [FURTHER[name][0]] if name in FURTHER else []
    return ", ".join([text, *bounds])


def meanings(kind: type) -> dict[str, str]:
    """Field -> the text below it in the source, on one line."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(settings)).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    found = {}
    for node, below in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found[node.target.id] = " ".join(str(below.value.value).split())
    return found


def shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[\w-]+", value):
        return value
    return json.dumps(value)


def _options(first: str, function: Callable, hidden: Iterable[str] = ("weight", "groups")) -> str:
    parameters = inspect.signature(function).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    return f"| {first} | {_given({p.name: p.default for p in own})} |"


def _given(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={shown(value)}`" for name, value in options.items()) or "none"


def _tasks() -> list[str]:
    """One row for all tasks that take the same."""
    names: dict[str, list[str]] = {}
    for name, function in {**TASKS, "path": user_data}.items():
        cells = _options("", function, ("seed", "fields"))
        names.setdefault(cells, []).append("`task.path`" if name == "path" else f"`{name}`")
    return [f"| {', '.join(same)} {cells[3:]}" for cells, same in names.items()]


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else OUT).write_text(page(), encoding="utf-8")
