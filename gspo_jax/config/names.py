"""Every setting by its dotted name: what it has to be, and what a wrong name or value meant."""

import difflib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from gspo_jax.config.settings import SECTIONS, Resume
from gspo_jax.text.spelling import ELSEWHERE, meant, without_comma


def _fields(section: Any, prefix: str) -> Iterator[tuple[str, Field]]:
    for item in fields(section):
        name = f"{prefix}.{item.name}"
        yield from _fields(item.type, name) if is_dataclass(item.type) else [(name, item)]


FIELDS = {name: f for prefix, section in SECTIONS.items() for name, f in _fields(section, prefix)}
"""Dotted name -> the field of the dataclass, as `settings.setting` made it."""

SETTINGS: dict[str, Any] = {name: item.type for name, item in FIELDS.items()}
"""Dotted name -> type."""

ON_RESUME: dict[str, Resume] = {name: item.metadata["resume"] for name, item in FIELDS.items()}
AT_LEAST: dict[str, int] = {
    name: low for name, item in FIELDS.items() if (low := item.metadata["at_least"]) is not None
}

ALIASES = {"num_generations": "rollout.group_size", "rollout.num_generations": "rollout.group_size"}
KNOWN = frozenset({*SETTINGS, *ALIASES})


def leaves(
    tree: Any, prefix: str = "", stop: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dicts and lists; `stop` names stay whole."""
    if tree in ({}, []) and not prefix:
        return
    if prefix in stop or not isinstance(tree, dict | list) or not tree:
        yield prefix, tree
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key), stop)


def groups() -> set[str]:
    """Names that hold settings: "algo", "algo.kl", ..."""
    return {name[:i] for name in SETTINGS for i, char in enumerate(name) if char == "."}


def members(group: str) -> list[str]:
    """What a group holds, groups within it too."""
    return [name[len(group) + 1 :] for name in SETTINGS if name.startswith(f"{group}.")]


def owner(name: str) -> str | None:
    """The setting that `name` is, or is a value in: "algo.loss" of "algo.loss.clip_low"."""
    return next((setting for setting in SETTINGS if f"{name}.".startswith(f"{setting}.")), None)


def default(name: str) -> Any:
    """A setting's value where nothing is said."""
    made = FIELDS[name].default_factory
    return FIELDS[name].default if made is MISSING else made()


def wanted(name: str) -> str:
    """What a setting, or one value of a mapping, has to be."""
    setting = owner(name)
    assert setting is not None
    kind, usual = SETTINGS[setting], default(setting)
    if setting != name:
        kind = usual = get_args(kind)[1]
    if setting in ("algo.loss", "algo.advantage"):
        return f"a name, or a mapping like {{name: {usual['name']}}}"
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    if get_origin(kind) is list:
        items = {int: "whole numbers, like [1, 2]", float: "numbers, like [1, 0.5]"}
        return f"a list of {items.get(get_args(kind)[0], 'texts, like [a, b]')}"
    if get_origin(kind) is dict:
        return "a mapping, like {key: value}"
    like = f", like {usual:g}" if isinstance(usual, int | float) else ""
    return {int: "a whole number" + like, float: "a number" + like, bool: "true or false"}.get(
        kind, "text"
    )


def near(name: str, value: Any) -> str:
    """ " Did you mean x?", for a value that is not what `wanted` says; else nothing."""
    kind = SETTINGS.get(name)
    if get_origin(kind) is Literal:
        return meant(value, get_args(kind))
    return without_comma(value, kind) if isinstance(kind, type) else ""


def suggestion(name: str) -> str:
    """The setting that was probably meant, or what there is to choose from, after a space."""
    if found := alike(name):
        return f" Did you mean {' or '.join(found)}?"
    group = name.rpartition(".")[0]
    if group in groups():
        return f" {group} takes {members(group)}."
    return f" The sections are {list(SECTIONS)}."


def alike(name: str) -> list[str]:
    """Settings that were probably meant: those of this name in other sections, or a near one."""
    leaf = name.rpartition(".")[2]
    leaf_of = {setting: setting.rpartition(".")[2] for setting in SETTINGS}
    if found := [setting for setting, its_leaf in leaf_of.items() if its_leaf == leaf]:
        return found
    if leaf in ELSEWHERE:
        return [ELSEWHERE[leaf]]
    close = difflib.get_close_matches(leaf, leaf_of.values(), 3, 0.7)
    near = [setting for setting, its_leaf in leaf_of.items() if its_leaf in close]
    return difflib.get_close_matches(name, near, 1, 0)
