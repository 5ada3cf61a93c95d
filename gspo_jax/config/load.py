"""A run's configuration: the defaults, a YAML file and dotted overrides in one checked object.

    gspo-jax train configs/demo.yaml rollout.group_size=16

A mistake costs seconds: what is misspelt, of the wrong type or impossible is refused with the name
that was typed, before weights are loaded or anything is compiled.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gspo_jax.config import checks
from gspo_jax.config.names import (
    ALIASES,
    KNOWN,
    SETTINGS,
    groups,
    leaves,
    members,
    near,
    owner,
    suggestion,
    wanted,
)
from gspo_jax.config.settings import (
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
from gspo_jax.errors import ConfigError
from gspo_jax.text.spelling import shown

PACKAGE = Path(__file__).parents[1]


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
        checks.check_numbers(dict(leaves(sections(self), stop=KNOWN)))
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
    file = {} if path is None else dict(leaves(read_yaml(Path(path)), stop=KNOWN))
    typed = dict(map(_parse, overrides))
    layers = [_named(file.items(), f"{path}: "), _named(typed.items(), "")]
    try:
        return _merged(path, layers)
    except ConfigError as error:
        name = re.match(r"[\w.]+", str(error))
        if name and _among(name[0], file) and not _among(name[0], typed):
            raise ConfigError(f"{path}: {error}") from None
        raise


def _among(name: str, given: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in given)


def _merged(path: str | Path | None, layers: list[dict[str, Any]]) -> Config:
    merged = OmegaConf.structured(Config)
    for layer in layers:
        task = layer.get("task", {})
        if any(task.get(key) not in (None, merged.task[key]) for key in ("name", "path")):
            with read_write(merged.task):  # another task: the former one's options are not its own
                merged.task.options = {}
        merged = _guarded(layer, OmegaConf.merge, merged, layer)
    tree: Any = OmegaConf.to_container(merged, resolve=False)
    if not tree["run"]["name"]:
        stem = Path(path).stem if path is not None else "gspo"
        seed = _guarded(tree, lambda: merged.run.seed)
        merged = OmegaConf.merge(merged, {"run": {"name": f"{stem}-seed{seed}"}})
    texts = dict(leaves(tree))
    values = dict(leaves(_guarded(tree, partial(OmegaConf.to_container, resolve=True), merged)))
    written = {
        name: (text, values[name])
        for name, text in texts.items()
        if isinstance(text, str) and "${" in text
    }
    return replace(_guarded(tree, OmegaConf.to_object, merged), written=written)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with ${...} as it is written there.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    if path.suffix in DATA and path.is_file():
        raise ConfigError(f"{path}: wanted a YAML file; data of your own is task.path={path}.")
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.{_instead(path)}") from None
    except YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}:{where.column + 1}" if where else ""
        why = TAB if _is_at_tab(path, where) else _first_line(error)
        raise ConfigError(f"{path}{at}: not YAML: {why}.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: a directory; wanted a YAML file. A model is model.path={path}, data is "
            f"task.path={path}."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text in UTF-8; wanted a YAML file.") from None
    except OSError as error:  # OmegaConf's, too, for what is no mapping
        raise ConfigError(
            f"{path}: cannot read this as a config file ({_first_line(error)}); wanted sections "
            "(model:, task:, ...)."
        ) from None
    plain: Any = OmegaConf.to_container(layer, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected sections (model:, task:, ...), got a list.")
    return plain


def _instead(path: Path) -> str:
    """What was probably meant by a config file that is not there."""
    text, _, value = str(path).partition("=")
    if value or str(path) in SETTINGS:
        return f" A setting is written {text if text in SETTINGS else 'section.key'}=VALUE."
    files = {file.stem: file for file in path.parent.glob("*.y*ml")}
    close = difflib.get_close_matches(path.stem, files, 1)
    return f" Did you mean {files[close[0]]}?" if close else ""


DATA = (".jsonl", ".parquet", ".csv", ".tsv")

TAB = "a tab, where lines are indented by spaces"


def _is_at_tab(path: Path, where: Any) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines() if where else []
    return bool(lines) and where.line < len(lines) and lines[where.line].lstrip(" ")[:1] == "\t"


def _parse(override: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value). The value is YAML, but where text is wanted it is as typed."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is not an override; write section.key=value.")
    kind = SETTINGS.get(ALIASES.get(name, name))
    if _takes_text(kind) and text != "null":
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        return name, text[1:-1] if quoted else text
    if kind is not None and not text.strip():
        raise ConfigError(f"{name} is empty: expected {wanted(ALIASES.get(name, name))}.")
    try:
        layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override}: not YAML: {_first_line(error)}.") from None
    return name, layer["value"]


def _takes_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _guarded(tree: dict[str, Any], action: Callable[..., Any], *args: Any) -> Any:
    """`action(*args)`, where OmegaConf's complaint about `tree` becomes one line of ours."""
    try:
        return action(*args)
    except OmegaConfBaseException as error:
        name = (error.full_key or "").partition("[")[0]
        given = dict(leaves(tree, stop=KNOWN)) | dict(leaves(tree))
        raise ConfigError(_complaint(error, name, given)) from None


def _complaint(error: Exception, name: str, given: dict[str, Any]) -> str:
    if name not in given:
        return f"{name + ': ' if name else ''}{_first_line(error)}"
    value = given[name]
    text = f"{name}={value if isinstance(value, float) else shown(value)}: "
    if not isinstance(value, str) or "${" not in value:
        return f"{text}expected {wanted(name)}.{near(name, value)}"
    if unset := re.search(r"Environment variable '(.+?)' not found", str(error)):
        return f"{text}the environment variable {unset[1]} is not set."
    if absent := re.search(r"Interpolation key '(.+?)' not found", str(error)):
        key = absent[1]
        if key.isupper():
            return f"{text}there is no setting {key}. Did you mean ${{oc.env:{key}}}?"
        return f"{text}there is no setting {key}.{suggestion(key)}"
    if "Recursive interpolation" in str(error):
        return f"{text}refers to itself."
    if "converted" in str(error):  # what it stands for is not shown: it may be a secret
        return f"{text}expected it to stand for {wanted(name)}."
    return f"{text}expected ${{section.key}} or ${{oc.env:NAME}}."


def _first_line(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).strip().splitlines()[0]


# ------------------------------------------------------------------------------------ names


def _named(given: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
    """(name, value) pairs as one nested layer: names known, aliases and shorthands replaced."""
    layer: dict[str, Any] = {}
    for name, value in given:
        setting = ALIASES.get(name, name)
        whole = owner(setting)
        _check_colons(f"{source}{name}", value)
        if whole is None and name in groups():
            if value in (None, {}):
                continue  # a section left empty
            raise ConfigError(
                f"{source}{name}={shown(value)}: a section; set one of {members(name)} in it, like "
                f"{name}.{members(name)[0]}=..."
            )
        if whole is None:
            raise ConfigError(f"{source}unknown setting {name}.{suggestion(name)}")
        if setting == whole:
            value = _shorthand(setting, value)
        if not _fits(value, get_origin(SETTINGS[whole]), setting == whole):
            raise ConfigError(f"{source}{name}={shown(value)}: expected {wanted(whole)}.")
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            _put(layer, f"{setting}.{key}" if key else setting, item, source)
    task = layer.get("task", {})
    chosen = [key for key in ("name", "path") if task.get(key) is not None]
    if len(chosen) == 1:  # the later layer's choice replaces the earlier one's
        task[{"name": "path", "path": "name"}[chosen[0]]] = None
    return layer


def _shorthand(name: str, value: Any) -> Any:
    """`algo.loss=grpo` for {name: grpo}, and one text where a list of texts is wanted."""
    if isinstance(value, str) and name in ("algo.loss", "algo.advantage"):
        return {"name": value}
    if value is False and "off" in get_args(SETTINGS[name]):
        return "off"  # which YAML reads as false
    is_one = isinstance(value, str | int | float) and not _refers(value)
    return [value] if is_one and get_origin(SETTINGS[name]) is list else value


def _fits(value: Any, kind: Any, is_whole: bool) -> bool:
    """A mapping or a list where one is wanted, and only there."""
    if not is_whole:
        return kind is dict
    same = [isinstance(value, shape) == (kind is shape) for shape in (dict, list)]
    return all(same) or _refers(value)


def _refers(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _check_colons(name: str, value: Any) -> None:
    """Refuse {a:1}, which to YAML is a text without a value."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if item is None and ":" in str(key):
            left, _, right = str(key).partition(":")
            raise ConfigError(
                f"{name}={{{key}}}: write a space after the colon, {{{left}: {right.strip()}}}."
            )
        _check_colons(f"{name}.{key}", item)


def _put(tree: dict[str, Any], name: str, value: Any, source: str) -> None:
    *path, last = name.split(".")
    for key in path:
        tree = tree.setdefault(key, {})
    if last in tree and tree[last] != value:
        raise ConfigError(
            f"{source}{name} is given twice, as {shown(tree[last])} and as {shown(value)}."
        )
    tree[last] = value


# ------------------------------------------------------------------------------ what it says


def model_dir(config: Config) -> Path:
    """Where the model lies; a hub id is fetched, "demo" is the directory inside the package.

    Raises:
        DataError: there is no such directory, and no such model on the hub.
    """
    if config.model.path == "demo":
        return PACKAGE / "assets" / "demo"
    from gspo_jax.models.hf.files import resolve  # brings flax, which reading a config does without

    return resolve(config.model.path)


def run_dir(config: Config) -> Path:
    """The folder that the run writes into."""
    return Path(config.run.dir) / (config.run.name or f"gspo-seed{config.run.seed}")


def config_file(path: str) -> str:
    """`path`, or the package's own file of that name where there is none here, as `demo.yaml`."""
    packaged = packaged_config(path)
    is_name = Path(path).name == path and not Path(path).exists()
    return str(packaged) if is_name and packaged.is_file() else path


def packaged_config(name: str) -> Path:
    """A file of configs/, which a wheel carries inside the package and a checkout beside it."""
    inside = PACKAGE / "configs" / name
    return inside if inside.exists() else PACKAGE.parent / "configs" / name


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """Section name -> its settings, as plain dicts and lists."""
    return {name: value for name, value in asdict(config).items() if name != "written"}
