"""Lets benchmarks run where packages are missing that the library imports and they never call.

A machine with a GPU may have jax and flax but no network to install the rest from. Imported (by
`calibrate`) before anything of `gspo_jax`; where the packages are there, it does nothing.

    jaxtyping              annotations alone: any name may be subscripted, and means nothing
    tokenizers, jinja2     a tokenizer is only built for a model directory (`step.py --model-dir`)
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Annotation:
    def __class_getitem__(cls, _: Any) -> Any:
        return Any


def stand_in(name: str, *needed: str) -> None:
    """Put an empty module in the place of `name` if one of the packages `needed` is missing."""
    try:
        for package in needed:
            importlib.import_module(package)
    except ModuleNotFoundError:
        module = ModuleType(name)
        vars(module)["__getattr__"] = lambda attribute: _Annotation
        sys.modules[name] = module


stand_in("jaxtyping", "jaxtyping")
stand_in("gspo_jax.prompt.tokenizer", "tokenizers", "jinja2")
