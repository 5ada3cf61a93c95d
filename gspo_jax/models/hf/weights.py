"""Hugging Face directories in and out, through one table of names.

Loading goes tensor by tensor from the file into its place, dtype and sharding; saving goes
tensor by tensor from its place into the file. The model is never twice in memory. Reading
weights with another dtype than the files' and writing them again loses no bit as long as the
dtype in memory is the wider one.
"""

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from gspo_jax.errors import ConfigError, DataError, NumericalError
from gspo_jax.files.appearing import appearing
from gspo_jax.mesh.distributed import host, is_writer, place
from gspo_jax.mesh.sharding import sharding_for
from gspo_jax.models.config import DTYPES, QwenConfig
from gspo_jax.models.hf import files
from gspo_jax.models.qwen import Qwen

# Our attribute path -> the name on disk, and whether the matrix is transposed there: torch's
# Linear keeps [out, in], our kernels are [in, out]. A second {} is the expert: we keep all
# experts of a layer in one array, the disk has a tensor for each.
NAMES = {
    "embed": ("model.embed_tokens.weight", False),
    "layers.{}.input_norm": ("model.layers.{}.input_layernorm.weight", False),
    "layers.{}.q": ("model.layers.{}.self_attn.q_proj.weight", True),
    "layers.{}.k": ("model.layers.{}.self_attn.k_proj.weight", True),
    "layers.{}.v": ("model.layers.{}.self_attn.v_proj.weight", True),
    "layers.{}.q_bias": ("model.layers.{}.self_attn.q_proj.bias", False),
    "layers.{}.k_bias": ("model.layers.{}.self_attn.k_proj.bias", False),
    "layers.{}.v_bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    "layers.{}.q_norm": ("model.layers.{}.self_attn.q_norm.weight", False),
    "layers.{}.k_norm": ("model.layers.{}.self_attn.k_norm.weight", False),
    "layers.{}.o": ("model.layers.{}.self_attn.o_proj.weight", True),
    "layers.{}.post_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers.{}.gate": ("model.layers.{}.mlp.gate_proj.weight", True),
    "layers.{}.up": ("model.layers.{}.mlp.up_proj.weight", True),
    "layers.{}.down": ("model.layers.{}.mlp.down_proj.weight", True),
    "layers.{}.moe.router": ("model.layers.{}.mlp.gate.weight", True),
    "layers.{}.moe.gate": ("model.layers.{}.mlp.experts.{}.gate_proj.weight", True),
    "layers.{}.moe.up": ("model.layers.{}.mlp.experts.{}.up_proj.weight", True),
    "layers.{}.moe.down": ("model.layers.{}.mlp.experts.{}.down_proj.weight", True),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
EMBED, HEAD = NAMES["embed"][0], NAMES["head"][0]

# transformers 5 can also write the experts of a layer as two tensors. End of such a name -> what
# each expert's rows of it are, in order.
FUSED = {
    ".experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".experts.down_proj": ("down_proj",),
}

# What a directory lends to another model's export, byte for byte, where it has them.
LENT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
LENT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5 * 10**9


class Slot(NamedTuple):
    """One tensor on disk and where it lies in ours."""

    path: tuple[Any, ...]
    param: nnx.Variable
    expert: int | None  # which part of the parameter; None is all of it
    name: str
    shape: tuple[int, ...]  # on disk
    transposed: bool


def load_model(
    path: str | os.PathLike, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None
) -> Qwen:
    """Read a Qwen2, Qwen2.5, Qwen3 or Qwen3-MoE model from a directory of safetensors.

    Args:
        path: a Hugging Face directory, or a hub id like `Qwen/Qwen3-0.6B`.
        dtype: of the parameters in memory, and so of the computation.
        mesh: where to put the parameters, each by its logical axes; None means one device.

    Returns:
        The model; `model.config.dtype` is the dtype of the files, in which `save_model` writes.

    Raises:
        DataError: config.json asks for what is not implemented, or the tensors are not those
            that it describes, or not finite. Nothing outside the directory is read.
        ConfigError: an unknown dtype.
    """
    target = _known_dtype(dtype)
    directory = files.resolve(path)
    config = read_model_config(directory)
    found = _unfused(files.find_tensors(directory))
    config = _with_dtype_of(found, config)
    if len(found) < config.num_layers:  # a lie that would take minutes to build, if not refused
        raise DataError(f"{directory}: {len(found)} tensors cannot be {config.num_layers} layers.")
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0), dtype=target))
    )
    slots = _slots(state)
    _check_tensors(directory, found, slots)
    if config.tie_word_embeddings and HEAD in found:
        _check_tied(directory, found)
    slots.sort(key=lambda slot: (found[slot.name].file, found[slot.name].offset))
    filled = _read_all(found, slots, target, mesh)
    return nnx.merge(graphdef, nnx.from_flat_state(list(filled.items())))


def save_model(
    model: Qwen,
    out_dir: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    card: str | None = None,
    token_ids: Mapping[str, Any] | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that transformers loads; it appears whole or not at all.

    Args:
        model: its weights are written in `model.config.dtype`.
        out_dir: must not exist, or be empty, unless `replace`.
        like: a model directory or hub id that lends tokenizer, chat template, generation
            settings and special token ids.
        card: the text of README.md.
        token_ids: `eos_token_id`, `pad_token_id`, `bos_token_id`, where `like` does not say.
        replace: take the place of `out_dir` once the new directory is complete.
        shard_bytes: tensors of one file, at most, unless one alone is larger.

    Raises:
        DataError: `out_dir` is in use, or `like` cannot be read.
        NumericalError: a weight is not finite in the dtype of the files.
        StorageError: the disk is full or not writable.
    """
    slots = _slots(nnx.state(model, nnx.Param))
    if not is_writer():  # its share of the weights is asked for all the same
        for slot in slots:
            _host(slot, np.dtype(jnp.dtype(model.config.dtype)))
        return
    lender = None if like is None else files.resolve(like)
    with appearing(out_dir, replace=replace) as partial:
        _write_weights(partial, slots, model.config.dtype, shard_bytes)
        _write_beside(partial, model.config, lender, token_ids or {})
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")


def save_without_weights(
    config: QwenConfig, out_dir: Path, *, like: Path, token_ids: Mapping[str, Any]
) -> None:
    """Write what `save_model` writes besides weights and card: some megabytes of any model.

    Raises:
        DataError: `out_dir` is in use, or `like` cannot be read.
        StorageError: the disk is full or not writable.
    """
    with appearing(out_dir) as partial:
        _write_beside(partial, config, like, token_ids)


def read_model_config(directory: Path) -> QwenConfig:
    """The shape of the model in a directory, without a look at its weights."""
    path = files.file_in(directory, "config.json")
    content = files.read_json(path)
    try:
        return QwenConfig.from_hf(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _slots(state: nnx.State) -> list[Slot]:
    """Every tensor on disk with its place in our parameters, in the order of the tree."""
    slots = []
    for path, param in nnx.to_flat_state(state):
        numbers = [part for part in path if isinstance(part, int)]
        pattern = ".".join("{}" if isinstance(part, int) else str(part) for part in path)
        name, transposed = NAMES[pattern]
        stacked = name.count("{}") > len(numbers)
        shape = tuple(param.shape[1:] if stacked else param.shape)
        shape = shape[::-1] if transposed else shape
        for expert in range(param.shape[0]) if stacked else [None]:
            slots.append(
                Slot(path, param, expert, name.format(*numbers, expert), shape, transposed)
            )
    return slots


def _unfused(found: dict[str, files.Tensor]) -> dict[str, files.Tensor]:
    """With each fused tensor of experts replaced by its parts: stretches of the same bytes."""
    parts: dict[str, files.Tensor] = {}
    for name, tensor in found.items():
        end = next((end for end in FUSED if name.endswith(end)), None)
        if end is None or len(tensor.shape) != 3 or tensor.shape[1] % len(FUSED[end]):
            parts[name] = tensor  # of another shape it is no tensor of ours, and named as such
            continue
        shape = (tensor.shape[1] // len(FUSED[end]), tensor.shape[2])
        size = shape[0] * shape[1] * tensor.dtype.itemsize
        stem = name.rpartition(".")[0]
        names = [f"{stem}.{e}.{p}.weight" for e in range(tensor.shape[0]) for p in FUSED[end]]
        for i, part in enumerate(names):
            if part in found:
                raise DataError(f"{tensor.file}: {part} is there alone and within {name}.")
            parts[part] = tensor._replace(shape=shape, offset=tensor.offset + i * size)
    return parts


def _check_tensors(directory: Path, found: dict[str, files.Tensor], slots: list[Slot]) -> None:
    """Raise with the first offenders unless the files hold exactly the wanted tensors."""
    wanted = {slot.name: slot.shape for slot in slots}
    missing = [f"{n} {list(wanted[n])} is missing" for n in wanted if n not in found]
    wrong = [
        f"{n} has shape {list(found[n].shape)}, wanted {list(shape)}"
        for n, shape in wanted.items()
        if n in found and found[n].shape != shape
    ]
    # A copy of the embedding under the head's name is harmless: _check_tied compares them.
    extra = [f"{files.short(n)} has no place in it" for n in found if n not in wanted and n != HEAD]
    # One of each kind before the second of any: a renamed tensor is a missing and an extra one.
    offenders = [o for trio in zip_longest(wrong, missing, extra) for o in trio if o]
    if offenders:
        more = f"; and {len(offenders) - 4} more" if len(offenders) > 4 else ""
        raise DataError(
            f"{directory}: the tensors are not those of its config.json: "
            f"{'; '.join(offenders[:4])}{more}."
        )


def _check_tied(directory: Path, found: dict[str, files.Tensor]) -> None:
    """With tie_word_embeddings a stored head must be the embedding, or one of them is a lie."""
    embed, head = found[EMBED], found[HEAD]
    if embed.shape != head.shape or not np.array_equal(
        files.read_tensor(embed).astype(np.float32), files.read_tensor(head).astype(np.float32)
    ):
        raise DataError(
            f"{directory}: {HEAD} differs from {EMBED}, but config.json has "
            "tie_word_embeddings=true; set it to false to keep the separate head."
        )


def _read_all(
    found: dict[str, files.Tensor], slots: list[Slot], dtype: np.dtype, mesh: Mesh | None
) -> dict[tuple[Any, ...], nnx.Variable]:
    """Every parameter, as soon as its last tensor is read, on its devices."""
    filled, stacks = {}, {}
    left = Counter(slot.path for slot in slots)
    for slot in slots:
        values = _read(found[slot.name], slot, dtype)
        left[slot.path] -= 1
        if slot.expert is not None:
            stack = stacks.setdefault(slot.path, np.empty(slot.param.shape, dtype))
            stack[slot.expert] = values
            if left[slot.path]:
                continue
            values = stacks.pop(slot.path)
        if mesh is None:
            placed = jax.device_put(values)  # jnp.asarray would copy twice
        else:
            placed = place(values, sharding_for(slot.param.axes, mesh, values.shape))
        filled[slot.path] = slot.param.replace(placed)
    return filled


def _read(tensor: files.Tensor, slot: Slot, dtype: np.dtype) -> np.ndarray:
    """One tensor from the file, finite, in our layout and dtype."""
    values = files.read_tensor(tensor)
    _check_finite(values, DataError, f"{tensor.file}: {slot.name}")
    values = _turned(values, slot, dtype)
    if tensor.dtype != dtype:  # float16 ends at 65504
        _check_finite(values, DataError, f"{tensor.file}: {slot.name} in {dtype.name}")
    return values


def _write_weights(directory: Path, slots: list[Slot], dtype: str, shard_bytes: int) -> None:
    """All weights, in one file or in shards with an index."""
    target = np.dtype(jnp.dtype(dtype))
    sizes = {slot.name: math.prod(slot.shape) * target.itemsize for slot in slots}
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + sizes[slot.name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += sizes[slot.name]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        name = files.SINGLE if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {slot.name: slot.shape for slot in shard}
        files.write_tensors(directory / name, shapes, target, (_host(s, target) for s in shard))
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / files.INDEX, content)


def _host(slot: Slot, dtype: np.dtype) -> np.ndarray:
    """One tensor as it will lie on disk."""
    param = slot.param[...] if slot.expert is None else slot.param[...][slot.expert]
    values = _turned(np.asarray(host(param)), slot, dtype)
    _check_finite(values, NumericalError, f"{slot.name} in {dtype.name}")
    return values


def _turned(values: np.ndarray, slot: Slot, dtype: np.dtype) -> np.ndarray:
    """From the layout on disk to ours, or back: transposing is its own inverse."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused, not warned about
        return (values.T if slot.transposed else values).astype(dtype, order="C", copy=False)


def lent_files(directory: Path) -> list[Path]:
    """What `directory` lends to an export: tokenizer, template, generation settings, licence.

    Raises:
        DataError: one of them is a link out of the directory, or not a regular file.
    """
    there = [name for name in LENT_FILES if os.path.lexists(directory / name)]
    return [files.file_in(directory, name) for name in there]


def _write_beside(
    directory: Path, config: QwenConfig, lender: Path | None, token_ids: Mapping[str, Any]
) -> None:
    """config.json, and tokenizer, template and generation settings as `lender` has them."""
    ids = {**token_ids, **(_lend(lender, directory) if lender else {})}
    _write_json(directory / "config.json", {**config.to_hf(), **ids})
    if not (directory / "generation_config.json").exists():
        _write_json(directory / "generation_config.json", ids)


def _lend(lender: Path, directory: Path) -> dict[str, Any]:
    """Copy what `lender` lends; return its special token ids."""
    for path in lent_files(lender):
        shutil.copyfile(path, directory / path.name)
    if not os.path.lexists(lender / "config.json"):
        return {}
    hf = files.read_json(files.file_in(lender, "config.json"))
    return {key: hf[key] for key in LENT_IDS if hf.get(key) is not None}


def _with_dtype_of(found: dict[str, files.Tensor], config: QwenConfig) -> QwenConfig:
    """The files know better than config.json; where they mix dtypes, float32 holds them all."""
    names = {tensor.dtype.name for tensor in found.values()} or {config.dtype}
    return dataclasses.replace(config, dtype=names.pop() if len(names) == 1 else "float32")


def _check_finite(values: np.ndarray, error: type[Exception], name: str) -> None:
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise error(f"{name}: {bad} of {values.size} values are not finite.")


def _known_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        known = np.dtype(jnp.dtype(dtype))
    except TypeError:
        known = None
    if known is None or known.name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
    return known


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
