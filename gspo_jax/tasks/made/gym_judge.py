"""reasoning-gym's own checkers, for questions with several right answers.

Only processes that can be killed import this module, and reasoning-gym with it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import reasoning_gym  # pyright: ignore[reportMissingImports]


def full_marks(completion: str, answer: str, dataset: str, metadata: dict[str, Any]) -> float:
    """1.0 where the checker of the dataset gives full marks, else 0.0."""
    entry = {"question": "", "answer": answer, "metadata": metadata}
    return float(_checker(dataset)(completion, entry) >= 1)


@cache
def _checker(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.create_dataset(dataset, seed=0, size=1).score_answer
