"""What a run's config.yaml says, and what has changed since one was written."""

import os
from typing import Any

from omegaconf import OmegaConf

from gspo_jax.config.load import Config, sections
from gspo_jax.config.names import leaves
from gspo_jax.text.inert import recorded

PLACES = (("model", "path"), ("task", "path"), ("task", "rewards"), ("run", "resume"))
"""Settings that may name a file or a directory."""


def to_yaml(config: Config, *, absolute: bool = False) -> str:
    """All settings, in order, such that loading them gives an equal config.

    With `absolute`, files and directories that are there have their whole path, so that the text
    means the same wherever it is read.

    Values that were written as ${...} appear as they were written: what the environment holds
    does not reach a saved file. Nor does a secret: see `inert.recorded`.
    """
    tree = sections(config)
    current = dict(leaves(tree))
    if absolute:
        _locate(tree)
    for name, (text, value) in config.written.items():
        if current.get(name) == value:
            *path, last = name.split(".")
            place: Any = tree
            for key in path:
                place = place[int(key) if isinstance(place, list) else key]
            place[int(last) if isinstance(place, list) else last] = text
    return OmegaConf.to_yaml(OmegaConf.create(_recorded(tree)))


def _locate(tree: dict[str, Any]) -> None:
    """Make what PLACES name absolute, where it is there."""

    def whole(text: Any) -> Any:
        if not isinstance(text, str) or text in ("demo", "auto", "never"):
            return text
        file, colon, function = text.rpartition(":") if text.count(":") else (text, "", "")
        there = os.path.exists(file)
        return f"{os.path.abspath(file)}{colon}{function}" if there else text

    for section, key in PLACES:
        value = tree.get(section, {}).get(key)
        if value is not None:
            found = [whole(item) for item in value] if isinstance(value, list) else whole(value)
            tree[section][key] = found


def _recorded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _recorded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_recorded(item) for item in value]
    return recorded(value) if isinstance(value, str) else value


def changes(saved: str, config: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (then, now) of what differs from a YAML text that `to_yaml` once gave.

    Values are compared as they were written, paths as what they name from here. A setting that did
    not exist then is no change while it has its default.
    """
    texts = (saved, to_yaml(config), to_yaml(Config()))
    trees: Any = [OmegaConf.to_container(OmegaConf.create(t), resolve=False) for t in texts]
    for tree in trees:
        _locate(tree)
    then, now, default = (dict(leaves(tree)) for tree in trees)
    names = [*then, *(name for name in now if name not in then and default.get(name) != now[name])]
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}
