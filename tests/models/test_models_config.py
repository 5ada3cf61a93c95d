"""What config.json may say, and what is refused."""

import dataclasses

import pytest

from gspo_jax.errors import DataError
from gspo_jax.models.config import ExpertsConfig, QwenConfig

# As published with DeepSeek-R1-Distill-Qwen-1.5B (older keys) ...
R1_DISTILL = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# ... and a Qwen3 of 0.6 B, in the form that transformers 5 writes.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# As published with Qwen3-30B-A3B.
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def test_published_qwen2_with_the_keys_of_transformers_4():
    assert QwenConfig.from_hf(R1_DISTILL) == QwenConfig(
        family="qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,  # 1536 / 12
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        qkv_bias=True,
        qk_norm=False,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


def test_published_qwen3_with_the_keys_of_transformers_5():
    assert QwenConfig.from_hf(QWEN3) == QwenConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,  # given: 1024 / 16 would be 64
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        qkv_bias=False,
        qk_norm=True,
        max_position_embeddings=40960,
        dtype="bfloat16",
    )


def test_published_mixture_of_experts():
    config = QwenConfig.from_hf(QWEN3_MOE)
    assert config.experts == ExpertsConfig(count=128, per_token=8, size=768, normalise=True)
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, 128)
    assert all(config.is_sparse(layer) for layer in range(48))
    # transformers 5 writes the number of experts under another name.
    renamed = without(QWEN3_MOE, "num_experts") | {"num_local_experts": 128}
    assert QwenConfig.from_hf(renamed) == config


def test_which_layers_have_experts():
    """As in transformers: layer i where (i + 1) % step == 0, less the layers named dense."""
    config = QwenConfig.from_hf(QWEN3_MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [5, 6]})
    assert [i for i in range(12) if config.is_sparse(i)] == [2, 8, 11]
    assert not QwenConfig.from_hf(QWEN3).is_sparse(0)


def test_head_dim_of_a_mixture_is_derived_unless_given():
    assert QwenConfig.from_hf(without(QWEN3_MOE, "head_dim")).head_dim == 64  # 2048 / 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts": 10**6}, "num_experts=1000000: wanted 1 to 32767"),
        ({"num_local_experts": 64}, "num_experts=128, num_local_experts=64"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok=200 is more than num_experts=128"),
        ({"moe_intermediate_size": "768"}, "moe_intermediate_size='768': wanted an integer"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0: wanted 1 to"),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3: wanted a list"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers has 48; wanted layers from 0 to 47"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1: wanted one of False, True"),
        ({"attention_bias": True}, "attention_bias=True is not implemented for qwen3_moe"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            "use_sliding_window=true is not implemented for qwen3_moe",
        ),
    ],
)
def test_impossible_experts_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        QwenConfig.from_hf(QWEN3_MOE | change)


def test_experts_belong_to_the_family_that_has_them():
    settings = {f: getattr(QwenConfig.from_hf(QWEN3), f) for f in QwenConfig.__dataclass_fields__}
    with pytest.raises(DataError, match="model_type qwen3 and experts"):
        QwenConfig(**settings | {"experts": ExpertsConfig(count=2, per_token=1, size=8)})
    with pytest.raises(DataError, match="model_type qwen3_moe and experts=None"):
        QwenConfig(**settings | {"family": "qwen3_moe"})


def test_qwen3_head_dim_is_128_unless_given_and_never_derived():
    assert QwenConfig.from_hf(without(QWEN3, "head_dim")).head_dim == 128
    assert QwenConfig.from_hf(QWEN3 | {"head_dim": 96}).head_dim == 96


def test_qwen2_head_dim_is_derived_unless_given():
    assert QwenConfig.from_hf(R1_DISTILL | {"num_attention_heads": 24}).head_dim == 64
    assert QwenConfig.from_hf(R1_DISTILL | {"head_dim": 32}).head_dim == 32


def test_without_kv_heads_every_query_head_has_its_own():
    assert QwenConfig.from_hf(without(R1_DISTILL, "num_key_value_heads")).num_kv_heads == 12


def test_without_a_dtype_float32_is_assumed():
    assert QwenConfig.from_hf(without(R1_DISTILL, "torch_dtype")).dtype == "float32"
    assert QwenConfig.from_hf(QWEN3 | {"dtype": "torch.float16"}).dtype == "float16"


def test_rope_scaling_that_scales_nothing_is_accepted():
    plain = QwenConfig.from_hf(R1_DISTILL)
    assert QwenConfig.from_hf(R1_DISTILL | {"rope_scaling": None}) == plain
    assert QwenConfig.from_hf(R1_DISTILL | {"rope_scaling": {"type": "default"}}) == plain


def test_a_sliding_window_that_no_layer_uses_is_accepted():
    plain = QwenConfig.from_hf(R1_DISTILL)
    unused = {"use_sliding_window": True, "max_window_layers": 28}
    assert QwenConfig.from_hf(R1_DISTILL | unused) == plain
    null = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
    assert QwenConfig.from_hf(R1_DISTILL | null) == plain
    # layer_types, the newer key, has the last word.
    full = {"use_sliding_window": True, "layer_types": ["full_attention"] * 28}
    assert QwenConfig.from_hf(R1_DISTILL | full) == plain


@pytest.mark.parametrize("hf", [R1_DISTILL, QWEN3 | {"sliding_window": 4096}])
def test_windows_from_a_layer_on_have_an_older_and_a_newer_form(hf):
    older = without(hf, "layer_types") | {"use_sliding_window": True, "max_window_layers": 21}
    kinds = ["full_attention"] * 21 + ["sliding_attention"] * 7
    newer = without(hf, "max_window_layers") | {"use_sliding_window": True, "layer_types": kinds}
    config = QwenConfig.from_hf(older)
    assert (config.sliding_window, config.window_layers) == (4096, tuple(range(21, 28)))
    assert QwenConfig.from_hf(newer) == config
    written = config.to_hf()
    for key, value in (older | newer).items():
        if "window" in key or key == "layer_types":
            assert written[key] == value, key
    assert QwenConfig.from_hf(without(written, "layer_types")) == config
    assert QwenConfig.from_hf(without(written, "max_window_layers")) == config


def test_windows_of_any_layers_are_read_and_written():
    kinds = ["sliding_attention", "full_attention"] * 14
    hf = QWEN3 | {"use_sliding_window": True, "sliding_window": 128, "layer_types": kinds}
    config = QwenConfig.from_hf(hf)
    assert config.window_layers == tuple(range(0, 28, 2))
    assert config.to_hf()["layer_types"] == kinds
    assert QwenConfig.from_hf(config.to_hf()) == config


def test_the_defaults_of_windows_are_those_of_transformers():
    hf = without(R1_DISTILL, "sliding_window", "max_window_layers") | {"num_hidden_layers": 30}
    config = QwenConfig.from_hf(hf | {"use_sliding_window": True})
    assert (config.sliding_window, config.window_layers) == (4096, (28, 29))


def test_unknown_keys_and_remote_code_are_ignored():
    extra = {"auto_map": {"AutoModel": "evil.Model"}, "pretraining_tp": 1, "some_new_key": [1]}
    assert QwenConfig.from_hf(R1_DISTILL | extra) == QwenConfig.from_hf(R1_DISTILL)


@pytest.mark.parametrize("hf", [R1_DISTILL, QWEN3, QWEN3_MOE, R1_DISTILL | {"head_dim": 32}])
def test_what_is_written_reads_back_as_the_same(hf):
    config = QwenConfig.from_hf(hf)
    assert QwenConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("hf", [R1_DISTILL, QWEN3, QWEN3_MOE])
def test_both_generations_of_readers_find_their_keys(hf):
    written = QwenConfig.from_hf(hf).to_hf()
    theta = float(hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"])
    assert written["rope_theta"] == theta
    assert written["rope_parameters"] == {"rope_theta": theta, "rope_type": "default"}
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["architectures"] == hf["architectures"]
    for key in set(hf) & set(written) - {"rope_parameters", "torch_dtype", "dtype"}:
        assert written[key] == hf[key], key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama': wanted one of 'qwen2', 'qwen3'"),
        ({"model_type": None}, "model_type=None: wanted one of"),
        ({"model_type": ["qwen2"]}, r"model_type=\[...\]: wanted one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; wanted 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={...} is not implemented"),
        ({"is_causal": False}, "is_causal=False is not implemented"),
        ({"attention_bias": False}, "attention_bias=False is not implemented for qwen2"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000, but .*=500000.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': wanted an object"),
        ({"use_sliding_window": "yes"}, "use_sliding_window='yes': wanted one of"),
        (
            {"use_sliding_window": True, "sliding_window": 0},
            "sliding_window=0: wanted 1 to",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 4096.0},
            "sliding_window=4096.0: wanted an integer",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers=-1: wanted an integer from 0 on",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": None},
            "max_window_layers=None: wanted an integer",
        ),
        ({"layer_types": ["full_attention"] * 27}, "layer_types=.*wanted a list of 28"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention': wanted a list of 28"),
        (
            {"layer_types": ["full_attention"] * 27 + ["linear_attention"]},
            "layer_types='linear_attention': wanted one of 'full_attention', 'sliding_attention'",
        ),
        (
            {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
            "layer_types has 'sliding_attention', but use_sliding_window=False with .*=4096",
        ),
        (
            {
                "layer_types": ["sliding_attention"] * 28,
                "use_sliding_window": True,
                "sliding_window": None,
            },
            "layer_types has 'sliding_attention', but use_sliding_window=True with .*=None",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': wanted one of False, True"),
        ({"torch_dtype": "int8"}, "dtype='int8': wanted one of 'float32'"),
        ({"torch_dtype": 16}, "dtype=16: wanted one of"),
    ],
)
def test_other_mathematics_is_refused_by_name(change, message):
    with pytest.raises(DataError, match=message):
        QwenConfig.from_hf(R1_DISTILL | change)


def test_qwen3_with_a_bias_on_the_output_projection_is_refused():
    with pytest.raises(DataError, match="attention_bias=True is not implemented for qwen3"):
        QwenConfig.from_hf(QWEN3 | {"attention_bias": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: wanted 1 to 1000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: wanted 1 to"),
        ({"hidden_size": -1536}, "hidden_size=-1536: wanted 1 to"),
        ({"hidden_size": "1536"}, "hidden_size='1536': wanted an integer"),
        ({"hidden_size": 1536.0}, "hidden_size=1536.0: wanted an integer"),
        ({"hidden_size": True}, "hidden_size=True: wanted an integer"),
        ({"hidden_size": 1540}, "hidden_size=1540 does not split into num_attention_heads=12"),
        ({"vocab_size": 10**30}, "vocab_size=10+.*: wanted 1 to"),
        ({"intermediate_size": [8960]}, r"intermediate_size=\[...\]: wanted an integer"),
        ({"num_key_value_heads": 5}, "num_attention_heads=12 is not a multiple of .*=5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: wanted 1 to"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06: wanted a number between 0 and 1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': wanted a number"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: wanted a number"),
        ({"rope_theta": 10**400}, "rope_theta=10+...: wanted a number"),
        ({"hidden_size": "x" * 10_000}, "hidden_size='x{59}...: wanted"),
    ],
)
def test_impossible_sizes_are_refused_before_any_allocation(change, message):
    with pytest.raises(DataError, match=message) as refusal:
        QwenConfig.from_hf(R1_DISTILL | change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key):
    with pytest.raises(DataError, match=f"{key} is missing; wanted an integer"):
        QwenConfig.from_hf(without(R1_DISTILL, key))


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(DataError, match="wanted an object, got a list"):
        QwenConfig.from_hf([R1_DISTILL])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 5}, r"window_layers=\(\): wanted ascending layers below 28"),
        ({"sliding_window": 5, "window_layers": (28,)}, r"window_layers=\(28,\): wanted"),
        ({"sliding_window": 5, "window_layers": (2, 1)}, r"window_layers=\(2, 1\): wanted asc"),
        ({"window_layers": (1,)}, "sliding_window is missing; wanted an integer"),
    ],
)
def test_windows_without_layers_and_layers_without_windows_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(QwenConfig.from_hf(QWEN3), **change)


def test_biases_and_norms_that_the_family_does_not_have_are_refused():
    settings = {f: getattr(QwenConfig.from_hf(QWEN3), f) for f in QwenConfig.__dataclass_fields__}
    with pytest.raises(DataError, match="qkv_bias=True with qk_norm=True"):
        QwenConfig(**settings | {"qkv_bias": True})
