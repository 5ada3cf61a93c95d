"""Wrong input as a user types it: one line with the field, what was got and what is allowed."""

import re
from pathlib import Path

import jax
import pytest

import gspo_jax.train
from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.config.settings import SECTIONS
from gspo_jax.errors import ConfigError
from gspo_jax.trainer_config import GSPOConfig

FILES = {
    "tab.yaml": "run:\n\tsteps: 3\n",
    "open.yaml": "run: {steps: 3\n",
    "list.yaml": "- run\n",
    "number.yaml": "3\n",
    "twice.yaml": "run: {seed: 1}\nrun: {seed: 2}\n",
    "space.yaml": "run:\n  steps:3\n  seed: 1\n",
    "name.yaml": "rollout: {group_sze: 8}\n",
    "section.yaml": "rolout: {group_size: 8}\n",
    "type.yaml": "rollout: {group_size: eight}\n",
    "range.yaml": "run: {steps: 0}\n",
    "comma.yaml": "rollout:\n  prompts: 1,024\n",
    "null.yaml": "run:\n  steps:\n",
    "value.yaml": "rollout: 8\n",
    "loss.yaml": "algo: {loss: gpso}\n",
    "loop.yaml": "sft: {batch_size: '${run.steps}'}\nrun: {steps: '${sft.batch_size}'}\n",
    "both.yaml": "task: {name: arithmetic, path: rows.jsonl}\n",
    "experiment.yaml": "seed: [1]\n",
    "rows.jsonl": '{"prompt": "a", "answer": "b"}\n',
    "reward.py": "def right(completions, **columns):\n    return [0.0] * len(completions)\n",
}
WHOLE, NUMBER, LIST = "expected a whole number", "expected a number", "expected a list of"
FEW = "task.options.sizes={train: 2, val: 0, test: 0}"
GAE = ["algo.advantage=gae", "algo.critic.kind=separate"]

# What is typed after `gspo-jax train`, and what the one line names: the field as typed, what was
# got, what is allowed, and what was probably meant (None: nothing is near).
WRONG = [
    # names
    ("rollout.group_sze=8", "rollout.group_sze", "unknown setting", "", "rollout.group_size"),
    ("rolout.group_size=8", "rolout.group_size", "unknown setting", "", "rollout.group_size"),
    ("group_size=8", "group_size", "unknown setting", "", "rollout.group_size"),
    ("optim.lr=1e-6", "optim.lr", "unknown setting", "", "optim.learning_rate"),
    ("algo.beta=0.04", "algo.beta", "unknown setting", "", "algo.kl.coef"),
    ("seed=1", "seed", "unknown setting", "", "task.seed or run.seed"),
    ("mesh.wings=2", "mesh.wings", "unknown setting", "mesh takes ['data', 'fsdp'", None),
    ("wings=2", "wings", "unknown setting", f"sections are {list(SECTIONS)}", None),
    ("rollout=8", "rollout=8", "a section", "set one of ['prompts', 'group_size'", None),
    ("algo.kl=0.1", "algo.kl=0.1", "a section", "like algo.kl.coef=...", None),
    ("num_generations=4 rollout.group_size=6", "group_size", "as 4 and as 6", "given twice", None),
    # types
    ("rollout.group_size=eight", "rollout.group_size", "=eight", f"{WHOLE}, like 8", None),
    ("rollout.group_size=8.0", "rollout.group_size", "=8.0", WHOLE, None),
    ("rollout.group_size=", "rollout.group_size", "is empty", WHOLE, None),
    ("rollout.group_size=null", "rollout.group_size", "=null", WHOLE, None),
    ("rollout.group_size=true", "rollout.group_size", "=true", WHOLE, None),
    ("rollout.group_size=[8]", "rollout.group_size", "=[8]", WHOLE, None),
    ("rollout.prompts=1,024", "rollout.prompts", "=1,024", WHOLE, "1024"),
    ("rollout.temperature=0,7", "rollout.temperature", "=0,7", NUMBER, "0.7"),
    ("optim.learning_rate=fast", "optim.learning_rate", "=fast", f"{NUMBER}, like 1e-06", None),
    ("optim.warmup=0.1", "optim.warmup", "=0.1", WHOLE, None),
    ("algo.mask_truncated=maybe", "algo.mask_truncated", "=maybe", "true or false", None),
    ("model.dtype=bf16", "model.dtype", "=bf16", "['auto', 'float32', 'bfloat16']", "bfloat16"),
    ("optim.state=8-bit", "optim.state", "=8-bit", "one of ['8bit', 'float32']", "8bit"),
    ("optim.schedule=cosin", "optim.schedule", "=cosin", "['constant', 'linear'", "cosine"),
    ("algo.kl.kind=k4", "algo.kl.kind", "=k4", "one of ['k1', 'k2', 'k3']", None),
    ("algo.critic.kind=seperate", "algo.critic.kind", "=seperate", "['none', '", "separate"),
    ("algo.routing_replay=r3", "algo.routing_replay", "=r3", "['off', 'R2', 'R3']", "R3"),
    ("task.reward_weights=[a]", "task.reward_weights", "=[a]", f"{LIST} numbers", None),
    ("run.profile_steps=[a]", "run.profile_steps", "=[a]", f"{LIST} whole numbers", None),
    ("task.rewards.first=x", "task.rewards.first", "=x", f"{LIST} texts", None),
    ("task.options=5", "task.options", "=5", "a mapping, like {key: value}", None),
    ("task.curriculum=[easy]", "task.curriculum", "=[easy]", "a mapping", None),
    ("task.curriculum={easy: soon}", "task.curriculum.easy", "=soon", NUMBER, None),
    ("algo.loss={name:gspo}", "algo.loss", "={name:gspo}", "a space after the colon", None),
    ("algo.loss=[gspo]", "algo.loss", "=[gspo]", "a name, or a mapping like {name: gspo}", None),
    ("algo.loss.clip_low=tight", "algo.loss.clip_low", "=tight", "a finite number", None),
    # ranges
    ("run.steps=0", "run.steps", "=0", "at least 1", None),
    ("rollout.prompts=-8", "rollout.prompts", "=-8", "at least 1", None),
    ("rollout.prompts=9999999999", "rollout.prompts", "=9999999999", "at most 2147483647", None),
    ("run.seed=5000000000", "run.seed", "=5000000000", "at most 4294967295", None),
    ("optim.learning_rate=nan", "optim.learning_rate", "=nan", "a finite number", None),
    ("optim.learning_rate=inf", "optim.learning_rate", "=inf", "a finite number", None),
    ("optim.learning_rate=-1e-6", "optim.learning_rate", "=-1e-06", "at least 0", None),
    ("task.reward_weights=[nan]", "task.reward_weights", "=[nan]", "a finite number", None),
    ("optim.max_grad_norm=0", "optim.max_grad_norm", "=0", "above 0", None),
    ("optim.b2=1", "optim.b2", "=1", "at least 0 and below 1", None),
    ("rollout.top_p=1.5", "rollout.top_p", "=1.5", "above 0 and at most 1", None),
    ("rollout.temperature=0", "rollout.temperature", "=0", "above 0", None),
    ("run.profile_steps=[0]", "run.profile_steps", "=[0]", "count from 1", None),
    ("task.reward_timeout=0", "task.reward_timeout", "=0", "above 0 seconds", None),
    ("eval.split=dev", "eval.split", "=dev", "['train', 'val', 'test']", "val"),
    ("mesh.data=0", "mesh.data", "=0", "at least 1, or -1", None),
    ("run.name=../x", "run.name", "=../x", "a folder's name", None),
    ("model.path=", "model.path", "is empty", "a model directory", None),
    ("task.path=", "task.path", "is empty", "a file or a directory", None),
    # losses and advantages
    ("algo.loss=gsop", "algo.loss.name", "=gsop", "Choose from ['gspo'", "gspo"),
    ("algo.loss=GSPO", "algo.loss.name", "=GSPO", "Choose from ['gspo'", "gspo"),
    ("algo.loss.clip_hi=1", "algo.loss.clip_hi", "gspo", "It takes ['clip_low'", "clip_high"),
    ("algo.loss.beta=0.1", "algo.loss.beta", "gspo has none", "", "algo.kl.coef"),
    ("algo.loss.mean=token", "algo.loss.mean", "gspo", "each loss has one mean", None),
    ("algo.loss.clip_low=-1", "algo.loss.clip_low", "=-1", "above 0", None),
    ("algo.loss.clip_low=1.5", "algo.loss.clip_low", "=1.5", "at most 1", None),
    ("algo.loss.delta=1", "algo.loss.delta", "=1", "above 1 + clip_high, 1.0004", None),
    ("algo.loss={name: cispo, floor: 6}", "algo.loss.cap", "=5", "algo.loss.floor=6", None),
    ("algo.advantage=gaa", "algo.advantage.name", "=gaa", "Choose from ['group_n", "gae"),
    ("algo.advantage.scale=grup", "algo.advantage.scale", "=grup", "['group', 'batch'", "group"),
    ("algo.advantage.eps=-1", "algo.advantage.eps", "=-1", "at least 0", None),
    # combinations
    ("rollout.group_size=1", "rollout.group_size", "=1", "at least 2 responses", None),
    ("algo.minibatches=3", "algo.minibatches", "=3", "rollout.prompts=16", None),
    ("rollout.overlong_buffer=300", "overlong_buffer", "=300", "completion_length=256", None),
    ("algo.advantage=gae", "algo.advantage.name", "=gae", "set algo.critic.kind", None),
    ("algo.critic.kind=shared", "algo.critic.kind", "=shared", "set algo.advantage=gae", None),
    (" ".join(GAE), "algo.loss.name", "=gspo", "choose ppo, or gspo_token", None),
    ("mesh.data=-1 mesh.fsdp=-1", "mesh.data and mesh.fsdp", "both -1", "but one a number", None),
    ("mesh.tensor=3 --dry-run", "mesh.tensor", "=3", "2 and its divisors", None),
    ("mesh.data=16 --dry-run", "mesh.data", "=16", "8 exist", None),
    ("run.report_to=[wadnb]", "run.report_to", "[wadnb]", "'wandb', 'tensorboard'", "wandb"),
    # tasks, data and rewards
    ("task.name=aritmetic", "task.name", "=aritmetic", "The tasks are ['aime24'", "arithmetic"),
    ("both.yaml", "task.name=arithmetic", "task.path=rows.jsonl", "give one", None),
    ("task.name=null", "task.name=null", "task.path=null", "give one", None),
    ("task.options.slp=0.5", "task.options.slp", "", "It takes ['slip'", "slip"),
    ("task.options.slip=lots", "task.options.slip", "=lots", "a finite number", None),
    ("task.fields={answer: a}", "task.fields", "arithmetic has none", "columns of task", None),
    ("task.curriculum={easy: 1.5}", "task.curriculum.easy", "=1.5", "below 1", None),
    ("task.curriculum={hard: 0.5}", "task.curriculum", "={hard: 0.5}", "start at 0", None),
    ("task.rewards=reward.py", "task.rewards", "=[reward.py]", "file.py:function", None),
    ("task.reward_weights=[1,2]", "task.reward_weights", "2 numbers for 1", "one each", None),
    ("task.options.slip=2 --dry-run", "task.options.slip", "=2", "between 0 and 1", None),
    (
        "task.name=mixture task.options.tasks={aritmetic: 1} --dry-run",
        "task.options.tasks.aritmetic.name",
        "=aritmetic",
        "The tasks are",
        "arithmetic",
    ),
    (
        "task.name=mixture task.options.tasks={arithmetic: -1} --dry-run",
        "task.options.tasks.arithmetic.weight",
        "=-1",
        "a number above 0",
        None,
    ),
    # ${...}
    ("model.path=${oc.env:NOPE}", "model.path", "{oc.env:NOPE}", "variable NOPE is not set", None),
    ("model.path=${NOPE}", "model.path", "=${NOPE}", "no setting NOPE", "${oc.env:NOPE}"),
    ("run.steps=${run.stpes}", "run.steps", "no setting run.stpes", "", "run.steps"),
    ("run.name=${run.name}", "run.name", "=${run.name}", "refers to itself", None),
    ("run.steps=${oc.env:TEN}", "run.steps", "=${oc.env:TEN}", "stand for a whole number", None),
    ("model.path=${oc.env:X", "model.path", "=${oc.env:X", "${oc.env:NAME}", None),
    # files
    ("tab.yaml", "tab.yaml:2:1", "a tab", "indented by spaces", None),
    ("open.yaml", "open.yaml:2:1", "not YAML", "expected ',' or '}'", None),
    ("twice.yaml", "twice.yaml:2:1", "duplicate key run", "", None),
    ("space.yaml", "space.yaml:3:7", "not YAML", "", None),
    ("list.yaml", "list.yaml", "got a list", "expected sections (model:, task:, ...)", None),
    ("number.yaml", "number.yaml", "int", "wanted sections (model:, task:, ...)", None),
    ("name.yaml", "name.yaml", "rollout.group_sze", "unknown", "rollout.group_size"),
    ("section.yaml", "section.yaml", "rolout.group_size", "unknown", "rollout.group_size"),
    ("type.yaml", "type.yaml: rollout.group_size", "=eight", WHOLE, None),
    ("range.yaml", "range.yaml: run.steps", "=0", "at least 1", None),
    ("range.yaml run.steps=-1", "gspo-jax: run.steps", "=-1", "at least 1", None),
    ("comma.yaml", "comma.yaml: rollout.prompts", "=1,024", WHOLE, "1024"),
    ("null.yaml", "null.yaml: run.steps", "=null", WHOLE, None),
    ("value.yaml", "value.yaml: rollout", "=8", "a section", None),
    ("loss.yaml", "loss.yaml: algo.loss.name", "=gpso", "Choose from", "gspo"),
    ("loop.yaml", "loop.yaml: ", "=${", "refers to itself", None),
    ("rnage.yaml", "rnage.yaml", "no such config file", "", "range.yaml"),
    ("folder", "folder", "a directory", "wanted a YAML file", None),
    ("rows.jsonl", "rows.jsonl", "wanted a YAML file", "task.path=rows.jsonl", None),
    ("run.steps", "run.steps", "no such config file", "run.steps=VALUE", None),
    ("=3", "=3", "no such config file", "section.key=VALUE", None),
    ("tab.yaml open.yaml", "tab.yaml and open.yaml", "", "one config file at most", None),
    # options
    ("--dryrun", "--dryrun", "unknown argument", "gspo-jax train --help", "--dry-run"),
    ("--run.steps=3", "--run.steps=3", "unknown", "without dashes, run.steps=VALUE", None),
    ("--steps 3", "--steps", "unknown", "without dashes, run.steps=VALUE", None),
    ("--config", "--config", "expected one argument", "", None),
    ("--processes two", "--processes", "'two'", "a whole number from 1", None),
]
# Bad data, which has an exit code of its own, and a checkpoint that is not there.
BAD_DATA = [
    ("task.path=rosw.jsonl --dry-run", 3, "rosw.jsonl", "no such file"),
    (f"task.rewards=[nofile.py:f] {FEW} --dry-run", 3, "nofile.py:f", "no such file nofile.py"),
    (f"task.rewards=reward.py:rihgt {FEW} --dry-run", 3, "rihgt", "Did you mean reward.py:right?"),
    ("model.path=nowhere --dry-run", 3, "nowhere", "there is no model directory"),
    ("run.resume=nevr", 6, "run.resume=nevr", "Did you mean never? Give auto, never, or"),
    ("run.resume=nowhere/5 --dry-run", 6, "run.resume=nowhere/5", "not a checkpoint"),
]
COMMANDS = [
    ("trian", "unknown command trian", "The commands are demo, train", "train"),
    ("demo.yaml", "unknown command demo.yaml", "", "train demo.yaml"),
    ("--verison", "unknown argument --verison", "", "--version"),
    ("demo tab.yaml", "demo has its own config", "gspo-jax train tab.yaml", None),
    ("compare --losses gspo,grop", "--losses grop", "The losses are ['gspo'", "grpo"),
    ("compare --seeds 0", "--seeds: '0'", "a whole number from 1", None),
    ("compare --against ppo --losses gspo", "--against ppo", "the variants are ['gspo']", None),
    ("sweep", "sweep needs an experiment file", "configs/experiments/losses_sweep.yaml", None),
    ("sweep experiment.yaml", "seed is no field", "The fields are", "seeds"),
    ("eval demo --benchmarks zebar", "--benchmarks zebar", "There are ['aime24'", "zebra"),
    ("plan --memory -5", "--memory: '-5'", "a number above 0", None),
    ("plan --memory nan", "--memory: 'nan'", "a number above 0", None),
    ("replay runs/x --step one", "--step: 'one'", "a whole number from 0", None),
    ("monitor --port http", "--port: 'http'", "a whole number from 0", None),
    ("report", "required: RUN", "gspo-jax report --help", None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's directory, with files that are wrong."""
    place = tmp_path_factory.mktemp("user")
    (place / "folder").mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text)
    return place


@pytest.fixture
def typed(folder, monkeypatch, capsys):
    """Runs a command there; its exit code and its one line. Nothing may start, or be written."""

    def started(config):
        raise AssertionError("the run began")

    def run(line):
        before = contents(folder)
        try:
            code = main(line)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("gspo-jax: ") and err.count("\n") == 1, err
        assert contents(folder) == before
        return code, err

    assert jax.device_count() == 8  # counted now: no test changes how many there are
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TEN", "tenfold-secret")
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setattr(gspo_jax.train, "train", started)
    return run


def contents(folder: Path):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def words(text):
    """The arguments of a line, apart at spaces that are not within braces."""
    return re.findall(r"(?:\{[^}]*\}|[^ ])+", text)


def says(line, *parts, meant=None):
    for part in parts:
        assert part in line, (part, line)
    asked = re.findall(r"Did you mean (.+?)\?(?: |$|;|\n)", line)
    assert asked == ([] if meant is None else [meant]), line


@pytest.mark.parametrize(("text", "field", "got", "allowed", "meant"), WRONG, ids=lambda x: str(x))
def test_a_wrong_setting_is_one_line_and_nothing_begins(typed, text, field, got, allowed, meant):
    code, line = typed(["train", *words(text)])
    assert code == 2
    says(line, field, got, allowed, meant=meant)
    assert "tenfold" not in line  # what the environment holds is not shown


@pytest.mark.parametrize(("text", "code", "field", "allowed"), BAD_DATA, ids=lambda x: str(x))
def test_bad_data_is_one_line_with_its_own_exit_code(typed, text, code, field, allowed):
    found, line = typed(["train", *words(text)])
    assert found == code and field in line and allowed in line


@pytest.mark.parametrize(("text", "got", "allowed", "meant"), COMMANDS, ids=lambda x: str(x))
def test_a_wrong_command_is_one_line(typed, text, got, allowed, meant):
    code, line = typed(text.split())
    assert code == 2
    says(line, got, allowed, meant=meant)


def test_of_a_setting_that_is_typed_twice_the_last_counts():
    """As in any shell: what a script sets can be set otherwise after it."""
    assert load_config(None, ["run.steps=3", "run.steps=4"]).run.steps == 4


def test_a_scalar_stands_for_a_list_of_one():
    config = load_config(None, ["run.profile_steps=3", "task.reward_weights=0.5"])
    assert config.run.profile_steps == [3] and config.task.reward_weights == [0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_sze": 8}, "GSPOConfig has no group_sze. Did you mean group_size?"),
        ({"device": "cpu"}, "GSPOConfig has no device: jax chooses it"),
        ({"group_size": 1}, "group_size=1: a group-relative advantage needs at least 2"),
        ({"left_clip_range": -1.0}, "left_clip_range=-1: must be above 0."),
        ({"batch_size": 8, "minibatches_per_rollout": 3}, "batch_size=8 do not split into minib"),
        ({"max_length": 100}, "max_length=100 leaves no token beside max_prompt_length=512"),
        ({"seed": -1}, "seed=-1: must be at least 0."),
    ],
)
def test_a_wrong_field_of_the_object_api_is_named_as_it_was_typed(given, message):
    with pytest.raises(ConfigError) as error:
        GSPOConfig(**given).to_config(Path("demo"))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
