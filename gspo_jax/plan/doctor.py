"""What this installation is, and what is wrong with it, on one screen; each trouble with a remedy.

    gspo-jax doctor

Nothing is downloaded or changed, and no secret is shown: of a token only whether there is one.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gspo_jax.errors import FINISHED, NO_DEVICES, ConfigError, StorageError
from gspo_jax.files.compile_cache import PLACE, default_place
from gspo_jax.files.whole import check_parents
from gspo_jax.text.inert import inert, redact

CORE = (
    "gspo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)
EXTRAS = {  # package -> what it is for
    "wandb": "run.report_to=[wandb]",
    "tensorboard": "run.report_to=[tensorboard]",
    "math-verify": "symbolic answers",
    "reasoning-gym": "its tasks",
    "lm-eval": "its benchmarks",
    "torch": "comparison with transformers",
}
VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
LITTLE_DISK = 5e9  # bytes: a checkpoint of a small model
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its switches


class Finding(NamedTuple):
    """One line of the screen; with a remedy it is a trouble."""

    topic: str
    text: str
    remedy: str = ""


def doctor(console: Console | None = None) -> int:
    """Look at everything and show it; the exit code is 2 if something is wrong, else 0."""
    found = examine()
    console = console or Console()
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in found:
        text = Text(inert(redact(finding.text)), style="red" if finding.remedy else "")
        if finding.remedy:
            text.append(f"\n→ {inert(redact(finding.remedy))}", style="yellow")
        table.add_row(finding.topic, text)
    console.print(table)
    troubles = sum(bool(finding.remedy) for finding in found)
    console.print(Text(f"\n{troubles} to mend." if troubles else "\nNothing is wrong."))
    return ConfigError.exit_code if troubles else FINISHED


def examine(env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Everything there is to say, in the order of the screen."""
    versions = installed()
    return [
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("packages", ", ".join(f"{n} {versions[n]}" for n in CORE if n in versions)),
        *unmet(versions),
        *known_bad(versions),
        *devices(env, versions),
        *_careful("attention", attention),
        *_careful("memory", memory),
        disk(Path.cwd()),
        compile_cache(env),
        *hub(env),
        extras(versions),
        *variables(env),
    ]


def installed() -> dict[str, str]:
    """Of the packages that matter here, and of all that jax's accelerators come as."""
    found = {}
    for name in (*CORE, *EXTRAS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    names = (dist.metadata["Name"] for dist in distributions())
    plugins = {n for n in names if n and n.startswith(("jax-cuda", "jax-rocm", "libtpu"))}
    return found | {name: version(name) for name in sorted(plugins)}


def unmet(versions: Mapping[str, str]) -> list[Finding]:
    """What the core packages ask of each other, and is not so."""
    found = []
    for owner in CORE:
        if owner not in versions:
            found.append(Finding("packages", f"{owner} is missing.", f"pip install {owner}"))
            continue
        for text in requires(owner) or []:
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            got = versions.get(need.name)
            if got is not None and not need.specifier.contains(got, prereleases=True):
                told = f"{owner} {versions[owner]} wants {need.name}{need.specifier}, not {got}."
                found.append(
                    Finding("packages", told, f"pip install '{need.name}{need.specifier}'")
                )
    return found


def known_bad(versions: Mapping[str, str]) -> list[Finding]:
    """Combinations that install together, and do not work."""
    found = []

    def at(name: str) -> Version:
        return Version(versions.get(name, "0"))

    if at("jax") >= Version("0.11.1") and Version("0") < at("flax") <= Version("0.12.8"):
        told = f"jax {at('jax')} does not work with flax {at('flax')}."
        remedy = "pip install 'flax>=0.12.9' (Python 3.12 or later), or 'jax<0.11.1'"
        found.append(Finding("packages", told, remedy))
    for name, got in versions.items():
        is_plugin = name.startswith(("jax-cuda", "jax-rocm"))
        if is_plugin and Version(got).release[:3] != at("jaxlib").release[:3]:
            kind = name.split("-")[1]
            told = f"{name} {got} is not for jaxlib {at('jaxlib')}: the accelerator is not used."
            found.append(Finding("packages", told, f"pip install 'jax[{kind}]=={at('jax')}'"))
    return found


def devices(env: Mapping[str, str], versions: Mapping[str, str]) -> list[Finding]:
    """What JAX would run on, and an accelerator that it does not see."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # a broken installation raises anything: that is the finding
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return [Finding("devices", f"JAX finds none ({line})", NO_DEVICES)]
    kinds = sorted({device.device_kind for device in found})
    text = f"{len(found)} x {', '.join(kinds)} ({found[0].platform}), {os.cpu_count()} CPU cores"
    lost = found[0].platform == "cpu" and has_nvidia() and not env.get("JAX_PLATFORMS")
    if not lost:
        return [Finding("devices", text)]
    has_plugin = any(name.startswith("jax-cuda") for name in versions)
    remedy = (
        "see what JAX says with TF_CPP_MIN_LOG_LEVEL=0; the driver may be too old"
        if has_plugin
        else "pip install -e '.[cuda12]' (or cuda13)"
    )
    return [Finding("devices", f"{text}; the NVIDIA GPU here is not used.", remedy)]


def has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def attention() -> Finding:
    """Which one a model of today's usual shape would train with."""
    from gspo_jax.models.attention import choose

    choice = choose("bfloat16", 16, 8, 128)
    text = {"xla": "our own, through XLA", "cudnn": "cuDNN's, checked against our own"}[choice.name]
    remedy = "install nvidia-cudnn as jax wants it: pip install -U 'jax[cuda12]'"
    return Finding("attention", choice.trouble or text, remedy if choice.trouble else "")


def memory() -> Finding:
    """What a run may use of each device."""
    from gspo_jax.plan.capacity import capacity

    return Finding("memory", f"{capacity() / 1e9:.1f} GB for each device")


def disk(place: Path) -> Finding:
    """What is left where runs/ would lie."""
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free in {place}"
    return Finding("disk", text, "set run.dir to another disk" if free < LITTLE_DISK else "")


def compile_cache(env: Mapping[str, str]) -> Finding:
    """Where compiled programs are kept from one start to the next."""
    if not (place := env.get(PLACE, default_place(env) or "")):
        text = f"none: every start compiles again (export {PLACE}=DIR keeps it)"
        return Finding("compile cache", text)
    place = str(place)
    try:
        if "://" not in place:
            check_parents(Path(place))
    except StorageError:
        text = f"{place} cannot be written."
        return Finding("compile cache", text, f"set {PLACE} to another place")
    kept = sum(file.stat().st_size for file in Path(place).glob("*"))
    return Finding("compile cache", f"{place}, {kept / 1e9:.1f} GB (set {PLACE} to move it)")


def hub(env: Mapping[str, str]) -> list[Finding]:
    """Where models and data sets come from."""
    caches = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache")
    home = Path(env.get("HF_HOME") or caches / "huggingface")
    token_file = Path(env.get("HF_TOKEN_PATH") or home / "token")
    has_token = bool(env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN"))
    has_token = has_token or (os.access(token_file, os.R_OK) and token_file.stat().st_size > 0)
    offline = env.get("HF_HUB_OFFLINE", "").upper() in TRUE
    text = f"cache {home}, token {'present' if has_token else 'none (public models need none)'}"
    text += ", offline: only what is cached (HF_HUB_OFFLINE)" if offline else ""
    text += f", from {env['HF_ENDPOINT']}" if env.get("HF_ENDPOINT") else ""
    found = [Finding("hub", text)]
    there = next(p for p in (home, *home.absolute().parents) if p.exists())
    if not offline and not os.access(there, os.W_OK):
        found.append(
            Finding("hub", f"{home} cannot be written.", "set HF_HOME to a directory of yours")
        )
    return found


def extras(versions: Mapping[str, str]) -> Finding:
    """Optional packages, there or not."""
    told = [
        f"{name} {versions[name]}" if name in versions else f"no {name} ({purpose})"
        for name, purpose in EXTRAS.items()
    ]
    return Finding("optional", ", ".join(told))


def variables(env: Mapping[str, str]) -> list[Finding]:
    """Those that change how JAX runs."""
    told = [f"{name}={env[name]}" for name in VARIABLES if env.get(name)]
    found = [Finding("variables", " ".join(told))] if told else []
    if sys.flags.optimize:
        told = "Python drops assertions (-O or PYTHONOPTIMIZE)."
        found.append(Finding("variables", told, "start it without"))
    return found


def _careful(topic: str, look: Callable[[], Finding]) -> list[Finding]:
    """What cannot even be looked at: the devices' own finding says why."""
    try:
        return [look()]
    except Exception as error:
        return [Finding(topic, f"unknown ({type(error).__name__})")]
