"""Who is one of several processes, and what each of them is to do. (Two at once: tests/faults.)"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.mesh import distributed, sharding
from gspo_jax.numbers.tally import Average, Count
from gspo_jax.rollout import stages as rollout


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
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_only_what_a_launcher_started_is_one_of_several(env, is_meant):
    assert bool(distributed.meant(env)) is is_meant


@pytest.mark.parametrize(
    ("hosts", "by"),
    [
        # What Kubernetes writes for a pod with a subdomain, and for one without.
        ("10.1.2.3\tgspo-0.gspo.default.svc.cluster.local\tgspo-0\n", "JOB_COMPLETION_INDEX"),
        ("127.0.0.1\tlocalhost\n10.1.2.3\ttrials-0-x7k2p\n", ""),
    ],
)
def test_a_pod_that_no_other_can_find_is_alone(tmp_path, hosts, by):
    (tmp_path / "hosts").write_text(f"# Kubernetes-managed hosts file (x.svc.y).\n{hosts}")
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert distributed.meant(env, hosts=tmp_path / "hosts") == by


def test_what_is_typed_into_the_shell_of_srun_is_alone_and_what_that_shell_starts_is_not():
    shell = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "40123", "SLURM_PTY_WIN_COL": "80"}
    assert distributed.meant(shell, typed=True) == ""
    # srun in that shell hands its variables on, and its tasks have no terminal.
    assert distributed.meant(shell, typed=False) == "SLURM_STEP_NUM_TASKS"
    assert distributed.meant({"SLURM_STEP_NUM_TASKS": "4"}, typed=True) == "SLURM_STEP_NUM_TASKS"


ALONE = """
import os, sys
from gspo_jax.cli import commands as cli
from gspo_jax.mesh import distributed
distributed.WAIT = 2.0
sys.exit(cli.main(["train", f"run.dir={sys.argv[1]}", *sys.argv[2:]]))
"""


def test_others_that_never_come_are_told_at_once_and_end_the_process_by_its_exit_code(tmp_path):
    """JAX would abort the process, after five silent minutes."""
    options = ["--coordinator", "localhost:12977", "--processes", "4", "--process", "0"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    first, last = [line for line in done.stderr.splitlines() if line.startswith("gspo-jax: ")]
    told = "4 processes at localhost:12977, because of --coordinator; alone? Then leave --coord"
    assert first.startswith(f"gspo-jax: waiting for {told}")
    assert last.startswith(f"gspo-jax: after 2 seconds not all are here: {told}")
    assert not list(tmp_path.iterdir())


def test_who_is_waited_for_names_the_variable_to_take_away():
    env = {"SLURM_STEP_NUM_TASKS": "8", "JAX_COORDINATOR_ADDRESS": "node1:1234"}
    told = distributed.waited_for("SLURM_STEP_NUM_TASKS", None, None, env)
    assert told.startswith("8 processes at node1:1234, because of SLURM_STEP_NUM_TASKS; alone?")
    assert told.endswith("env -u SLURM_STEP_NUM_TASKS")
    env = {"JOB_COMPLETION_INDEX": "3"}  # which counts nothing
    assert distributed.waited_for("JOB_COMPLETION_INDEX", None, None, env).startswith("processes,")


def test_a_platform_without_devices_is_told_with_what_helps(monkeypatch):
    def fails():
        raise AssertionError  # as JAX does for JAX_PLATFORMS=cuda without a GPU

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for found in (distributed.join, sharding.make_mesh):
        with pytest.raises(
            ConfigError, match=r"JAX_PLATFORMS=cuda \(AssertionError\); unset JAX_P"
        ):
            found()


def test_64_bit_types_are_refused_by_name():
    jax.config.update("jax_enable_x64", True)
    try:
        for found in (distributed.join, sharding.make_mesh):
            with pytest.raises(ConfigError, match=r"JAX_ENABLE_X64 is on, .*unset it"):
                found()
    finally:
        jax.config.update("jax_enable_x64", False)


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
        wrong = {"wrong": Count(1)} if texts[0][0] == "1" else {}  # in one process alone
        log = {"first": Average(float(texts[0][0]), len(texts)), **wrong}
        return {"length": reward}, reward * 2, log

    ids = [[1], [], [1, 2], [3], [4, 5, 6], [7]]
    alone = rollout.score_together(scorer, problems, texts, ids)
    np.testing.assert_array_equal(alone[1], [2, np.nan, 4, 2, 6, 2])

    def told(value):
        return json.loads(json.dumps(value))

    # Four processes and three problems: one of them has none.
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    said = []
    monkeypatch.setattr(
        rollout, "gathered", lambda value: said.append(told(value)) or [value or alone3]
    )
    alone3 = ({"length": [0.0]}, [0.0], {})
    for i in range(4):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rollout.score_together(scorer, problems, texts, ids)
    monkeypatch.setattr(rollout, "gathered", lambda value: said)
    rewards, reward, log = rollout.score_together(scorer, problems, texts, ids)
    np.testing.assert_array_equal(reward, alone[1])
    np.testing.assert_array_equal(rewards["length"], alone[0]["length"])
    assert log == {"first": Average((0 + 1 + 2) / 3, 6), "wrong": Count(1)}
    assert asked == [["0", "1", "2"], ["0"], ["1"], ["2"], ["2"]]


def test_a_host_array_goes_to_the_mesh_and_comes_back_whole():
    mesh = jax.make_mesh((4,), ("data",))
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = distributed.place(x, NamedSharding(mesh, P("data")))
    assert placed.addressable_shards[1].data.shape == (2, 3)
    np.testing.assert_array_equal(distributed.host({"x": placed})["x"], x)
    assert distributed.gathered({"a": None}) == [{"a": None}] and distributed.agreed(3) == 3
