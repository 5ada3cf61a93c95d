"""Mistakes of other libraries that are not in a loss, each as a test that says which.

Those inside a loss are in test_losses_traps.py. Three more cost whole runs or torch and stand with
their kind; the first test here keeps their names from being lost.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gspo_jax.batch import Completions, Problem, Rollout
from gspo_jax.config.load import load_config, warnings
from gspo_jax.errors import ConfigError
from gspo_jax.rollout.engine import generate
from gspo_jax.rollout.reporting import rollout_metrics
from gspo_jax.rollout.train_rows import to_train_batch
from gspo_jax.train import train

HERE = Path(__file__).parent

ELSEWHERE = {
    "random numbers and data position not restored": (
        "test_end_to_end.py",
        "test_a_resumed_run_is_bitwise_the_run_that_never_stopped",
    ),
    "loss differs between 1, 2, 4 and 8 devices": (
        "mesh/test_sharding.py",
        "test_any_mesh_samples_the_same_tokens_and_computes_the_same_losses",
    ),
    "reference model run although its coefficient is 0": (
        "update/test_critic.py",
        "test_a_reference_is_asked_only_where_the_kl_coefficient_is_not_zero",
    ),
}


@pytest.mark.parametrize("trap", ELSEWHERE)
def test_trap_guarded_elsewhere(trap):
    file, name = ELSEWHERE[trap]
    assert f"def {name}(" in (HERE / file).read_text()


def one_row(tokens, mask, prompt=(5, 6)):
    """A rollout of a single response."""
    tokens, mask = np.array([tokens], np.int32), np.array([mask], bool)
    completions = Completions(tokens, mask, np.zeros(tokens.shape, np.float32), np.zeros(1, bool))
    reward = np.ones(1, np.float32)
    return Rollout([Problem("p", "?")], [list(prompt)], completions, ["ééé"], {}, reward)


def test_trap_eos_masked_because_padding_has_the_same_id():
    batch = to_train_batch(one_row([7, 2, 2], [True, True, False]), np.ones(1), pad_id=2)
    assert batch.mask.tolist() == [[True, True, False]]


def test_trap_length_counted_in_characters():
    """Three characters, six bytes, two tokens."""
    assert rollout_metrics(one_row([7, 2, 0], [1, 1, 0]))["completions/mean_length"] == 2


def test_trap_only_the_first_of_several_eos_ids_ends_a_response(tiny):
    free = generate(
        tiny, [[5]], group_size=16, max_new_tokens=8, eos_ids=[999], key=jax.random.key(0)
    )
    second = int(free.tokens[3, 2])
    got = generate(
        tiny, [[5]], group_size=16, max_new_tokens=8, eos_ids=[998, second], key=jax.random.key(0)
    )
    ends = free.tokens[3].tolist().index(second)
    assert got.mask[3].sum() == ends + 1


@pytest.mark.parametrize("setting", ["rollout.top_p=0.9", "rollout.top_k=20"])
def test_trap_truncated_sampling_with_log_probabilities_of_the_full_vocabulary(setting):
    assert any(setting.split("=")[0] in text for text in warnings(load_config(None, [setting])))


def test_trap_group_split_between_minibatches():
    """Blocks of rows are whole groups, because prompts must divide into the minibatches."""
    with pytest.raises(ConfigError, match=r"rollout\.prompts=6.*minibatches"):
        load_config(None, ["rollout.prompts=6", "algo.minibatches=4"])


@pytest.fixture(scope="module")
def two_still_steps(tiny_dir, tmp_path_factory):
    """The same two prompts twice, at temperature 0.7, by a policy that does not move."""
    root = tmp_path_factory.mktemp("traps")
    data = root / "data.jsonl"
    rows = [{"prompt": f"Say {w}", "answer": w, "split": "train"} for w in "ab"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        load_config(
            None,
            [
                f"model.path={tiny_dir}",
                f"task.path={data}",
                "task.rewards=[reward_functions:short_words]",
                "rollout.prompts=2",
                "rollout.group_size=4",
                "rollout.temperature=0.7",
                "rollout.max_completion_length=8",
                "algo.minibatches=1",
                "optim.learning_rate=1e-12",
                "mesh.data=1",
                f"run.dir={root}",
                "run.steps=2",
                "run.log_completions=1",
            ],
        )
    )
    return [
        [json.loads(line) for line in (result.run_dir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    ]


@pytest.mark.long
def test_trap_temperature_of_the_sampler_missing_in_the_training_program(two_still_steps):
    """It would make log-probabilities differ by far more than rounding."""
    metrics, _ = two_still_steps
    assert max(row["sampling/sampling_logp_difference/max"] for row in metrics) < 1e-4


@pytest.mark.long
def test_trap_same_random_numbers_in_every_step(two_still_steps):
    _, samples = two_still_steps
    first, second = (
        sorted(s["completion"] for s in samples if s["step"] == step) for step in (1, 2)
    )
    assert first != second
