"""lm-eval drives our model: what it is told is what the model itself says.

lm-eval is imported inside the tests, so that a machine without it can still collect this file.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gspo_jax.config.load import load_config, model_dir
from gspo_jax.models import load_model
from gspo_jax.prompt.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "lm_eval"
DOCUMENTS = [json.loads(line) for line in (FIXTURES / "sums.jsonl").read_text().splitlines()]
TASKS = ["sums_choice", "sums_worked", "sums_text"]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm-eval"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def demo():
    directory = model_dir(load_config())
    return load_model(directory), load_tokenizer(directory), str(directory)


@pytest.fixture(scope="module")
def results(demo, tmp_path_factory):
    """lm-eval's own account of three tasks, through the script's command line."""
    out = tmp_path_factory.mktemp("lm_eval") / "results.json"
    where = ["--model_path", demo[2], "--include_path", str(FIXTURES), "--output", str(out)]
    where += ["--apply_chat_template"]
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.syspath_prepend(str(ROOT / "scripts"))
    try:
        import harness

        assert harness.main([*where, "--tasks", ",".join(TASKS), "mesh.data=1"]) == 0
    finally:
        patch.undo()
        sys.modules.pop("harness", None)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def logps(demo):
    """All log-probabilities after each token of a text, in one compiled shape."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(demo[0].logits(tokens)[0], axis=-1))

    def of(ids):
        padded = np.zeros((1, 64), np.int32)  # no token looks to its right
        padded[0, : len(ids)] = ids
        return np.asarray(run(padded))[: len(ids)]

    return of


def log_likelihood(demo, logps, context, continuation):
    tokenizer = demo[1]
    ids, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    assert whole[: len(ids)] == ids
    logp = logps(whole)[len(ids) - 1 : -1]
    rest = whole[len(ids) :]
    return logp[np.arange(len(rest)), rest].sum(), bool((logp.argmax(-1) == rest).all())


def test_log_likelihoods_and_answers_are_those_of_the_model_itself(demo, logps, results):
    samples = sorted(results["samples"]["sums_choice"], key=lambda s: s["doc_id"])
    right = 0
    for sample, doc in zip(samples, DOCUMENTS, strict=True):
        asked = [tuple(pair) for pair in sample["arguments"]]
        question = demo[1].render(f"What is {doc['question']}?")
        assert asked == [(question, choice) for choice in doc["choices"]]
        # As lm-eval does: space at the end of a context belongs to its continuation.
        pairs = [(question.rstrip(), f"\n{choice}") for choice in doc["choices"]]
        expected = [log_likelihood(demo, logps, *pair) for pair in pairs]
        found = [r[0] for r in sample["resps"]]
        np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4)
        assert [f[1] for f in found] == [e[1] for e in expected]
        right += int(np.argmax([e[0] for e in expected])) == doc["gold"]
    assert results["results"]["sums_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))


def test_texts_end_at_the_stop_string_and_are_those_of_greedy_decoding(demo, logps, results):
    tokenizer = demo[1]
    samples = sorted(results["samples"]["sums_worked"], key=lambda s: s["doc_id"])
    for sample, doc in zip(samples, DOCUMENTS, strict=True):
        (text,) = sample["resps"][0]
        assert "\n" not in text
        ids, said = tokenizer.encode_prompt(f"What is {doc['question']}?"), []
        for _ in range(24):
            said.append(int(logps([*ids, *said])[-1].argmax()))
            if said[-1] in tokenizer.eos_ids or "\n" in tokenizer.decode(said):
                break
        assert text == tokenizer.decode(said).split("\n")[0]


def test_whole_texts_are_scored_from_their_first_token_on(demo, logps, results):
    tokenizer = demo[1]
    samples = sorted(results["samples"]["sums_text"], key=lambda s: s["doc_id"])
    for sample, doc in zip(samples, DOCUMENTS, strict=True):
        ids = tokenizer.encode(f"{doc['question']}={doc['choices'][doc['gold']]}")
        logp = logps([tokenizer.eos_ids[0], *ids])
        expected = logp[np.arange(len(ids)), ids].sum()
        assert sample["resps"][0][0] == pytest.approx(expected, rel=1e-4)


def test_longer_texts_are_scored_in_windows_each_token_once(demo, logps):
    from gspo_jax.evaluation.harness import Harness

    harness = Harness(demo[2], max_length=8, overrides=["mesh.data=1"])
    text = "47+25=72 and 72-18=54"
    ids = [harness.prefix_token_id, *harness.tok_encode(text)]
    expected = 0.0
    # Windows of 8 inputs: the first predicts 8 tokens; a later one predicts its last tokens, with
    # all 8 inputs before them.
    predicted = 0
    while predicted < len(ids) - 1:
        count = min(8, len(ids) - 1 - predicted)
        end = predicted + count
        window = ids[max(end - 8, 0) : end]
        logp = logps(window)[-count:]
        expected += logp[np.arange(count), ids[predicted + 1 : end + 1]].sum()
        predicted = end

    class Request:
        args = (text,)

    assert harness.loglikelihood_rolling([Request]) == [pytest.approx(expected, rel=1e-4)]


def test_every_metric_is_printed_with_n_and_an_interval(results, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import harness

    rows = {(task, metric): row for task, metric, *row in harness.rows(results)}
    value, low, high, n = rows["sums_choice", "acc"]
    assert n == len(DOCUMENTS) and 0 <= low < value < high <= 1
    value, low, high, n = rows["sums_text", "bits_per_byte"]
    assert n == len(DOCUMENTS) and value > 0 and np.isnan(low)  # lm-eval has none for it
    assert set(rows) == set(zip(TASKS, ("acc", "exact_match", "bits_per_byte"), strict=True))
    sys.modules.pop("harness", None)


def test_a_chat_is_written_with_the_models_template(demo):
    from gspo_jax.errors import ConfigError
    from gspo_jax.evaluation.harness import Harness

    harness = Harness(demo[2], overrides=["mesh.data=1"])
    chat = [{"role": "user", "content": "What is 1+1?"}]
    assert harness.apply_chat_template(chat) == demo[1].render("What is 1+1?")
    with pytest.raises(ConfigError, match="gen_prefix"):
        harness.apply_chat_template(chat, add_generation_prompt=False)


def test_a_missing_package_or_directory_is_one_line(demo, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import harness

    assert harness.main(["--model_path", "nowhere", "--tasks", "x"]) == 3
    monkeypatch.delitem(sys.modules, "gspo_jax.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert harness.main(["--model_path", demo[2], "--tasks", "x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and lines[1].endswith("pip install 'gspo_jax[lm-eval]'.")
    sys.modules.pop("harness", None)
