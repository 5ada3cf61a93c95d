"""Row 54: where memory ends there is one line, with what was needed, and what to lower."""

import re
import resource
import sys

import jax
import pytest

from faults.small_runs import config, settings
from faults.tools import one_line, python, status
from gspo_jax import train as train_module
from gspo_jax.cli.commands import main
from gspo_jax.errors import OutOfMemory
from gspo_jax.plan import memory
from gspo_jax.plan.capacity import capacity, cgroup_limits

# What XLA writes on a GPU, shortened in nothing but the number of its buffers.
DUMP = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789012 bytes.\n" + "".join(
    f"%fusion.{i} = (f32[151936,4096]{{1,0}}) fusion(%param.{i}), kind=kLoop, calls=%computation\n"
    for i in range(500)
)
SHORT = ["eval.split=test", "run.steps=1"]


@pytest.mark.parametrize("where", ["sample", "update", "make_advantage"])
def test_row_54_an_allocation_that_fails_is_one_line_with_figures_and_knobs(
    tiny_dir, tmp_path, monkeypatch, capsys, where
):
    """While sampling and updating, which compile; and before the run has begun."""

    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError(DUMP)

    monkeypatch.setattr(train_module, where, fails)
    assert main(["train", *settings(tiny_dir, tmp_path, *SHORT)]) == 5
    line = one_line(capsys.readouterr().err)
    assert "out of memory (allocating 123456789012 bytes)" in line and "fusion" not in line
    assert len(re.findall(r"(algo|rollout)\.\w+", line)) == 2
    if where != "make_advantage":
        assert re.search(r"the update needs about [\d.]+ [MG]B per device by estimate", line)
        assert "masters" in line and "activations" in line and "which has" in line
        assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(
    ("big", "knobs"),
    [
        ("rollout.prompts=4000000", ["rollout.prompts=4000000", "rollout.max_completion_length"]),
        ("algo.microbatch=4000000", ["algo.microbatch=4000000", "rollout.max_completion_length"]),
    ],
)
def test_row_54_what_cannot_fit_by_far_is_refused_before_compiling(
    tiny_dir, tmp_path, monkeypatch, capsys, big, knobs
):
    monkeypatch.setattr(memory, "capacity", lambda: 100_000_000)
    compiled = []
    monkeypatch.setattr(train_module, "sample", lambda *_: compiled.append(1))
    assert main(["train", *settings(tiny_dir, tmp_path, *SHORT, big)]) == 5
    line = one_line(capsys.readouterr().err)
    assert "it would run out of memory: the" in line and "which has 100.0 MB" in line
    assert all(knob in line for knob in knobs)
    assert not compiled and not (tmp_path / "run").exists()


def test_row_54_weights_that_do_not_fit_ask_for_other_settings_than_the_batch(
    tiny_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "capacity", lambda: 1000)
    message = r"Set optim\.state=8bit or mesh\.fsdp=2; gspo-jax plan"
    with pytest.raises(OutOfMemory, match=message):
        train_module.train(config(tiny_dir, tmp_path, *SHORT, "optim.state=float32"))


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a child")
def test_row_54_a_real_limit_is_known_beforehand(tiny_dir, tmp_path):
    """12 GB of address space, and a batch whose activations need a hundred times that."""
    code = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        from gspo_jax.cli.commands import main
        sys.exit(main(["train", *sys.argv[1:]]))
    """
    big = ["rollout.prompts=4096", "algo.microbatch=100000000"]
    done = python(code, *settings(tiny_dir, tmp_path, *SHORT, *big))
    assert done.returncode == 5, done.stderr
    assert "it would run out of memory" in one_line(done.stderr)


def test_the_capacity_is_no_more_than_this_process_may_have(monkeypatch):
    everything = capacity()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8_000_000, 8_000_000))
    assert capacity() == 8_000_000 // jax.local_device_count() < everything


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        # Slurm and systemd limit a parent of the group in which the process is.
        (
            "0::/system.slice/job_7/step_0/task_0",
            {
                "system.slice/memory.max": "max",
                "system.slice/job_7/memory.max": "4000",
                "system.slice/job_7/step_0/memory.max": "5000",
            },
            [4000, 5000],
        ),
        ("0::/", {"memory.max": "3000"}, [3000]),  # a container with a namespace of its own
        ("0::/docker/of/the/host", {"memory.max": "2000"}, [2000]),  # and one without
        # Version 1; without a limit it says the largest number of whole pages below 2^63.
        (
            "9:cpu,cpuacct:/x\n5:memory:/slurm/job_7",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/slurm/memory.limit_in_bytes": "6000",
                "x/memory.max": "1",
            },
            [6000, 9223372036854771712],
        ),
        ("", {"memory.max": "1"}, []),
    ],
)
def test_every_control_group_on_the_way_up_limits_the_memory(tmp_path, membership, files, limits):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "self").write_text(membership)
    assert sorted(cgroup_limits(tmp_path / "self", root)) == limits
