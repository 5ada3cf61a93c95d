"""The shape of a Qwen-family model, read from and written to a Hugging Face `config.json`.

Whatever would change the mathematics and is not implemented is refused by name. A key that
changes nothing for these families is ignored.
"""

from dataclasses import dataclass
from typing import Any

from gspo_jax.errors import DataError
from gspo_jax.models.fields import as_float, check_number, check_size, either, one_of, short
from gspo_jax.models.rope import POSITIONS, RopeScaling, read_rope

# model_type -> its architecture's name.
FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("full_attention", "sliding_attention")  # of a layer; the second has the window

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
    "max_position_embeddings": ("max_position_embeddings", POSITIONS),
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
        rope_scaling: how positions are stretched to texts longer than trained on; None: not.
        sliding_window: tokens, the own one included, that each layer of `window_layers` looks
            back on; None where there is no such layer.
        window_layers: the layers, counted from 0, whose attention has the window.
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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    window_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int = 32768
    dtype: str = "float32"
    experts: ExpertsConfig | None = None

    def __post_init__(self):
        _check(vars(self))

    @property
    def positions(self) -> int:
        """Tokens that a text may have: `max_position_embeddings`, or what they are stretched to."""
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_position_embeddings
        made_for = scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * made_for))

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
        one_of("model_type", family, tuple(FAMILIES))
        _refuse_unimplemented(hf, family)
        theta, scaling = read_rope(hf)
        window, window_layers = _windows(hf)
        if family == "qwen3_moe" and window_layers:
            raise DataError(
                "use_sliding_window=true is not implemented for qwen3_moe: which layers have the "
                "window differs between versions of transformers; no published model uses it."
            )
        settings: dict[str, Any] = {name: hf.get(key) for name, (key, _) in SIZES.items()}
        settings |= {
            "family": family,
            "num_kv_heads": either(settings["num_kv_heads"], settings["num_heads"]),
            "head_dim": either(settings["head_dim"], _default_head_dim(hf, family)),
            "max_position_embeddings": hf.get("max_position_embeddings", 32768),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "sliding_window": window,
            "window_layers": window_layers,
            "rms_norm_eps": as_float(hf.get("rms_norm_eps", 1e-6)),
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

        Positions, windows and the dtype are written under their old and their new keys.
        """
        scaling = (
            {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_hf()
        )
        hf = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            **{key: getattr(self, name) for name, (key, _) in SIZES.items()},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        if self.rope_scaling is not None:
            hf["rope_scaling"] = scaling
        if self.window_layers:
            hf |= self._windows_to_hf()
        if self.experts is not None:
            e = self.experts
            hf |= {key: getattr(e, name) for name, (key, _) in EXPERT_SIZES.items()}
            hf |= {"norm_topk_prob": e.normalise, "mlp_only_layers": list(e.dense_layers)}
        if self.family != "qwen2":
            hf["attention_bias"] = False
        elif self.head_dim * self.num_heads == self.hidden_size:
            del hf["head_dim"]  # Qwen2 directories do not have the key
        return hf

    def _windows_to_hf(self) -> dict[str, Any]:
        """The keys of sliding windows.

        Versions before `layer_types` (transformers 4.53) give a window to every layer from
        `max_window_layers` on, as all published models have them; other orders they cannot read.
        """
        kinds = [KINDS[i in self.window_layers] for i in range(self.num_layers)]
        return {
            "use_sliding_window": True,
            "sliding_window": self.sliding_window,
            "max_window_layers": self.window_layers[0],
            "layer_types": kinds,
        }


def _check(settings: dict[str, Any]) -> None:
    """Raise unless these are fields of a `QwenConfig`: each of its type, and possible together."""
    c = settings
    one_of("model_type", c["family"], tuple(FAMILIES))
    one_of("dtype", c["dtype"], DTYPES)
    for name, (key, limit) in SIZES.items():
        check_size(key, c[name], limit)
    for name in ("tie_word_embeddings", "qkv_bias", "qk_norm"):
        one_of(name, c[name], (False, True))
    check_number("rope_theta", c["rope_theta"], high=1e15)
    _check_windows(c["sliding_window"], c["window_layers"], c["num_layers"])
    check_number("rms_norm_eps", c["rms_norm_eps"], high=1.0)
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
        raise DataError(f"num_experts={short(found['count'])}, num_local_experts={short(local)}.")
    found["count"] = either(found["count"], local)
    found["step"] = either(found["step"], 1)
    dense = either(hf.get("mlp_only_layers"), [])
    if not isinstance(dense, list):
        raise DataError(f"mlp_only_layers={short(dense)}: wanted a list of layer numbers.")
    found |= {"normalise": hf.get("norm_topk_prob", False), "dense_layers": tuple(dense)}
    _check_experts(found, hf.get("num_hidden_layers"))
    return ExpertsConfig(**found)


def _check_experts(e: dict[str, Any], num_layers: Any) -> None:
    """Raise unless these are fields of an `ExpertsConfig` for this many layers."""
    check_size("num_hidden_layers", num_layers, SIZES["num_layers"][1])
    for name, (key, limit) in EXPERT_SIZES.items():
        check_size(key, e[name], limit)
    one_of("norm_topk_prob", e["normalise"], (False, True))
    if e["per_token"] > e["count"]:
        raise DataError(
            f"num_experts_per_tok={e['per_token']} is more than num_experts={e['count']}."
        )
    for layer in e["dense_layers"]:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise DataError(
                f"mlp_only_layers has {short(layer)}; wanted layers from 0 to {num_layers - 1}."
            )


def _check_windows(window: Any, window_layers: tuple[int, ...], layers: int) -> None:
    if not window_layers and window is None:
        return
    check_size("sliding_window", window, POSITIONS)
    known = [i for i in range(layers) if i in window_layers]
    if not known or list(window_layers) != known:
        raise DataError(
            f"window_layers={short(window_layers)}: wanted ascending layers below {layers}."
        )


def _refuse_unimplemented(hf: dict[str, Any], family: str) -> None:
    """Raise on the first setting that asks for other mathematics than ours."""
    for key, allowed in NEUTRAL.items():
        if key in hf and hf[key] not in allowed:
            raise DataError(f"{key}={short(hf[key])} is not implemented; wanted {allowed[-1]!r}.")
    # transformers gives Qwen2 its three biases whatever the key says, and Qwen3 with
    # attention_bias a fourth one, on the output projection.
    bias = hf.get("attention_bias")
    if bias is not None and bias is not (family == "qwen2"):
        raise DataError(f"attention_bias={short(bias)} is not implemented for {family}.")


def _windows(hf: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """The width of the attention window and the layers that have it; None and () without any.

    Most configs carry settings of windows that no layer uses: those are ignored.
    """
    layers: Any = hf.get("num_hidden_layers")
    kinds = hf.get("layer_types")
    check_size("num_hidden_layers", layers, SIZES["num_layers"][1])
    one_of("use_sliding_window", hf.get("use_sliding_window"), (None, False, True))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise DataError(f"layer_types={short(kinds)}: wanted a list of {layers} names.")
        for kind in kinds:
            one_of("layer_types", kind, KINDS)
        found = tuple(i for i, kind in enumerate(kinds) if kind == KINDS[1])
    elif window is None:
        found = ()
    else:
        first = hf.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise DataError(f"max_window_layers={short(first)}: wanted an integer from 0 on.")
        found = tuple(range(first, layers))
    if found and window is None:
        raise DataError(
            f"layer_types has {KINDS[1]!r}, but "
            f"use_sliding_window={short(hf.get('use_sliding_window'))} with "
            f"sliding_window={short(hf.get('sliding_window'))}; wanted true and a number."
        )
    return (window, found) if found else (None, ())


def _default_head_dim(hf: dict[str, Any], family: str) -> Any:
    """Without a `head_dim` key: 128 for dense Qwen3, hidden_size / num_attention_heads else."""
    if family == "qwen3":
        return 128
    for name in ("hidden_size", "num_heads"):
        key, limit = SIZES[name]
        check_size(key, hf.get(key), limit)
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise DataError(
            f"hidden_size={hf['hidden_size']} does not split into "
            f"num_attention_heads={hf['num_attention_heads']}; fix one, or give head_dim."
        )
    return hf["hidden_size"] // hf["num_attention_heads"]


def _dtype(hf: dict[str, Any]) -> Any:
    """`dtype` or the older `torch_dtype`; where neither is given the weight files decide."""
    dtype = either(either(hf.get("dtype"), hf.get("torch_dtype")), "float32")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
