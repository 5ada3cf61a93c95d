"""Are two pieces of LaTeX equal? As math-verify says, in a process that can be killed.

math-verify is imported with this module, before the first answer's time begins to run; nothing
imports this module but such processes. In a run: `task.options.checker=math-verify`, or among
other rewards `task.rewards=[gspo_jax.tasks.latex:math_verify, ...]`.
"""

import logging
from typing import Any

from gspo_jax.answers.notation import braced, peeled
from gspo_jax.answers.verify import counts_reasoning
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.math_verify import MISSING, decided

try:
    import math_verify as library  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ConfigError(MISSING) from None

for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # they log whole answers

# The box alone, and broken LaTeX is not mended.
_NORMAL = library.LatexNormalizationConfig(basic_latex=True, units=True, boxed="all")
READ = [library.LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMAL)]


@counts_reasoning
def math_verify(prompt: Any, completion: Any, answer: str | None) -> float | None:
    """1.0 where the boxed answer equals `answer` exactly or by math-verify, else 0.0.

    Runs as long as sympy does. None without a gold answer.
    """
    if answer is None:
        return None
    verdict, is_final = decided(prompt, completion, answer)
    return verdict.score if is_final else float(equal(str(verdict.answer), str(answer)))


def equal(answer: str, gold: str) -> bool:
    """Does math-verify hold two pieces of LaTeX equal? Unbounded in time and memory."""
    gold_found, found = (
        library.parse(
            rf"\boxed{{{braced(peeled(text))}}}",
            extraction_config=READ,
            fallback_mode="no_fallback",
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # None is documented
        )
        for text in (gold, answer)
    )
    return bool(library.verify(gold_found, found, strict=True, timeout_seconds=None))
