"""What a run leaves for others: its weights as a Hugging Face directory with a model card.

The card says what metrics.jsonl says, so reading that file belongs here too.
"""

from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import PyTree

from gspo_jax.config.load import Config
from gspo_jax.models.hf.weights import save_model
from gspo_jax.policy import Policy
from gspo_jax.prompt.tokenizer import token_ids
from gspo_jax.run.model_card import model_card, stated
from gspo_jax.view.run_files import logged


def export_params(
    policy: Policy,
    params: PyTree,
    out_dir: Path,
    *,
    card: str | None = None,
    replace: bool = False,
) -> Path:
    """`params` as a Hugging Face directory, with the tokenizer and template of the source.

    Only a run's own export/ is ever replaced, at once; any other directory in the way is refused.
    """
    model = nnx.merge(policy.graphdef, params)
    ids = token_ids(policy.tokenizer)
    save_model(model, out_dir, like=policy.directory, card=card, token_ids=ids, replace=replace)
    return out_dir


def run_card(config: Config, policy: Policy, directory: Path, step: int) -> str:
    """The model card of a run after `step`, with what its metrics.jsonl says."""
    trained = [row for row in logged(directory) if row["step"] > 0]
    return model_card(
        config,
        steps=step,
        # Reinforcement learning logs its rewards; supervised training has none.
        supervised=bool(trained) and not any("reward" in row for row in trained),
        before=logged_eval(directory, 0),
        after=logged_eval(directory, step),
        source=stated(policy.directory),
    )


def logged_step(directory: Path, step: int) -> dict[str, Any]:
    """The line of `step` in metrics.jsonl; empty where there is none."""
    return next((row for row in logged(directory) if row["step"] == step), {})


def logged_eval(directory: Path, step: int) -> dict[str, float]:
    """What was measured at `step`; empty where nothing was."""
    row = logged_step(directory, step)
    return {name: value for name, value in row.items() if name.startswith("eval/")}
