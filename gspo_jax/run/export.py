"""What a run leaves for others: its weights as a Hugging Face directory with a model card.

The card says what metrics.jsonl says, so reading that file belongs here too.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from gspo_jax.config.load import Config, load_config, model_dir
from gspo_jax.errors import DataError, StorageError
from gspo_jax.mesh.distributed import is_writer
from gspo_jax.models.hf.weights import save_model, save_without_weights
from gspo_jax.policy import Policy, load_policy, with_devices_here
from gspo_jax.prompt.tokenizer import token_ids
from gspo_jax.run import checkpoint, resume
from gspo_jax.run.model_card import model_card, stated
from gspo_jax.start import add_critic, make_state
from gspo_jax.view.run_files import logged

KEPT_MODEL = "model"  # of a run: what its model's directory holds besides weights


def export(run_dir: Path, out_dir: Path, *, like: str | None = None) -> Path:
    """The newest checkpoint of a run that is whole, as a Hugging Face directory.

    Args:
        like: a directory of the same model, where that of the run is no longer at its place. The
            run's own model/ has all but the weights, and those come from the checkpoint.

    Raises:
        StorageError: no run, or no whole checkpoint in it.
        DataError: `out_dir` is there already.
    """
    run_dir = Path(run_dir)
    root = run_dir / "checkpoints"
    found = checkpoint.steps(root)
    if not found or not (run_dir / "config.yaml").is_file():
        raise StorageError(f"{run_dir}: no checkpoint to export; give the directory of a run.")
    config = with_devices_here(load_config(run_dir / "config.yaml"))
    step = int(resume.newest_whole(root, map(str, found), partial(print, file=sys.stderr)))
    policy = load_policy(_with_model_here(config, run_dir, like))
    with jax.set_mesh(policy.mesh):
        _, _, state = make_state(config, policy, updates=1)
        state, _ = add_critic(config, policy, state, updates=1)
        state, _ = checkpoint.restore(root, step, state, verified=True)
    own = Path(out_dir).resolve() == (run_dir / "export").resolve()
    card = run_card(config, policy, run_dir, step)
    return export_params(policy, state.params, Path(out_dir), card=card, replace=own)


def _with_model_here(config: Config, run_dir: Path, like: str | None) -> Config:
    """`config` with a model that can be read: of `like`, else its own, else what the run kept."""
    if like is not None:
        return replace(config, model=replace(config.model, path=like))
    try:
        model_dir(config)
    except DataError:
        if not (own := run_dir / KEPT_MODEL).is_dir():
            raise
        config = replace(config, model=replace(config.model, path=str(own), init="random"))
    return config


def keep_model(policy: Policy, params: PyTree, run_dir: Path) -> None:
    """Keep config.json, tokenizer and template in the run, once; the model may move away."""
    if is_writer() and not (kept := run_dir / KEPT_MODEL).exists():
        shape, ids = nnx.merge(policy.graphdef, params).config, token_ids(policy.tokenizer)
        save_without_weights(shape, kept, like=policy.directory, token_ids=ids)


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
