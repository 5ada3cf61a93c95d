"""README.md of an exported model: what it was trained from, how, and what was measured.

The front matter is what model hubs read (https://huggingface.co/docs/hub/model-cards). Of the
source's own card, only its licence and base model are taken over: as text, and only if it states
them.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from gspo_jax.algo.losses import LOSSES
from gspo_jax.config.load import Config
from gspo_jax.errors import DataError
from gspo_jax.models.hf import files
from gspo_jax.numbers.shown import measured
from gspo_jax.text.inert import REMOVED, redact

PACKAGES = ("gspo_jax", "jax", "flax", "transformers")
LICENSE_KEYS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CARD_START = 2**16  # bytes of the source's card in which its front matter must end

PLACE = '"path/to/this/directory"'
USE = f"""\
## Use

With transformers:

```python
from transformers import pipeline
chat = pipeline("text-generation", {PLACE})
print(chat([{{"role": "user", "content": "..."}}], max_new_tokens=LENGTH)[0]["generated_text"][-1])
```

With vLLM:

```python
from vllm import LLM, SamplingParams
question, limit = [{{"role": "user", "content": "..."}}], SamplingParams(max_tokens=LENGTH)
print(LLM({PLACE}).chat(question, limit)[0].outputs[0].text)
```
"""

CITATION = """\
## Citation

```bibtex
@article{zheng2025gspo,
  title   = {Group Sequence Policy Optimization},
  author  = {Zheng, Chujie and others},
  journal = {arXiv preprint arXiv:2507.18071},
  year    = {2025},
  url     = {https://arxiv.org/abs/2507.18071}
}
```
"""


def model_card(
    config: Config,
    *,
    steps: int,
    supervised: bool,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    source: Mapping[str, str] | None = None,
) -> str:
    """The text of README.md.

    Args:
        steps: that were trained.
        supervised: whether on worked solutions, or else by reinforcement learning.
        before, after: metrics under their names in metrics.jsonl, as `evaluate` gives them; empty
            where nothing was measured.
        source: what the card of the starting model states, from `stated`.
    """
    source = source or {}
    loss = config.algo.loss["name"]
    path = config.written.get("model.path", (config.model.path,))[0]
    base, name = _base(path, source)
    base = None if config.model.init == "random" else base
    licence = {key: source[key] for key in LICENSE_KEYS if key in source}
    tags = ["gspo_jax", "sft"] if supervised else ["gspo_jax", loss, "reinforcement-learning"]
    if not supervised and not config.task.rewards:
        tags.append("rlvr")  # the task's own reward checks an answer; the user's may do anything
    head = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **licence,
        "tags": tags,
    }
    method = "supervised fine-tuning" if supervised else loss.upper().replace("_", "-")
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_plain(name)}, after {method}\n",
        _origin(config, name, base, licence),
        _procedure(config, steps, supervised),
        _results(before, after),
        USE.replace("LENGTH", str(config.rollout.max_completion_length)),
        "" if supervised or not loss.startswith("gspo") else CITATION,
    ]
    text = redact("\n".join(section for section in sections if section))
    for written, value in config.written.values():
        # What stands in the environment may be meant for nobody else.
        if isinstance(value, str) and len(value) >= 8:
            text = text.replace(value, written if "`" not in written else REMOVED)
    return text


def how_to_use(directory: Path) -> str:
    """What the card in `directory` says of its use, with its path; "" where there is no card."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except OSError:
        return ""
    blocks = re.findall(r"^(With \w+:)\n\n```python\n(.*?)```$", text, re.S | re.M)
    lines = [f"{head}\n{textwrap.indent(code, '  ')}" for head, code in blocks]
    return "".join(lines).replace(PLACE, json.dumps(str(directory), ensure_ascii=False)).rstrip()


def stated(directory: Path) -> dict[str, str]:
    """`base_model` and the licence keys of a model directory's own card, where it has them.

    Whatever cannot be read is not stated: a card is never a reason to fail.
    """
    try:
        start = files.read_start(files.file_in(directory, "README.md"), CARD_START)
        found = re.match(
            r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", start.decode(errors="replace"), re.S | re.M
        )
        # BaseLoader makes texts, lists and dicts, and nothing else.
        head = yaml.load(found[1], Loader=yaml.BaseLoader) if found else None
    except (DataError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(head, dict):
        return {}
    values = {key: head.get(key) for key in ("base_model", *LICENSE_KEYS)}
    return {k: v for k, v in values.items() if isinstance(v, str) and 0 < len(v) <= 200}


def _base(path: str, source: Mapping[str, str]) -> tuple[str | None, str]:
    """The hub id to name as base model, if there is one, and what to call the starting model."""
    if path == "demo":
        return None, "gspo_jax demo"
    if HUB_ID.fullmatch(path) and not Path(path).is_dir():
        return path, path.rpartition("/")[2]
    base = source.get("base_model", "")
    return (base if HUB_ID.fullmatch(base) else None), Path(path).resolve().name


def _origin(config: Config, name: str, base: str | None, licence: Mapping[str, str]) -> str:
    drawn = config.model.init == "random"
    start = "random weights in the shape of" if drawn else "the weights of"
    other = f" (of {_code(base)})" if base and base.rpartition("/")[2] != name else ""
    text = f"Trained with gspo_jax from {start} {_code(name)}{other}."
    if "license" in licence:
        return f"{text} The licence is the one that the source's card states.\n"
    return f"{text} The source's card states no licence, so none is stated here.\n"


def _procedure(config: Config, steps: int, supervised: bool) -> str:
    c, optim = config, config.optim
    task = c.task.name if c.task.path is None else Path(c.task.path).name
    rate = f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup} updates of warm-up"
    rows = {"task": _code(task), "steps": f"{steps:,}"}
    if supervised:
        rows |= {"loss": "negative log-likelihood", "solutions per step": str(c.sft.batch_size)}
    else:
        updates = c.algo.minibatches * c.algo.epochs
        paper = re.findall(
            r"https://arxiv\.org/abs/[\d.]+\d", LOSSES[c.algo.loss["name"]].__doc__ or ""
        )
        rows |= {
            "loss": _options(c.algo.loss) + (f" ({paper[0]})" if paper else ""),
            "advantage": _options(c.algo.advantage),
            "prompts per step": str(c.rollout.prompts),
            "responses per prompt": str(c.rollout.group_size),
            "updates per step": str(updates),
            "response length": f"at most {c.rollout.max_completion_length:,} tokens",
            "temperature": f"{c.rollout.temperature:g}",
            "rewards": ", ".join(map(_reward, c.task.rewards)) or "the task's own",
            "KL penalty": f"{c.algo.kl.coef:g} ({c.algo.kl.kind})" if c.algo.kl.coef else "none",
        }
    rows |= {"learning rate": rate, "seed": str(c.run.seed)}
    if c.model.template_args:
        rows["template arguments"] = _code(c.model.template_args)
    rows["versions"] = ", ".join(f"{p} {_version(p)}" for p in PACKAGES)
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines, ""])


def _results(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [n for n in after if f"{n}_low" in after and n in before]
    names += [n for n in ("eval/truncated", "eval/no_answer") if n in after and n in before]
    if not names:
        return "## Results\n\nNothing was measured on held-out problems.\n"
    lines = [
        f"| {_plain(n.removeprefix('eval/'))} | {_score(before, n)} | {_score(after, n)} |"
        for n in names
    ]
    return "\n".join(
        [
            "## Results",
            "",
            f"On {int(after['eval/n']):,} held-out problems of the task, with 95 % intervals:",
            "",
            "| score | before | after |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def _score(metrics: Mapping[str, Any], name: str) -> str:
    value, *interval = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:  # how metrics.jsonl writes what is not a number
        return "?"
    return measured(value, *interval, scale=1, digits=3)


def _options(settings: Mapping[str, Any]) -> str:
    others = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "name")
    return _code(f"{settings['name']}({others})" if others else settings["name"])


def _reward(spec: str) -> str:
    file, _, function = spec.rpartition(":")
    return _code(f"{Path(file).name}:{function}")  # a directory's name is nobody's business


def _code(text: Any) -> str:
    return f"`{_plain(str(text))}`"


def _plain(text: str) -> str:
    """One line that ends no code span, table cell or tag."""
    line = " ".join(text.split())[:200]
    return re.sub(r"[`|<>\[\]]", "_", "".join(c if c.isprintable() else "_" for c in line))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
