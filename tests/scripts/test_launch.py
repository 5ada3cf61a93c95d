"""docs/launch: the files are well-formed, their commands are ours, and the Slurm script works."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from gspo_jax.config.names import SETTINGS
from gspo_jax.errors import PREEMPTED

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "docs" / "launch"
SCRIPT = LAUNCH / "slurm.sh"

# What Slurm does for a job of two tasks on two nodes, as far as the script can tell. The tasks are
# processes of this machine with srun's variables; the exit code is the highest of theirs.
SRUN = """
import os, signal, subprocess, sys
command = [x for x in sys.argv[1:] if not x.startswith("--")]
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
tasks = []
for i in range(2):
    own = {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}
    tasks.append(subprocess.Popen(command, env=os.environ | step | own))
def tell(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGUSR1, tell)
signal.signal(signal.SIGTERM, tell)
open(os.environ["STEP"], "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""

# Instead of gspo-jax: says what it was started with; saves, slowly, when it is told to stop.
TRAINER = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)
    os._exit(75)
signal.signal(signal.SIGUSR1, stop)
names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "JAX_LOCAL_DEVICE_IDS")
said = [os.environ.get(name, "-") for name in names] + sys.argv[1:]
with open(os.environ["SAID"], "a") as file:
    file.write(" ".join(said) + "\\n")
code = os.environ["CODE"]
if code == "wait":
    time.sleep(60)
sys.exit(int(code))
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as Slurm would; `scontrol` and `srun` are found on its path."""
    for name, body in (
        ("srun", f"#!{sys.executable}\n{SRUN}"),
        ("gspo-jax", f"#!{sys.executable}\n{TRAINER}"),
        ("scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n'),
    ):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)

    def start(code, *overrides, **variables):
        env = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_GPUS_ON_NODE": "4",
            "RUNS": "/shared/runs",
            "SAID": str(tmp_path / "said"),
            "STEP": str(tmp_path / "step"),
            "CODE": code,
        }
        command = ["bash", str(SCRIPT), "run.yaml", *overrides]
        return subprocess.Popen(command, env=env | variables, cwd=tmp_path)

    return start


def said(tmp_path):
    path = tmp_path / "said"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def requeued(tmp_path):
    return (tmp_path / "requeued").exists()


def test_the_slurm_script_starts_one_process_per_node_with_all_of_its_gpus(slurm, tmp_path):
    assert slurm("0", "rollout.prompts=8").wait(30) == 0
    command = "train run.yaml rollout.prompts=8 run.dir=/shared/runs run.resume=auto"
    assert said(tmp_path) == [f"{i} 2 localhost 0,1,2,3 {command}" for i in range(2)]
    assert not requeued(tmp_path)


def test_with_one_task_per_gpu_jax_is_left_to_choose(slurm, tmp_path):
    assert slurm("0", SLURM_NTASKS_PER_NODE="4").wait(30) == 0
    assert {line.split()[3] for line in said(tmp_path)} == {"-"}


@pytest.mark.parametrize("code", [1, 2, 6, 130])
def test_the_slurm_script_ends_with_the_code_of_a_run_that_failed(slurm, tmp_path, code):
    assert slurm(str(code)).wait(30) == code
    assert not requeued(tmp_path)


@pytest.mark.parametrize("also_to_the_script", [False, True])
def test_the_slurm_script_waits_for_a_run_that_saves_and_requeues(
    slurm, tmp_path, also_to_the_script
):
    """SIGUSR1 goes to the tasks; preemption tells the script as well, which must not end of it."""
    process = slurm("wait")
    while len(said(tmp_path)) < 2 or not (tmp_path / "step").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(int((tmp_path / "step").read_text()), signal.SIGUSR1)
    if also_to_the_script:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == PREEMPTED
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


@pytest.mark.long
def test_a_run_of_two_tasks_is_preempted_requeued_and_finished(slurm, tiny_dir, tmp_path):
    """The real program: JAX finds the other process by Slurm's variables alone."""
    program = "import sys\nfrom gspo_jax.cli.commands import main\nsys.exit(main())\n"
    (tmp_path / "gspo-jax").write_text(f"#!{sys.executable}\n{program}")
    small = {
        "model": {"path": str(tiny_dir)},
        "run": {"save_every": 1, "log_completions": 0, "name": "run"},
        "rollout": {"prompts": 4, "group_size": 4, "max_completion_length": 8},
        "eval": {"problems": 2, "samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    env = {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX takes its port from it
        "SLURM_GPUS_ON_NODE": "0",
        "RUNS": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    path, patience = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    process = slurm("0", "run.steps=1000", "mesh.data=2", **env)
    while not path.exists() or path.read_text().count("\n") < 3:  # the start, and two steps
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
    assert process.wait(120) == PREEMPTED
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    done = json.loads((tmp_path / "run" / "status.json").read_text())
    assert done["state"] == "preempted" and done["step"] >= 2
    steps = done["step"] + 1
    assert slurm("0", f"run.steps={steps}", "mesh.data=2", **env).wait(240) == 0
    found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert found == list(range(steps + 1))
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_the_slurm_script_is_bash_and_asks_for_the_signal_to_the_tasks():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert options["signal"].startswith("USR1@") and {"requeue", "open-mode"} <= set(options)
    assert os.access(SCRIPT, os.X_OK)


def commands():
    """The words of each `gspo-jax train` in the files, with $VARIABLES as they stand."""
    texts = {path.name: path.read_text() for path in sorted(LAUNCH.iterdir())}
    job = list(yaml.safe_load_all(texts["kubernetes.yaml"]))[1]
    texts["kubernetes.yaml"] = job["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    for name, text in texts.items():
        text = text.replace("\\\n", " ")  # a line goes on after a backslash
        for line in re.findall(r"(?:gspo-jax|\$LAUNCH) train [^\n&]*", text):
            yield pytest.param(shlex.split(line), id=name)


@pytest.mark.parametrize("words", commands())
def test_commands_take_settings_that_exist_and_continue_by_themselves(words):
    names = [word.partition("=")[0] for word in words if re.match(r"\w+\.\w+=", word)]
    assert set(names) <= set(SETTINGS)
    if "..." not in words:
        assert "run.dir" in names and "run.resume=auto" in words
    flags = {word for word in words if word.startswith("--")}
    assert flags in (set(), {"--coordinator", "--processes", "--process"})


def test_the_kubernetes_job_can_find_its_pods_and_repeats_what_was_preempted():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    shell, flag, command = container["command"]
    assert (shell, flag) == ("bash", "-c") and command.startswith("exec gspo-jax train ")
    address = f"{job['metadata']['name']}-0.{pod['subdomain']}:"
    assert f"--coordinator {address}" in command
    assert f"--processes {spec['completions']} --process $JOB_COMPLETION_INDEX" in command
    by_code = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code[PREEMPTED] == "Ignore" and by_code[2] == "FailJob" and 6 not in by_code
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_sky_pilot_job_repeats_what_was_preempted():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [PREEMPTED]
    for name in ("NODE_IPS", "NUM_NODES", "NODE_RANK"):
        assert f"$SKYPILOT_{name}" in task["run"]
    (place,) = task["volumes"]
    assert f"run.dir={place} " in task["run"]
    script = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert script.returncode == 0, script.stderr


def test_the_page_leads_to_the_files():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (LAUNCH / "index.md").read_text())
    assert {"slurm.sh", "kubernetes.yaml", "skypilot.yaml"} <= set(targets)
    assert [t for t in targets if not (LAUNCH / t).exists()] == []
