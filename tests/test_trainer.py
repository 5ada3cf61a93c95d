"""The object API: the names of a trainer class over the functions of a run."""

import json
import signal

import numpy as np
import pytest
from flax import nnx

from gspo_jax import GSPOConfig, GSPOCustomDataset, GSPOTrainer, load_model
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.files.stopping import uninterrupted
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.tasks import user_data
from gspo_jax.text import console
from gspo_jax.trainer import as_problem, verified
from gspo_jax.update.programs import Programs

SEVEN = ("loss", "clip_fraction", "importance_ratio_mean", "importance_ratio_std")
SEVEN += ("advantage_mean", "advantage_std", "reward_mean")
ITEMS = [{"query": f"Say {word}", "reference_answer": word} for word in "abcdef"]


def short(query, response, item):
    """Higher for shorter responses; the item is the whole row."""
    assert item["reference_answer"] == query[-1]
    return 1 / (1 + len(response))


@pytest.fixture(scope="module")
def trainer(tiny_dir):
    config = GSPOConfig(
        learning_rate=3e-3,
        left_clip_range=0.02,
        right_clip_range=0.03,
        group_size=4,
        batch_size=4,
        minibatches_per_rollout=2,
        max_prompt_length=32,
        max_new_tokens=32,
        num_epochs=2,
    )
    return GSPOTrainer(tiny_dir, config=config, reward_fn=short)


FIRST_SYSTEM = """
config = GSPOConfig(
    learning_rate=1e-6,
    left_clip_range=0.002,
    right_clip_range=0.002,
    group_size=4,
    batch_size=2,
    num_epochs=3,
    max_new_tokens=32,
)
trainer = GSPOTrainer(model, tokenizer, config)

dataset = GSPOCustomDataset()
train_data = dataset.generate_dataset(500)

for epoch in range(config.num_epochs):
    metrics = trainer.train_step(train_data)
    print(f"loss {metrics['loss']:.4f}, reward {metrics['reward_mean']:.2f}")
"""


@pytest.mark.long
def test_a_script_for_the_first_system_runs_with_another_import(tiny_dir, capsys):
    """Its names, its order of arguments, its keys; only the model is one of ours."""
    model, tokenizer = load_model(tiny_dir), load_tokenizer(tiny_dir)
    imports = "from gspo_jax import GSPOTrainer, GSPOConfig, GSPOCustomDataset\n"
    names = {"model": model, "tokenizer": tokenizer}
    exec(compile(imports + FIRST_SYSTEM, "README.md", "exec"), names)
    assert len(names["train_data"]) == 500 and names["trainer"].state.step == 3
    assert set(SEVEN) <= set(names["metrics"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines if line.startswith("loss")] == ["loss"] * 3


def test_a_step_takes_the_next_items_and_says_seven_numbers(trainer):
    before = np.asarray(trainer.policy.params["embed"][...]).copy()
    seen = []

    def watched(query, response):
        seen.append(query)
        return float(len(response))

    first = trainer.train_step(ITEMS, watched)
    trainer.train_step(ITEMS, watched)
    # 4 of 6 items, each with 4 responses; then the other two and the first two again.
    assert seen[::4] == [f"Say {word}" for word in "abcdefab"]
    assert all(np.isfinite(first[name]) for name in SEVEN)
    assert first["clip_frac_by_update"][0] == 0 and first["ratio_std_by_update"][0] == 0
    assert np.any(np.asarray(trainer.state.params["embed"][...]) != before)


def test_training_leaves_metrics_and_a_model_that_loads(trainer, tmp_path):
    history = trainer.train(ITEMS, eval_data=ITEMS[:2], output_dir=tmp_path / "run")
    assert len(history) == 1 + 3  # two epochs of six items, four at a time
    assert history[0]["eval/n"] == history[-1]["eval/n"] == 2
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    saved = nnx.state(load_model(tmp_path / "run" / "final_model"))
    np.testing.assert_array_equal(saved["embed"][...], trainer.state.params["embed"][...])


def test_greedy_responses_are_the_same_every_time(trainer):
    prompts = ["Say a", "Say something else"]
    texts = trainer.generate(prompts, temperature=0.0)
    assert len(texts) == 2 and texts == trainer.generate(prompts, temperature=0.0, seed=5)


@pytest.mark.long
def test_a_network_in_memory_is_copied_and_stays_as_it_is(trainer, tiny_dir):
    model = load_model(tiny_dir)
    before = np.asarray(model.embed[...]).copy()
    mine = GSPOTrainer(model, trainer.tokenizer, trainer.options, reward_fn=short)
    mine.train_step(ITEMS)
    np.testing.assert_array_equal(model.embed[...], before)
    assert np.any(np.asarray(mine.state.params["embed"][...]) != before)


def test_what_is_no_model_of_ours_is_refused_with_the_way_to_convert_it(tiny_dir):
    network = type("Qwen2ForCausalLM", (), {"__module__": "torch.models"})()
    with pytest.raises(ConfigError, match=r"torch\.models\.Qwen2ForCausalLM; .*save_pretrained"):
        GSPOTrainer(network, None, GSPOConfig())
    with pytest.raises(ConfigError, match=r"no tokenizer; give the directory"):
        GSPOTrainer(load_model(tiny_dir))


def test_every_field_acts(tmp_path):
    """Changing a field changes the config of the run, or what `train` does."""
    plain = GSPOConfig().to_config(tmp_path)
    other = {"batch_size": 4, "mini_batch_size": 3, "minibatches_per_rollout": 2, "seed": 7}
    other |= {"max_length": 700, "use_8bit_optimizer": False, "use_gradient_checkpointing": True}
    other |= {"advantage_normalization": False, "learning_rate": 1e-3, "temperature": 0.7}
    other |= {"left_clip_range": 0.1, "right_clip_range": 0.1, "group_size": 2}
    other |= {"max_prompt_length": 99, "max_new_tokens": 9, "max_grad_norm": 0.3}
    for name, value in other.items():
        assert GSPOConfig(**{name: value}).to_config(tmp_path) != plain, name
    in_train = {"num_epochs", "eval_frequency"}
    assert set(other) | in_train == set(GSPOConfig.__dataclass_fields__)
    assert GSPOConfig(batch_size=6).to_config(tmp_path).algo.minibatches == 3


@pytest.mark.long
def test_what_takes_long_says_what_it_does(tiny_dir, monkeypatch, capsys):
    """A clock that is always late: every stage of the constructor, and of the first step alone."""

    class Late:
        def __init__(self, seconds, tell):
            assert seconds == console.PATIENCE
            self.start = tell

        def cancel(self):
            pass

    monkeypatch.setattr(console.threading, "Timer", Late)
    config = GSPOConfig(group_size=2, batch_size=2, max_prompt_length=32, max_new_tokens=32)
    made = GSPOTrainer(tiny_dir, config=config, reward_fn=short)
    said = capsys.readouterr().err.replace(str(tiny_dir), "DIR").splitlines()
    assert [line.partition(" ")[0] for line in said] == ["Looking", "Reading", "Making"]
    assert said[1] == "Reading the weights of DIR ..."
    made.train_step(ITEMS)
    stages = [x.rpartition(": ")[2] for x in capsys.readouterr().err.splitlines()]
    assert stages[:2] == ["generate ...", "reward ..."] and "update ..." in stages
    made.train_step(ITEMS)
    assert capsys.readouterr().err == ""


def test_what_is_quick_says_nothing(capsys):
    with console.telling("A moment"):
        pass
    assert capsys.readouterr().err == ""


def test_fields_of_others_are_refused_with_what_there_is_instead(tmp_path):
    with pytest.raises(ConfigError, match="no gradient_accumulation_steps: set mini_batch_size"):
        GSPOConfig(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match=r"no learning_rte\. Did you mean learning_rate\?"):
        GSPOConfig(learning_rte=1e-6)
    with pytest.raises(ConfigError, match="max_length=512 leaves no token beside max_prompt_len"):
        GSPOConfig(max_length=512).to_config(tmp_path)


def test_the_dataset_has_the_usual_keys_and_its_reward_no_way_around_the_answer():
    data = GSPOCustomDataset(seed=42).generate_dataset(40)
    keys = {"query", "reference_answer", "type", "difficulty", "target_answer", "id"}
    assert all(keys <= set(item) for item in data)
    assert data == GSPOCustomDataset(seed=42).generate_dataset(40)
    assert data != GSPOCustomDataset(seed=43).generate_dataset(40)
    assert len({item["type"] for item in data}) == 4
    held_out = GSPOCustomDataset(seed=42).generate_dataset(40, split="test")
    assert {x["query"] for x in data}.isdisjoint(x["query"] for x in held_out)
    reward, item = GSPOCustomDataset().create_reward_function(), data[0]
    answer = item["target_answer"]
    assert reward(item["prompt"], f"So it is \\boxed{{{answer}}}.", item) == 1
    for text in ("", answer, "42 because therefore", f"\\boxed{{{answer}}} \\boxed{{1}}"):
        assert reward(item["prompt"], text, item) == 0
    assert verified is reward


def test_an_item_is_a_text_or_has_a_question():
    assert as_problem("Why?", 3).prompt == "Why?"
    problem = as_problem({"question": "Why?", "answer": 6, "topic": "x"}, 0)
    assert (problem.prompt, problem.answer, problem.columns["topic"]) == ("Why?", "6", "x")
    with pytest.raises(DataError, match=r"item 2:prompt: none of the columns \['text'\]"):
        as_problem({"text": "Why?"}, 2)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "answer": "3 + 4 = 7\n#### 7"},  # GSM8K
        {"problem": "Q", "solution": r"So it is \boxed{7}."},  # MATH
        {"prompt": "Q", "reward_model": {"ground_truth": ["7"]}},  # verl
        {"query": "Q", "target_answer": 7, "solution": "Count them."},
    ],
)
def test_an_item_and_a_row_of_a_file_have_the_same_gold_answer(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = user_data(tmp_path / "rows.jsonl")
    assert as_problem(row, 0, answered=True).answer == "7" == task.problem("train", 0).answer
    assert verified("Q", r"\boxed{7}", row) == 1 and verified("Q", r"\boxed{3}", row) == 0


def test_items_without_an_answer_are_refused_unless_a_function_scores_them(trainer, monkeypatch):
    """At the start of a whole training, although the bad item would come last."""
    monkeypatch.setattr(trainer, "train_step", lambda *_: {"trained": 1})
    monkeypatch.setattr(trainer, "reward_fn", verified)
    data = [{"prompt": "Q", "answer": 7}, {"prompt": "Q", "label": 7}]
    with pytest.raises(DataError, match=r"item 1 has no answer .* it has \['prompt', 'label'\]"):
        trainer.train(data)
    with pytest.raises(DataError, match="item 0 has no answer"):
        trainer.evaluate(["Q"])
    assert len(trainer.train(data, reward_fn=lambda query, response: 1.0)) > 1
    assert as_problem({"prompt": "Q", "answer": {"a": 7}}, 0).columns["answer"] == {"a": 7}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_leaves_the_weights_of_the_last_whole_update(
    trainer, monkeypatch, error
):
    """The second of a step's updates does not come: those of the first are there, and go on."""
    trainer.train_step(ITEMS)
    before = np.asarray(trainer.policy.params["embed"][...]).copy()
    update, calls = Programs.update, []

    def second_fails(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise error
        return update(*arguments, **options)

    place = trainer._place
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "update", second_fails)
        with pytest.raises(error):
            trainer.train_step(ITEMS)
    held = np.asarray(trainer.policy.params["embed"][...])
    assert np.isfinite(held).all() and np.any(held != before)
    assert trainer._place == place
    assert np.isfinite(trainer.train_step(ITEMS)["loss"])


def test_ctrl_c_waits_for_the_next_states_owner(request):
    """Between what ends a state and what keeps its successor nothing is raised."""
    kept = []
    # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            kept.append("whole")
        kept.append("never")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kept == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_training_into_one_place_is_refused_before_its_first_step(trainer, tmp_path):
    (tmp_path / "run" / "final_model").mkdir(parents=True)
    step = int(trainer.state.step)
    with pytest.raises(StorageError, match="final_model is there already; give another output_dir"):
        trainer.train(ITEMS, output_dir=tmp_path / "run")
    with pytest.raises(DataError, match="no data"):
        trainer.train([], output_dir=tmp_path / "other")
    assert int(trainer.state.step) == step and not (tmp_path / "other").exists()


def test_the_status_of_a_training_that_fails_says_so(trainer, tmp_path):
    def fails(query, response):
        raise RuntimeError("no score today")

    with pytest.raises(DataError):
        trainer.train(ITEMS, output_dir=tmp_path / "run", reward_fn=fails)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
