"""Which checkpoint a run continues from, and a step in the middle of its updates."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.batch import Completions, TrainBatch
from gspo_jax.config.load import load_config
from gspo_jax.errors import StorageError
from gspo_jax.numbers.tally import Average, Least
from gspo_jax.policy import Problems
from gspo_jax.run import checkpoint, resume
from gspo_jax.run.resume import Begun, find, pack, unpack
from gspo_jax.tasks import load_task
from gspo_jax.update.objective import Targets
from gspo_jax.update.programs import LogProbs
from gspo_jax.update.steps import Progress

B, S, T, M, X = 4, 7, 5, 2, 3


def begun(rich):
    rng = np.random.default_rng(0)
    routing = rng.integers(0, 6, (B, S, M, X)).astype(np.int32) if rich else None
    table = rng.normal(size=(B, T)).astype(np.float32)
    batch = TrainBatch(
        rng.integers(0, 9, (B, S)).astype(np.int32),
        np.array([1, 2, 1, 2], np.int32),
        np.full(B, T, np.int32),
        rng.random((B, T)) < 0.5,
        table if rich else table[:, 0],
        routing,
    )
    known = LogProbs(jnp.asarray(table[2:]), None if routing is None else jnp.asarray(routing[2:]))
    one, many = jnp.float32(1), jnp.float32(300)
    stats = {"loss": Average(jnp.float32(0.1), one), "ratio_min": Least(jnp.float32(jnp.nan), many)}
    stats = (stats,)
    progress = Progress(
        batch,
        jnp.asarray(table) if rich else None,
        Targets(table, table + 1) if rich else None,
        (None, known),
        stats if rich else (),
    )
    completions = Completions(batch.tokens[:, :T], batch.mask, table, rng.random(B) < 0.5)
    samples = [{"prompt": "Say \u20ac", "reward": 0.5}]
    lengths = np.array([3, 4, 3, 4]), np.array([5, 5, 1, 6])
    return Begun(progress, completions, {"reward": 0.1 + 0.2, "digest": "ab"}, samples, lengths)


@pytest.mark.parametrize("rich", [True, False])
def test_a_step_half_done_comes_back_bit_for_bit(tmp_path, rich):
    step = begun(rich)
    checkpoint.save(tmp_path, 3, {"w": jnp.zeros(3)}, {}, pending=pack(step))
    kept = checkpoint.read_pending(tmp_path / ("3+1" if rich else "3+0"))
    back = unpack(kept)
    assert jax.tree.structure(back.progress._replace(stats=())) == jax.tree.structure(
        step.progress._replace(stats=())
    )
    for part in ("progress", "completions"):
        first, second = (getattr(x, part) for x in (back, step))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (back.metrics, back.samples, back.tokens) == (step.metrics, step.samples, 31)
    if rich:  # a float32 survives JSON
        assert np.float32(back.progress.stats[0]["loss"].value) == np.float32(0.1)
        assert type(back.progress.stats[0]["ratio_min"]) is Least


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, {"w": jnp.zeros(3)}, {})
    return tmp_path / "run" / "checkpoints"


def test_auto_takes_the_newest_and_a_path_what_it_names(root, tmp_path):
    assert find("auto", root, print) == (root / "2", True, ())
    assert find(str(root / "1"), root, print) == (root / "1", True, ("2",))
    elsewhere = tmp_path / "new" / "checkpoints"
    assert find(str(root / "1"), elsewhere, print) == (root / "1", False, ())
    assert find("never", elsewhere, print) is None
    with pytest.raises(StorageError, match=r"holds the checkpoints 1, 2 and run\.resume=never"):
        find("never", root, print)


def test_a_run_with_checkpoints_of_its_own_does_not_start_over_from_another(root, tmp_path):
    said = []
    other = tmp_path / "other" / "checkpoints"
    checkpoint.save(other, 9, {"w": jnp.zeros(3)}, {})
    assert find(str(other / "9"), root, said.append) == (root / "2", True, ())
    assert said == [
        f"The run has checkpoints of its own and continues from them, not from {other / '9'}."
    ]


def test_a_path_that_is_damaged_is_not_replaced_by_another(root):
    (root / "2" / "meta.json").write_text("{}")
    with pytest.raises(StorageError, match=r"meta\.json has 2 bytes and had"):
        find(str(root / "2"), root, print)


@pytest.mark.parametrize(
    "setting, moves",
    [
        ("optim.schedule=constant", False),
        ("optim.schedule=linear", True),  # it ends with the run
        ("task.curriculum={easy: 0, hard: 0.5}", True),  # hard ones join after half of the run
    ],
)
def test_a_change_of_the_runs_length_is_told_as_what_it_moves(setting, moves):
    task = load_task("arithmetic", sizes={"train": 1, "val": 0, "test": 0})
    problems = Problems(task, {"train": [0]}, 0, lambda *_, **__: None, 1, 1)
    before = load_config(None, [setting, "run.steps=10"])
    now = load_config(None, [setting, "run.steps=20"])
    said = []
    found = resume.Found(Path("run/checkpoints/10"), own=True)
    resume.tell_changes(resume.identity(before, problems), now, problems, found, said.append)
    consequence = "  (changes what is learned from here)" if moves else ""
    assert said[1:] == [f"  run.steps: 10 -> 20{consequence}"]
