"""Who is one of several processes, and what each of them is to do. (Two at once: tests/faults.)"""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspo_jax import distributed, rollout
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError


@pytest.mark.parametrize(
    "env, is_meant",
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, False),  # an allocation, and no srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a single pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_only_what_a_launcher_started_is_one_of_several(env, is_meant):
    assert distributed.meant(env) is is_meant


def test_an_address_alone_is_answered_in_one_line():
    with pytest.raises(ConfigError, match="needs --processes and --process too"):
        distributed.join("localhost:1")


@pytest.mark.parametrize("count, processes", [(16, 4), (7, 3), (2, 4)])
def test_the_shares_of_all_processes_are_all_rows_once_and_nearly_equal(
    monkeypatch, count, processes
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for i in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        shares.append(range(count)[distributed.own_rows(count)])
    assert [row for share in shares for row in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_each_process_scores_its_own_problems_and_all_know_all_scores(monkeypatch):
    problems = [Problem(str(i), f"p{i}", None, {}) for i in range(3)]
    texts = [f"{p}{g}" for p in range(3) for g in range(2)]
    asked = []

    def scorer(problems, texts, ids):
        asked.append([p.id for p in problems])
        reward = np.float32([len(i) if i else np.nan for i in ids])
        # What is logged is a mean over the responses of the call.
        return {"length": reward}, reward * 2, {"first": float(texts[0][0])}

    ids = [[1], [], [1, 2], [3], [4, 5, 6], [7]]
    alone = rollout.score_together(scorer, problems, texts, ids)
    np.testing.assert_array_equal(alone[1], [2, np.nan, 4, 2, 6, 2])

    # Four processes and three problems: one of them has none.
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    said = []
    monkeypatch.setattr(rollout, "gathered", lambda value: said.append(value) or [value or alone3])
    alone3 = ({"length": [0.0]}, [0.0], {})
    for i in range(4):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rollout.score_together(scorer, problems, texts, ids)
    monkeypatch.setattr(rollout, "gathered", lambda value: said)
    rewards, reward, log = rollout.score_together(scorer, problems, texts, ids)
    np.testing.assert_array_equal(reward, alone[1])
    np.testing.assert_array_equal(rewards["length"], alone[0]["length"])
    assert log == {"first": (0 + 1 + 2) / 3}
    assert asked == [["0", "1", "2"], ["0"], ["1"], ["2"], ["2"]]


def test_a_host_array_goes_to_the_mesh_and_comes_back_whole():
    mesh = jax.make_mesh((4,), ("data",))
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = distributed.place(x, NamedSharding(mesh, P("data")))
    assert placed.addressable_shards[1].data.shape == (2, 3)
    np.testing.assert_array_equal(distributed.host({"x": placed})["x"], x)
    assert distributed.gathered({"a": None}) == [{"a": None}] and distributed.agreed(3) == 3
