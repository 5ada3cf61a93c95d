"""The shape of a Qwen-family model, read from and written to a Hugging Face `config.json`.

Whatever would change the mathematics and is not implemented is refused by name. A key that
changes nothing for these families is ignored.
"""

from dataclasses import dataclass
from typing import Any

from gspo_jax.errors import DataError

# model_type -> its architecture's name.
FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DTYPES = ("float32", "float16", "bfloat16")

# Our name -> (the key in config.json, the largest value that we believe). The limits are far
# above every published model: they stop a lying file before anything is allocated for it.
SIZES = {
    "vocab_size": ("vocab_size", 2**22),
    "hidden_size": ("hidden_size", 2**17),
    "intermediate_size": ("intermediate_size", 2**19),
    "num_layers": ("num_hidden_layers", 1000),
    "num_heads": ("num_attention_heads", 2**12),
    "num_kv_heads": ("num_key_value_heads", 2**12),
    "head_dim": ("head_dim", 2**12),
    "max_position_embeddings": ("max_position_embeddings", 2**30),
}

# The same of a mixture of experts. transformers 5 writes num_local_experts.
EXPERT_SIZES = {
    "count": ("num_experts", 2**15 - 1),  # ids are kept as int16
    "per_token": ("num_experts_per_tok", 2**10),
    "size": ("moe_intermediate_size", 2**19),
    "step": ("decoder_sparse_step", 1000),
}

# Key -> the values under which it changes nothing; any other value is refused.
NEUTRAL = {
    "hidden_act": ("silu",),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "is_causal": (None, True),
    "use_mrope": (None, False),
    "use_bidirectional_attention": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that takes the place of a layer's MLP.

    Attributes:
        count: E experts.
        per_token: X of them serve a token.
        size: F of one expert.
        normalise: the X gates of a token are scaled to sum to 1.
        step: every step-th layer has experts, the first of them layer step - 1 (from 0).
        dense_layers: layers that have a plain MLP all the same.
    """

    count: int
    per_token: int
    size: int
    normalise: bool = False
    step: int = 1
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """Everything that fixes the parameter shapes and the mathematics of a Qwen model.

    Attributes:
        family: "qwen2" (also Qwen2.5 and its distillates), "qwen3" or "qwen3_moe".
        vocab_size: V, rows of the embedding; often more than the tokenizer has tokens.
        hidden_size: D.
        intermediate_size: F, the width of the gated MLP.
        num_layers: L.
        num_heads: N query heads.
        num_kv_heads: K key/value heads; divides N.
        head_dim: H; even, and not always D / N.
        rope_theta: base of the rotary position frequencies.
        rms_norm_eps: added to the mean square inside every norm.
        tie_word_embeddings: the unembedding is the embedding transposed.
        qkv_bias: biases on the q, k and v projections (Qwen2).
        qk_norm: an RMS norm over each head's query and key (Qwen3).
        max_position_embeddings: the longest sequence the model was made for.
        dtype: of the weight files: "float32", "float16" or "bfloat16".
        experts: the mixture of experts of qwen3_moe; None elsewhere.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int = 32768
    dtype: str = "float32"
    experts: ExpertsConfig | None = None

    def __post_init__(self):
        _check(vars(self))

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer (from 0) has experts."""
        e = self.experts
        return e is not None and layer not in e.dense_layers and (layer + 1) % e.step == 0

    @classmethod
    def from_hf(cls, hf: Any) -> "QwenConfig":
        """Read the content of a `config.json`, in the form of transformers 4 or 5.

        Raises:
            DataError: a key is missing, impossible, or asks for what is not implemented.
        """
        if not isinstance(hf, dict):
            raise DataError(f"wanted an object, got a {type(hf).__name__}.")
        family: Any = hf.get("model_type")
        _one_of("model_type", family, tuple(FAMILIES))
        _refuse_unimplemented(hf, family)
        settings: dict[str, Any] = {name: hf.get(key) for name, (key, _) in SIZES.items()}
        settings |= {
            "family": family,
            "num_kv_heads": _either(settings["num_kv_heads"], settings["num_heads"]),
            "head_dim": _either(settings["head_dim"], _default_head_dim(hf, family)),
            "max_position_embeddings": hf.get("max_position_embeddings", 32768),
            "rope_theta": _rope_theta(hf),
            "rms_norm_eps": _as_float(hf.get("rms_norm_eps", 1e-6)),
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
            "qkv_bias": family == "qwen2",
            "qk_norm": family != "qwen2",
            "dtype": _dtype(hf),
            "experts": _experts(hf) if family == "qwen3_moe" else None,
        }
        _check(settings)
        return cls(**settings)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 both read.

        The position base and the dtype are written under their old and their new keys.
        """
        hf = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            **{key: getattr(self, name) for name, (key, _) in SIZES.items()},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        if self.experts is not None:
            e = self.experts
            hf |= {key: getattr(e, name) for name, (key, _) in EXPERT_SIZES.items()}
            hf |= {"norm_topk_prob": e.normalise, "mlp_only_layers": list(e.dense_layers)}
        if self.family != "qwen2":
            hf["attention_bias"] = False
        elif self.head_dim * self.num_heads == self.hidden_size:
            del hf["head_dim"]  # Qwen2 directories do not have the key
        return hf


def _check(settings: dict[str, Any]) -> None:
    """Raise unless these are fields of a `QwenConfig`: each of its type, and possible together."""
    c = settings
    _one_of("model_type", c["family"], tuple(FAMILIES))
    _one_of("dtype", c["dtype"], DTYPES)
    for name, (key, limit) in SIZES.items():
        _check_size(key, c[name], limit)
    for name in ("tie_word_embeddings", "qkv_bias", "qk_norm"):
        _one_of(name, c[name], (False, True))
    _check_number("rope_theta", c["rope_theta"], high=1e15)
    _check_number("rms_norm_eps", c["rms_norm_eps"], high=1.0)
    if c["num_heads"] % c["num_kv_heads"]:
        raise DataError(
            f"num_attention_heads={c['num_heads']} is not a multiple of "
            f"num_key_value_heads={c['num_kv_heads']}; each key/value head serves equally many "
            "query heads."
        )
    if c["head_dim"] % 2:
        raise DataError(f"head_dim={c['head_dim']} is odd; rotary positions turn pairs.")
    if (c["qkv_bias"], c["qk_norm"]) != (c["family"] == "qwen2", c["family"] != "qwen2"):
        raise DataError(
            f"qkv_bias={c['qkv_bias']} with qk_norm={c['qk_norm']}: qwen2 has the biases and no "
            f"norms, qwen3 the norms and no biases; model_type is {c['family']}."
        )
    if (c.get("experts") is not None) != (c["family"] == "qwen3_moe"):
        raise DataError(f"model_type {c['family']} and experts={c.get('experts')}: not a pair.")
    if c.get("experts") is not None:
        _check_experts(vars(c["experts"]), c["num_layers"])


def _experts(hf: dict[str, Any]) -> ExpertsConfig:
    """The mixture of experts that `config.json` describes, checked by `_check_experts`."""
    found: dict[str, Any] = {name: hf.get(key) for name, (key, _) in EXPERT_SIZES.items()}
    local = hf.get("num_local_experts")
    if found["count"] is not None and local not in (None, found["count"]):
        raise DataError(f"num_experts={_short(found['count'])}, num_local_experts={_short(local)}.")
    found["count"] = _either(found["count"], local)
    found["step"] = _either(found["step"], 1)
    dense = _either(hf.get("mlp_only_layers"), [])
    if not isinstance(dense, list):
        raise DataError(f"mlp_only_layers={_short(dense)}: wanted a list of layer numbers.")
    found |= {"normalise": hf.get("norm_topk_prob", False), "dense_layers": tuple(dense)}
    _check_experts(found, hf.get("num_hidden_layers"))
    return ExpertsConfig(**found)


def _check_experts(e: dict[str, Any], num_layers: Any) -> None:
    """Raise unless these are fields of an `ExpertsConfig` for this many layers."""
    _check_size("num_hidden_layers", num_layers, SIZES["num_layers"][1])
    for name, (key, limit) in EXPERT_SIZES.items():
        _check_size(key, e[name], limit)
    _one_of("norm_topk_prob", e["normalise"], (False, True))
    if e["per_token"] > e["count"]:
        raise DataError(
            f"num_experts_per_tok={e['per_token']} is more than num_experts={e['count']}."
        )
    for layer in e["dense_layers"]:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise DataError(
                f"mlp_only_layers has {_short(layer)}; wanted layers from 0 to {num_layers - 1}."
            )


def _refuse_unimplemented(hf: dict[str, Any], family: str) -> None:
    """Raise on the first setting that asks for other mathematics than ours."""
    for key, allowed in NEUTRAL.items():
        if key in hf and hf[key] not in allowed:
            raise DataError(f"{key}={_short(hf[key])} is not implemented; wanted {allowed[-1]!r}.")
    # transformers gives Qwen2 its three biases whatever the key says, and Qwen3 with
    # attention_bias a fourth one, on the output projection.
    bias = hf.get("attention_bias")
    if bias is not None and bias is not (family == "qwen2"):
        raise DataError(f"attention_bias={_short(bias)} is not implemented for {family}.")
    _refuse_windows(hf)


def _refuse_windows(hf: dict[str, Any]) -> None:
    """Refuse attention windows, if any layer has one; most configs carry unused settings."""
    layers, kinds = hf.get("num_hidden_layers"), hf.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise DataError(f"layer_types={_short(kinds)}: wanted a list of {layers} names.")
        other = [kind for kind in kinds if kind != "full_attention"]
        if other:
            raise DataError(
                f"layer_types has {_short(other[0])}; only full_attention is implemented."
            )
        return
    if hf.get("use_sliding_window") and hf.get("sliding_window", 4096) is not None:
        first = hf.get("max_window_layers", 28)
        if not isinstance(first, int) or not isinstance(layers, int) or first < layers:
            raise DataError(
                f"use_sliding_window=true from layer {_short(first)} on is not implemented; set it "
                f"to false if your sequences stay below {_short(hf.get('sliding_window', 4096))}."
            )


def _default_head_dim(hf: dict[str, Any], family: str) -> Any:
    """Without a `head_dim` key: 128 for dense Qwen3, hidden_size / num_attention_heads else."""
    if family == "qwen3":
        return 128
    for name in ("hidden_size", "num_heads"):
        key, limit = SIZES[name]
        _check_size(key, hf.get(key), limit)
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise DataError(
            f"hidden_size={hf['hidden_size']} does not split into "
            f"num_attention_heads={hf['num_attention_heads']}; fix one, or give head_dim."
        )
    return hf["hidden_size"] // hf["num_attention_heads"]


def _rope_theta(hf: dict[str, Any]) -> Any:
    """The position base, at the top level or in `rope_parameters`; other kinds are refused."""
    theta = hf.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise DataError(f"{key}={_short(rope)}: wanted an object.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise DataError(f"{key}.rope_type={_short(kind)} is not implemented; only default is.")
        extra = sorted(set(rope) - {"rope_theta", "rope_type", "type"})
        if extra:
            raise DataError(f"{key}.{extra[0][:40]} is not implemented; only rope_theta is.")
        inner = rope.get("rope_theta")
        if theta is not None and inner is not None and inner != theta:
            raise DataError(f"rope_theta={_short(theta)}, but {key}.rope_theta={_short(inner)}.")
        theta = _either(theta, inner)
    return _as_float(_either(theta, 10000.0))


def _dtype(hf: dict[str, Any]) -> Any:
    """`dtype` or the older `torch_dtype`; where neither is given the weight files decide."""
    dtype = _either(_either(hf.get("dtype"), hf.get("torch_dtype")), "float32")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def _check_size(key: str, value: Any, limit: int) -> None:
    if value is None:
        raise DataError(f"{key} is missing; wanted an integer.")
    if type(value) is not int:  # bool is an int, and "12" is neither
        raise DataError(f"{key}={_short(value)}: wanted an integer.")
    if not 1 <= value <= limit:
        raise DataError(f"{key}={_short(value)}: wanted 1 to {limit}.")


def _check_number(key: str, value: Any, *, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < high:  # NaN fails the comparison
        raise DataError(f"{key}={_short(value)}: wanted a number between 0 and {high:g}.")


def _one_of(key: str, value: Any, allowed: tuple) -> None:
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise DataError(f"{key}={_short(value)}: wanted one of {', '.join(map(repr, allowed))}.")


def _as_float(value: Any) -> Any:
    """JSON writes 1000000 for 1000000.0; what is no number is left for the check to refuse."""
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _short(value: Any) -> str:
    """`repr`, cut: a hostile file must not fill the screen."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
