"""One recorded step once more: the same tokens and the same metrics, or what differs.

The step starts from the run's checkpoint before it, or from the initial weights, and nothing in
the run directory is touched.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gspo_jax.config.load import Config, load_config
from gspo_jax.config.recorded import changes
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.evaluation.evaluate import evaluate_policy
from gspo_jax.files.jsonl import plain, read_object
from gspo_jax.files.provenance import environment
from gspo_jax.policy import with_devices_here
from gspo_jax.run import checkpoint
from gspo_jax.run.export import logged_step
from gspo_jax.run.lifecycle import counted
from gspo_jax.run.resume import Say, identity, newest_whole
from gspo_jax.train import Loop, assemble, begin, step_metrics, update

TIMED = ("step_time", "compile_time", "compiles", "tokens_per_second", "time/", "speed/")
NEITHER = ("run.name", "run.dir", "run.resume", "run.steps")  # of no consequence for one step


class Replayed(NamedTuple):
    """A recorded step beside the same step computed again.

    Attributes:
        step, since: the step, and the one after whose checkpoint the computation began.
        same: metrics that are equal, the digest of the sampled tokens among them.
        differs: metric -> (recorded, recomputed) where they are not; None for absent.
    """

    step: int
    since: int
    same: list[str]
    differs: dict[str, tuple[Any, Any]]

    @property
    def exit_code(self) -> int:
        """0 where everything is equal, else 4."""
        return 4 if self.differs else 0


def replay(run_dir: Path, step: int, say: Say = print) -> Replayed:
    """Compute step `step` of a run again, and compare every metric that is not a time.

    Args:
        say: takes warnings and what is being done, one line each.

    Raises:
        StorageError: no run there, or the step is not recorded.
        ConfigError: the run is one of supervised training.
        DataError: the data is not that of the run.
    """
    recorded = _recorded(run_dir, step)
    config = with_devices_here(load_config(run_dir / "config.yaml"))
    _say_environment(run_dir, say)
    loop, state = assemble(config)
    with jax.set_mesh(loop.policy.mesh):
        found, tokens, metrics = _start(config, run_dir, step, say), 0, {}
        if found is not None:
            _compare(checkpoint.read_meta(found), config, loop, say)
            state, meta = checkpoint.restore(found.parent, found.name, state, verified=True)
            tokens = meta["num_tokens"]
        since = int(state.step)
        say(f"Computing step {step} from {found or 'the initial weights'}.")
        for number in range(since + 1, step + 1):
            state, begun = update(loop, state, begin(loop, state, number))
            tokens += begun.tokens
            metrics = counted(step_metrics(config, begun), state, tokens)
        if any(name.startswith("eval/") for name in recorded):
            metrics |= evaluate_policy(config, loop.policy, loop.problems, state.params)
    return compared(step, since, recorded, plain(metrics))


def compared(
    step: int, since: int, recorded: Mapping[str, Any], computed: Mapping[str, Any]
) -> Replayed:
    """Two lines of metrics, times left out; numbers must be equal to the last bit."""
    names = [n for n in {**recorded, **computed} if n != "step" and not n.startswith(TIMED)]
    same = [n for n in names if n in recorded and n in computed and recorded[n] == computed[n]]
    differs = {n: (recorded.get(n), computed.get(n)) for n in names if n not in same}
    return Replayed(step, since, same, differs)


def _recorded(run_dir: Path, step: int) -> dict[str, Any]:
    if not (run_dir / "config.yaml").is_file():
        raise StorageError(f"{run_dir}: no run; give the directory of one, like runs/demo-seed0.")
    row = logged_step(run_dir, step)
    if step < 1 or not row:
        raise StorageError(f"{run_dir}: metrics.jsonl has no step {step}; --step takes 1 or more.")
    if "reward" not in row:
        raise ConfigError(f"{run_dir}: a run of gspo-jax sft, and replay repeats those of train.")
    return row


def _start(config: Config, run_dir: Path, step: int, say: Say) -> Path | None:
    """The newest whole checkpoint before `step`; None where the run began with the weights."""
    root, origin = run_dir / "checkpoints", Path(config.run.resume)
    before = [str(s) for s in checkpoint.steps(root) if s < step]
    if before:
        try:
            return root / newest_whole(root, before, say)
        except StorageError as error:
            say(f"warning: {error}")
    if config.run.resume in ("auto", "never"):
        return None
    if not origin.is_dir() or not origin.name.isdigit() or int(origin.name) >= step:
        raise StorageError(f"{origin}: where the run began is not there, or not before {step}.")
    return origin.parent / newest_whole(origin.parent, [origin.name], say)


def _compare(meta: dict[str, Any], config: Config, loop: Loop, say: Say) -> None:
    if meta["data"] != identity(config, loop.problems)["data"]:
        raise DataError(f"{config.task.path or config.task.name}: not the data of the run.")
    for name, (then, now) in changes(meta["config"], config).items():
        if name not in NEITHER:
            say(f"note: {name} was {then} at the checkpoint and is {now} in config.yaml.")


def _say_environment(run_dir: Path, say: Say) -> None:
    """What makes equal bits unlikely: other devices, other versions."""
    if not (then := read_object(run_dir / "env.json")):
        return
    now = environment([str(device) for device in jax.devices()[: len(then.get("devices", []))]])
    for name in _different(then, now, ("devices", "versions", "variables")):
        say(f"note: {name} not as in the run's env.json; last bits may differ.")


def _different(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if then.get(name) != now.get(name)]
