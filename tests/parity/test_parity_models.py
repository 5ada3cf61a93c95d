"""Live against transformers and torch: fresh random models, other shapes than the fixtures'.

torch is imported inside the tests, so that a machine without it can still collect this file.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspo_jax.algo.logps import token_logps
from gspo_jax.models import load_model, save_model
from gspo_jax.models.moe import balance
from gspo_jax.models.rope import inverse_frequencies, read_rope
from gspo_jax.rollout.engine import generate

pytestmark = pytest.mark.parity

SHAPE = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
MODELS = {
    "qwen2_grouped_by_3": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen2_ungrouped_untied": {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3_wide_heads_grouped_by_4": {
        "model_type": "qwen3",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3_default_head_dim": {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-4,
        "tie_word_embeddings": True,
    },
    # Positions and windows that act within the 30 tokens of a text.
    "qwen2_yarn": {
        "model_type": "qwen2",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 10,
        },
        "max_position_embeddings": 40,
        "tie_word_embeddings": True,
    },
    "qwen2_linear_and_windows_of_the_last_layers": {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
    "qwen3_yarn_with_every_key_and_windows_of_outer_layers": {
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 3.0,
            "original_max_position_embeddings": 12,
            "beta_fast": 3.0,
            "beta_slow": 0.1,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 36,
        "tie_word_embeddings": False,
    },
    "qwen3_attention_factor": {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "attention_factor": 0.6,
            "original_max_position_embeddings": 16384,
        },
        "tie_word_embeddings": True,
    },
    "qwen3_moe_every_second_layer": {
        "model_type": "qwen3_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": False,
    },
    "qwen3_moe_yarn_but_one_layer": {
        "model_type": "qwen3_moe",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 16,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 10,
        },
        "max_position_embeddings": 40,
        "tie_word_embeddings": True,
    },
}
LENGTHS, S, NEW = (14, 9, 2), 14, 16


def make(name, seed, directory):
    """A random model of transformers, and the same in ours through a directory."""
    from fixtures.make_fixtures import random_model

    theirs = random_model({**SHAPE, **MODELS[name]}, seed)
    theirs.save_pretrained(directory)
    return theirs, load_model(directory)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    return make(request.param, 7, tmp_path_factory.mktemp("model"))


@pytest.fixture
def batch():
    """Right-padded tokens and their mask."""
    mask = np.arange(S) < np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(3).integers(1, SHAPE["vocab_size"], mask.shape)
    return np.where(mask, tokens, 0).astype(np.int32), mask


@nnx.jit
def forward(model, tokens, mask):
    return model.logits(tokens, mask=mask)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_agree_on_padded_batches(pair, batch, side):
    from fixtures.make_fixtures import left_padded, reference_logits

    theirs, ours = pair
    tokens, mask = batch
    if side == "left":
        tokens, mask = left_padded(tokens, np.array(LENGTHS)), np.flip(mask, 1).copy()
    expected = reference_logits(theirs, tokens, mask)
    got = np.asarray(forward(ours, jnp.array(tokens), jnp.array(mask)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4, rtol=0)


def test_our_export_loads_in_transformers_with_the_same_logits(pair, batch, tmp_path):
    import torch
    from fixtures.make_fixtures import reference_logits
    from transformers import AutoModelForCausalLM

    theirs, ours = pair
    save_model(ours, tmp_path / "out", shard_bytes=40_000)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    tokens, mask = batch
    np.testing.assert_array_equal(
        reference_logits(again.eval(), tokens, mask), reference_logits(theirs, tokens, mask)
    )


def test_greedy_tokens_agree(pair, batch):
    from fixtures.make_fixtures import leads, reference_greedy

    theirs, ours = pair
    prompt = batch[0][0]
    expected = reference_greedy(theirs, prompt, NEW)
    # A tie would be decided by rounding: compare up to the first close call.
    close = np.flatnonzero(leads(theirs, prompt, expected) < 1e-3)
    sure = close[0] if close.size else NEW
    assert sure >= 8
    text = np.pad(prompt, (0, NEW))[None]
    for position in range(S, S + NEW):
        logits = forward(ours, jnp.array(text), jnp.ones(text.shape, bool))
        text[0, position] = np.asarray(logits)[0, position - 1].argmax()
    np.testing.assert_array_equal(text[0, S : S + sure], expected[:sure])


def test_generate_agrees_with_transformers_on_our_export(pair, batch, tmp_path):
    """Greedy, from prompts of unequal length, with the second token of the answer as EOS."""
    import torch
    from fixtures.make_fixtures import leads
    from transformers import AutoModelForCausalLM

    save_model(pair[1], tmp_path / "out", token_ids={"eos_token_id": [5, 7], "pad_token_id": 0})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert theirs.generation_config.eos_token_id == [5, 7]
    ours = load_model(tmp_path / "out")
    prompts = [row[:length].tolist() for row, length in zip(batch[0], LENGTHS, strict=True)]

    def greedy(eos_ids):
        completions = generate(
            ours,
            prompts,
            max_new_tokens=NEW,
            temperature=0.0,
            eos_ids=eos_ids,
            key=jax.random.key(0),
        )
        rows = zip(completions.tokens, completions.mask, strict=True)
        return [row[mask].tolist() for row, mask in rows]

    free = greedy([SHAPE["vocab_size"] + 1])  # which no row can reach
    ends = sorted({row[1] for row in free})
    for eos_ids, expected in ((None, free), (ends, greedy(ends))):
        for prompt, row in zip(prompts, expected, strict=True):
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=-1 if eos_ids is None else eos_ids,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            close = np.flatnonzero(leads(theirs, np.array(prompt), np.array(out)) < 1e-3)
            sure = close[0] if close.size else len(out)
            assert row[:sure] == out[:sure] and (close.size or len(row) == len(out))
            assert sure >= min(8, len(out))
    assert all(len(row) <= 2 for row in greedy(ends))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_grouped_by_3",
        "qwen2_linear_and_windows_of_the_last_layers",
        "qwen3_wide_heads_grouped_by_4",
        "qwen3_yarn_with_every_key_and_windows_of_outer_layers",
        "qwen3_moe_every_second_layer",
        "qwen3_moe_yarn_but_one_layer",
    ],
)
def test_gradients_of_the_mean_log_probability_agree(name, batch, tmp_path):
    """Through logps on our side, through a dense log-softmax on theirs; 1e-4 of the norm."""
    import torch

    theirs, ours = make(name, 7, tmp_path / "model")
    tokens = batch[0][:1]  # the row without padding

    out = theirs(input_ids=torch.tensor(tokens, dtype=torch.int64)).logits[:, :-1]
    target = torch.tensor(tokens[:, 1:], dtype=torch.int64)
    torch.log_softmax(out, -1).gather(-1, target[..., None]).mean().backward()
    expected = {key: p.grad.numpy() for key, p in theirs.named_parameters() if p.grad is not None}
    for key in [key for key in expected if ".experts." in key]:  # of one array, one per expert
        stem, _, kind = key.rpartition(".")
        for e, value in enumerate(expected.pop(key)):
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for name_, half in zip(names, np.split(value, len(names)), strict=True):
                expected[f"{stem}.{e}.{name_}.weight"] = half

    graphdef, params = nnx.split(ours)

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graphdef, params)
        hidden = model(jnp.array(tokens))[:, :-1]
        logp, _ = token_logps(hidden, model.unembed(), jnp.array(tokens[:, 1:]))
        return jnp.mean(logp)

    # The exporter's own table gives the gradients their names.
    save_model(nnx.merge(graphdef, gradient(params)), tmp_path / "gradient")
    from safetensors.numpy import load_file

    got = load_file(tmp_path / "gradient" / "model.safetensors")
    assert set(got) == set(expected)
    for key, value in expected.items():
        if not value.any():  # an expert that no token chose; a router with a single gate of 1
            assert np.abs(got[key]).max() < 1e-6, key
            continue
        error = np.linalg.norm(got[key] - value) / np.linalg.norm(value)
        assert error < 1e-4, (key, error)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transformers_reads_the_dtype_that_we_wrote(dtype, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    theirs, _ = make("qwen3_default_head_dim", 7, tmp_path / "float32")
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    save_model(load_model(tmp_path / "half"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_transformers_understands_every_key_of_our_config(name, tmp_path):
    from transformers import AutoConfig

    _, model = make(name, 7, tmp_path / "model")
    save_model(model, tmp_path / "out")
    theirs, ours = (AutoConfig.from_pretrained(tmp_path / name) for name in ("model", "out"))
    ignored = {"architectures", "transformers_version"}
    if model.config.sliding_window is None or "outer" in name:
        ignored.add("max_window_layers")  # layer_types says it all
    for key in json.loads((tmp_path / "model" / "config.json").read_text()):
        if key not in ignored:
            assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("head_dim", [8, 24, 80, 128])
@pytest.mark.parametrize("theta", [500.0, 1000000.0])
def test_frequencies_agree_to_the_last_bits(head_dim, theta):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for rope in (
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 2.5},  # of a length that is taken from elsewhere
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 5000},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 0, "beta_slow": 0, "mscale": 0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 10**9},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 9.0, "truncate": False, "mscale": 0.7},
        {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    ):
        hf = {"rope_theta": theta, "max_position_embeddings": 65536}
        theirs = AutoConfig.for_model("qwen3", head_dim=head_dim, rope_scaling={**rope}, **hf)
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
        got, got_factor = inverse_frequencies(head_dim, *read_rope({**hf, "rope_scaling": rope}))
        # torch's own power is off by a last bit in one of a few hundred.
        np.testing.assert_array_max_ulp(got, frequencies.numpy(), maxulp=2)
        assert np.mean(got == frequencies.numpy()) > 0.95
        assert got_factor == factor


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_bfloat16_is_as_close_to_the_truth_as_transformers(family, tmp_path):
    """The truth: transformers in float32, of the same weights rounded to bfloat16.

    Over all logits of 8 models, the root mean square of our error is at most 1.2 times
    transformers' own, and so is its 99.9th percentile; for one model alone, the former.
    """
    import torch
    from fixtures.make_fixtures import random_model
    from transformers import AutoModelForCausalLM

    shape = {**SHAPE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"model_type": family, **shape, "head_dim": 16, "rope_theta": 1000000.0}
    if family == "qwen3_moe":
        settings |= {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    errors = []  # [models, (ours, theirs), logits]
    for seed in range(8):
        model = random_model(settings, seed).to(torch.bfloat16)
        model.save_pretrained(tmp_path / str(seed))
        tokens = np.random.default_rng(seed).integers(0, shape["vocab_size"], (4, 64))
        ours = forward(load_model(tmp_path / str(seed), dtype="bfloat16"), tokens, tokens >= 0)
        truth, theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), dtype=dtype)(
                torch.tensor(tokens)
            )
            .logits.detach()
            .float()
            .numpy()
            for dtype in (torch.float32, torch.bfloat16)
        )
        errors.append([np.abs(np.asarray(ours) - truth), np.abs(theirs - truth)])
    error = np.array(errors).reshape(8, 2, -1)
    rms = np.sqrt(np.mean(error**2, axis=-1))
    largest = np.quantile(error, 0.999, axis=(0, 2))
    assert np.all(rms[:, 0] < 1.2 * rms[:, 1])
    assert largest[0] < 1.2 * largest[1]


def test_the_load_balancing_loss_is_that_of_transformers_layer_by_layer(tmp_path):
    """Theirs takes all layers at once; of one layer at a time the two are the same."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    theirs, ours = make("qwen3_moe_every_second_layer", 7, tmp_path / "model")
    mask = np.arange(S) < np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(3).integers(1, SHAPE["vocab_size"], mask.shape)
    out = theirs(input_ids=torch.tensor(tokens), output_router_logits=True)
    layers = [
        load_balancing_loss_func((logits,), 8, 3, torch.tensor(mask)).item()
        for logits in out.router_logits
    ]
    _, routing = ours.routed(jnp.asarray(tokens, jnp.int32), counted=jnp.asarray(mask))
    aux, _, _ = balance(routing, jnp.asarray(mask))
    np.testing.assert_allclose(aux, np.mean(layers), rtol=1e-5)
