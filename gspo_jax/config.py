"""A run's configuration: the defaults, a YAML file and dotted overrides in one checked object.

    gspo-jax train configs/demo.yaml rollout.group_size=16

A mistake costs seconds: what is misspelt, of the wrong type or impossible is refused with the name
that was typed, before weights are loaded or anything is compiled.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gspo_jax import checks
from gspo_jax.console import redact
from gspo_jax.errors import ConfigError
from gspo_jax.settings import (
    AlgoConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    TaskConfig,
)

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections. Construction checks the whole, and raises ConfigError."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    run: RunConfig = field(default_factory=RunConfig)
    written: dict[str, tuple[str, Any]] = field(
        default_factory=dict, repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """Not a setting: the text of values written as ${...}, so that what the environment holds
    (a token in a path, say) is used but never saved. Dotted name -> (text, resolved value)."""

    def __post_init__(self):
        checks.check_numbers(dict(_leaves(_sections(self), stop=KNOWN)))
        checks.check_model(self.model)
        checks.check_task(self.task, self.eval)
        checks.check_rollout(self.rollout, self.algo)
        checks.check_algo(self.algo, self.rollout)
        checks.check_rest(self.optim, self.mesh, self.run)


def warnings(config: Config) -> list[str]:
    """What is possible but probably not meant, one line each."""
    return checks.algo_warnings(config.algo, config.rollout)


# ---------------------------------------------------------------------------------- loading


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The defaults, a YAML file over them, and `section.key=value` overrides over both.

    Raises:
        ConfigError: one line with the dotted name: a setting that does not exist (and the one that
            was probably meant), a value of the wrong type, or a combination that cannot work.
    """
    layers = []
    if path is not None:
        layers.append(_named(_leaves(read_yaml(Path(path)), stop=KNOWN), f"{path}: "))
    layers.append(_named(dict(map(_parse, overrides)).items(), ""))
    merged = OmegaConf.structured(Config)
    for layer in layers:
        task = layer.get("task", {})
        if any(task.get(key) not in (None, merged.task[key]) for key in ("name", "path")):
            with read_write(merged.task):  # another task: the former one's options are not its own
                merged.task.options = {}
        merged = _guarded(layer, OmegaConf.merge, merged, layer)
    if not merged.run.name:
        stem = Path(path).stem if path is not None else "gspo"
        merged = OmegaConf.merge(merged, {"run": {"name": f"{stem}-seed{merged.run.seed}"}})
    texts = dict(_leaves(OmegaConf.to_container(merged, resolve=False)))
    values = dict(_leaves(_guarded({}, partial(OmegaConf.to_container, resolve=True), merged)))
    written = {
        name: (text, values[name])
        for name, text in texts.items()
        if isinstance(text, str) and "${" in text
    }
    return replace(_guarded({}, OmegaConf.to_object, merged), written=written)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with ${...} as it is written there.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.") from None
    except YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}:{where.column + 1}" if where else ""
        raise ConfigError(f"{path}{at}: not YAML: {_first_line(error)}.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this as a config file ({error}).") from None
    plain: Any = OmegaConf.to_container(layer, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected sections (model:, task:, ...), got a list.")
    return plain


def _parse(override: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value). The value is YAML, but where text is wanted it is as typed."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is not an override; write section.key=value.")
    if _takes_text(SETTINGS.get(name)) and text != "null":
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        return name, text[1:-1] if quoted else text
    try:
        layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override}: not YAML: {_first_line(error)}.") from None
    return name, layer["value"]


def _takes_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _guarded(layer: dict[str, Any], action: Callable[..., Any], *args: Any) -> Any:
    """`action(*args)`, where OmegaConf's complaint about `layer` becomes one line of ours."""
    try:
        return action(*args)
    except OmegaConfBaseException as error:
        name = (error.full_key or "").partition("[")[0]
        given = dict(_leaves(layer, stop=KNOWN))
        if name in SETTINGS and name in given:
            value = "null" if given[name] is None else given[name]
            raise ConfigError(f"{name}={value}: expected {_describe(SETTINGS[name])}.") from None
        raise ConfigError(f"{name + ': ' if name else ''}{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).strip().splitlines()[0]


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if get_origin(kind) is list:
        return f"a list of {'numbers' if get_args(kind)[0] is float else 'texts'}"
    return plain.get(kind, "a mapping {key: value}" if get_origin(kind) is dict else "text")


def _leaves(
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
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), stop)


# ------------------------------------------------------------------------------------ names


def _settings(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every setting."""
    found: dict[str, Any] = {}
    for item in fields(kind):
        if item.metadata.get("omegaconf_ignore"):
            continue
        name = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            found |= _settings(item.type, f"{name}.")
        else:
            found[name] = item.type
    return found


SETTINGS: dict[str, Any] = _settings(Config)

ALIASES = {"num_generations": "rollout.group_size", "rollout.num_generations": "rollout.group_size"}
KNOWN = frozenset({*SETTINGS, *ALIASES})


def _named(given: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
    """(name, value) pairs as one nested layer: names known, aliases and shorthands replaced."""
    layer: dict[str, Any] = {}
    for name, value in given:
        setting = ALIASES.get(name, name)
        owner = next((s for s in SETTINGS if setting == s or setting.startswith(f"{s}.")), None)
        if owner is None and name in _groups():
            if value in (None, {}):
                continue  # a section left empty
            raise ConfigError(f"{source}{name}={value}: a section, with {_members(name)} in it.")
        if owner is None:
            raise ConfigError(f"{source}unknown setting {name}.{_suggestion(name)}")
        if setting == owner:
            value = _shorthand(owner, value)
        is_mapping = setting != owner or isinstance(value, dict)
        if is_mapping and get_origin(SETTINGS[owner]) is not dict:
            raise ConfigError(f"{source}{name}={value}: expected {_describe(SETTINGS[owner])}.")
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            _put(layer, f"{setting}.{key}" if key else setting, item, source)
    task = layer.get("task", {})
    chosen = [key for key in ("name", "path") if task.get(key) is not None]
    if len(chosen) == 1:  # the later layer's choice replaces the earlier one's
        task[{"name": "path", "path": "name"}[chosen[0]]] = None
    return layer


def _groups() -> set[str]:
    """Names that hold settings: "algo", "algo.kl", ..."""
    return {name[:i] for name in SETTINGS for i, char in enumerate(name) if char == "."}


def _members(group: str) -> list[str]:
    return [name[len(group) + 1 :] for name in SETTINGS if name.startswith(f"{group}.")]


def _shorthand(name: str, value: Any) -> Any:
    """`algo.loss=grpo` for {name: grpo}, and one text where a list of texts is wanted."""
    if isinstance(value, str) and name in ("algo.loss", "algo.advantage"):
        return {"name": value}
    if value is False and "off" in get_args(SETTINGS[name]):
        return "off"  # which YAML reads as false
    return [value] if isinstance(value, str) and SETTINGS[name] == list[str] else value


def _put(tree: dict[str, Any], name: str, value: Any, source: str) -> None:
    *path, last = name.split(".")
    for key in path:
        tree = tree.setdefault(key, {})
    if last in tree and tree[last] != value:
        raise ConfigError(f"{source}{name} is given twice, as {tree[last]} and as {value}.")
    tree[last] = value


def _suggestion(name: str) -> str:
    """The setting that was probably meant, or what there is to choose from, after a space."""
    group, _, leaf = name.rpartition(".")
    leaf_of = {setting: setting.rpartition(".")[2] for setting in SETTINGS}
    meant = [setting for setting, its_leaf in leaf_of.items() if its_leaf == leaf]
    if not meant and leaf in checks.ELSEWHERE:
        meant = [checks.ELSEWHERE[leaf]]
    if not meant:
        alike = difflib.get_close_matches(leaf, leaf_of.values(), 3, 0.7)
        near = [setting for setting, its_leaf in leaf_of.items() if its_leaf in alike]
        meant = difflib.get_close_matches(name, near, 1, 0)
    if meant:
        return f" Did you mean {' or '.join(meant)}?"
    if group in _groups():
        return f" {group} takes {_members(group)}."
    return f" The sections are {[f.name for f in fields(Config) if f.name != 'written']}."


# ------------------------------------------------------------------------------ what it says


def model_dir(config: Config) -> Path:
    """Where the model lies; a hub id is fetched, "demo" is the directory inside the package.

    Raises:
        DataError: there is no such directory, and no such model on the hub.
    """
    if config.model.path == "demo":
        return PACKAGE / "assets" / "demo"
    from gspo_jax.models.files import resolve  # brings flax, which reading a config does without

    return resolve(config.model.path)


def run_dir(config: Config) -> Path:
    """The folder that the run writes into."""
    return Path(config.run.dir) / (config.run.name or f"gspo-seed{config.run.seed}")


def packaged_config(name: str) -> Path:
    """A file of configs/, which a wheel carries inside the package and a checkout beside it."""
    inside = PACKAGE / "configs" / name
    return inside if inside.exists() else PACKAGE.parent / "configs" / name


def to_yaml(config: Config) -> str:
    """All settings, in order, such that loading them gives an equal config.

    Values that were written as ${...} appear as they were written: what the environment holds
    does not reach a saved file. Nor does what looks like a credential, or a password in a URL.
    """
    tree = _sections(config)
    current = dict(_leaves(tree))
    for name, (text, value) in config.written.items():
        if current.get(name) == value:
            *path, last = name.split(".")
            place: Any = tree
            for key in path:
                place = place[int(key) if isinstance(place, list) else key]
            place[int(last) if isinstance(place, list) else last] = text
    return redact(OmegaConf.to_yaml(OmegaConf.create(tree)))


def diff(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in a, value in b) of every setting that differs; None for absent."""
    left, right = dict(_leaves(_sections(a))), dict(_leaves(_sections(b)))
    names = [*left, *(name for name in right if name not in left)]
    return {n: (left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)}


def changes(saved: str, config: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (then, now) of what differs from a YAML text that `to_yaml` once gave.

    Values are compared as they were written. A setting that did not exist then is no change while
    it has its default.
    """
    texts = (saved, to_yaml(config), to_yaml(Config()))
    then, now, default = (
        dict(_leaves(OmegaConf.to_container(OmegaConf.create(text), resolve=False)))
        for text in texts
    )
    names = [*then, *(name for name in now if name not in then and default.get(name) != now[name])]
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def _sections(config: Config) -> dict[str, dict[str, Any]]:
    """Section name -> its settings, as plain dicts and lists."""
    return {name: value for name, value in asdict(config).items() if name != "written"}
