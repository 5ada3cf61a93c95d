"""What a run is told: every setting, where it comes from, and what it may be.

In reading order:

    settings  one frozen dataclass per YAML section, a sentence under every field
    names     every setting by its dotted name; what a wrong one meant
    checks    what must hold within and between settings
    load      defaults, a YAML file and overrides in one checked `Config`
    recorded  what a run's config.yaml says, and what has changed since one was written

`Config` and `load_config` are imported when they are first used: `gspo-jax --help` needs neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_jax.config.load import Config, load_config

__all__ = ["Config", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gspo_jax.config' has no attribute {name!r}")
    from gspo_jax.config import load

    return getattr(load, name)
