"""What every command starts from: devices, network, tokenizer, problems and their scorer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from gspo_jax.batch import Problem
from gspo_jax.config.load import Config, model_dir
from gspo_jax.config.settings import AlgoConfig, MeshConfig
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.mesh.distributed import place
from gspo_jax.mesh.sharding import (
    GATHERED,
    RULES,
    constrain,
    current_mesh,
    make_mesh,
    platform_of,
    sharding_for,
    unsplit,
    ways_of,
)
from gspo_jax.models.attention import Choice, choose
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.hf.weights import lent_files, load_model, read_model_config
from gspo_jax.models.qwen import Qwen, joined
from gspo_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from gspo_jax.reward import rewards
from gspo_jax.reward.remote import load_remote
from gspo_jax.rollout.engine import PureModel
from gspo_jax.rollout.stages import Scorer
from gspo_jax.tasks import Task, load_task
from gspo_jax.tasks.task import curriculum_stages, staged_order
from gspo_jax.update.microbatch import MICROBATCH_TOKENS


def to_sample(graphdef: nnx.GraphDef, params: PyTree, dtype: str) -> PureModel:
    """The sampler's network: cast, and whole along what training gathers layer by layer.

    Every step of decoding reads all of its weights, and would have to gather them all. Where that
    makes a copy of them, what multiplies the same rows is joined (`qwen.joined`).
    """
    mesh = current_mesh()
    if dtype == "float32" and (mesh is None or mesh.shape[GATHERED] == 1):
        return graphdef, params  # the masters themselves

    def one(p: nnx.Param) -> nnx.Variable:
        axes = unsplit(p.axes)
        return p.replace(constrain(p[...].astype(dtype), *axes), axes=axes)

    weights = jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Param))
    return nnx.split(joined(nnx.merge(graphdef, weights)))


compiled_to_sample = jax.jit(to_sample, static_argnums=(0, 2))


class Policy(NamedTuple):
    """A network in its pure view, with what is needed to talk to it.

    Attributes:
        graphdef, params: `nnx.split` of the network; float32 masters, sharded over `mesh`.
        dtype: of activations and cache.
        directory: the Hugging Face directory it came from.
    """

    graphdef: nnx.GraphDef
    params: PyTree
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: str
    directory: Path

    def sampler(self, params: PyTree) -> PureModel:
        """The pure model for sampling, from `params` once for a whole rollout; see `to_sample`."""
        return compiled_to_sample(self.graphdef, params, self.dtype)


class Problems(NamedTuple):
    """The problems of a task whose prompts fit, and the function that scores their answers."""

    task: Task
    indices: dict[str, list[int]]  # split -> indices of the problems that fit
    too_long: int  # problems left out
    scorer: Scorer
    shortest: int  # tokens of a training prompt, at least ...
    longest: int  # ... and at most
    stages: tuple[tuple[float | int, list[int]], ...] = ()  # of a curriculum, in positions
    longest_of: Mapping[str, int] = MappingProxyType({})  # split -> tokens of its prompts, at most

    def visit(self, start: int, count: int, *, total: int, seed: int) -> list[int]:
        """Positions of the training problems at places start ... of a run that visits `total`."""
        everything = range(len(self.indices["train"]))
        stages = self.stages or ((0.0, everything),)
        return staged_order(stages, start, count, total=total, seed=seed)

    def get(self, split: str, positions: Sequence[int]) -> list[Problem]:
        """Problems by their position among those that fit."""
        kept = self.indices[split]
        return [self.task.problem(split, kept[i]) for i in positions]


def load_policy(config: Config) -> Policy:
    """Read (or draw at random) the network that `config.model` names."""
    directory = model_dir(config)
    check_experts(config.algo, read_model_config(directory))
    mesh = open_mesh(config, read_model_config(directory))
    tokenizer = load_tokenizer(directory, template_args=config.model.template_args)
    lent_files(directory)  # an export that cannot be written should fail now, not at the end
    if config.model.init == "random":
        model = random_model(read_model_config(directory), config.run.seed, mesh)
    else:
        model = load_model(directory, mesh=mesh)
    dtype = resolve_dtype(config, platform_of(mesh))
    return Policy(*nnx.split(model), tokenizer, mesh, dtype, directory)


def check_experts(algo: AlgoConfig, shape: QwenConfig) -> None:
    """What concerns a router asks for a model that has one; told once the model is known."""
    for name, unused in (("routing_replay", "off"), ("router_aux_coef", 0), ("router_z_coef", 0)):
        value = getattr(algo, name)
        if value != unused and shape.experts is None:
            raise ConfigError(
                f"algo.{name}={value}: the model is {shape.family}, which has no experts; leave it "
                f"at {unused}."
            )


def check_mesh(mesh: Mesh, shape: QwenConfig) -> None:
    """What is split over devices must divide; told once the model is known, before compiling.

    Heads and experts alone: rows are filled up, and other axes that do not divide stay whole.
    """
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    for heads in ("num_heads", "num_kv_heads"):
        if (count := getattr(shape, heads)) % tensor:
            hf = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}[heads]
            raise ConfigError(
                f"mesh.tensor={tensor}: the model has {hf}={count}, which do not split into "
                f"{tensor} equal parts; {math.gcd(shape.num_heads, shape.num_kv_heads)} and its "
                "divisors would."
            )
    if expert == 1:
        return
    if shape.experts is None:
        raise ConfigError(
            f"mesh.expert={expert}: the model is {shape.family}, which has no experts; use "
            "mesh.fsdp, or mesh.tensor."
        )
    if shape.experts.count % expert:
        raise ConfigError(
            f"mesh.expert={expert}: the model has num_experts={shape.experts.count}, which do not "
            f"split into {expert} equal parts; change mesh.expert to a divisor."
        )


def open_mesh(config: Config, shape: QwenConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices of `config.mesh`, which this model can be split over; see `make_mesh`.

    Raises:
        ConfigError: there are not enough devices, or heads or experts do not divide.
    """
    mesh = make_mesh(**vars(config.mesh), devices=devices)
    check_mesh(mesh, shape)
    return mesh


def with_devices_here(config: Config) -> Config:
    """A run's configuration as it is read again: its mesh where there are devices for it, else the
    devices that there are."""
    try:
        make_mesh(**vars(config.mesh))
    except ConfigError:
        return replace(config, mesh=MeshConfig())
    return config


def resolve_dtype(config: Config, platform: str) -> str:
    """What the network computes in on "cpu", "gpu" or "tpu", "auto" resolved."""
    if config.model.dtype == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return config.model.dtype


def random_model(config: QwenConfig, seed: int, mesh: Mesh) -> Qwen:
    """A network of this shape with Qwen's own initialisation, sharded over `mesh`."""
    model = Qwen(config, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(place, params, param_shardings(params, mesh)))


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each parameter, from the logical axes that the model gave it."""
    return jax.tree.map(
        lambda p: p.replace(sharding_for(p.axes, mesh, p[...].shape)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Param),
    )


def load_problems(
    config: Config,
    tokenizer: Tokenizer,
    *,
    train: bool = True,
    scored: bool = True,
    task: Task | None = None,
) -> Problems:
    """The task's problems with prompts of at most `task.max_prompt_length` tokens.

    Args:
        train: there must be training problems, which benchmarks do not have.
        scored: responses will be scored; where problems have no answers, `task.rewards` has to.
        task: the one that `config.task` describes, where it has been loaded before.

    Raises:
        ConfigError: nothing could score the responses.
        DataError: a prompt is longer and `task.long_prompts` is "refuse", no training problem is
            left, or a reward function fails on the first of them.
    """
    c = config.task
    if task is None:
        task = load_task(c.name, seed=c.seed, fields=c.fields, **{"path": c.path, **c.options})
    if scored and all(spec.startswith("gspo_jax.") for spec in c.rewards):
        task = _scored(task, tokenizer)
    functions: dict = {task.name: task.reward}  # ours: pure and bounded, called where it is
    if c.rewards:
        functions = load_remote(c.rewards, seconds=c.reward_timeout, memory=c.reward_memory)
    weights = list(c.reward_weights) or [1.0] * len(functions)
    indices, lengths, too_long = {}, {}, 0
    for split, size in task.size.items():
        prompts = [_encoded(tokenizer, task.problem(split, i)) for i in range(size)]
        kept = [i for i, ids in enumerate(prompts) if 0 < len(ids) <= c.max_prompt_length]
        if len(kept) < size and c.long_prompts == "refuse":
            first = min(set(range(size)) - set(kept))
            raise DataError(
                f"{c.path or c.name}: {split} problem {first} "
                f"({task.problem(split, first).id!r:.60}) has a prompt of {len(prompts[first])} "
                f"tokens, task.max_prompt_length={c.max_prompt_length}; "
                f"{size - len(kept)} of {size} are like that. Raise it, shorten them, or set "
                "task.long_prompts=drop to leave them out."
            )
        too_long += size - len(kept)
        indices[split] = kept
        lengths[split] = [len(prompts[i]) for i in kept]
    if train and not task.size["train"]:
        raise DataError(
            f"{c.path or c.name} has no training problems, only {task.size}."
            + (" task.options.split=train trains on all of its rows." if c.path else "")
        )
    first_split = next((s for s in ("train", *indices) if indices[s]), None)
    if first_split is None or (train and not indices["train"]):
        raise DataError(
            f"no training problem of {c.path or c.name} has a prompt of at most "
            f"{c.max_prompt_length} tokens; raise task.max_prompt_length."
        )
    scorer = partial(rewards.score, functions, weights)
    # A rehearsal: a reward function that cannot work should say so now, not after compiling.
    first = task.problem(first_split, indices[first_split][0])
    scorer([first], [first.answer or "", ""], [[], []])
    scorer = partial(scorer, errors=c.reward_errors, told=set())
    shortest, longest = min(lengths[first_split]), max(lengths[first_split])
    stages = _stages(task, indices["train"], c.curriculum)
    longest_of = {split: max(found) for split, found in lengths.items() if found}
    return Problems(task, indices, too_long, scorer, shortest, longest, stages, longest_of)


def within_positions(
    config: Config, shape: QwenConfig, problems: Problems, splits: Sequence[str] = ()
) -> Problems:
    """The same problems where no text can be longer than the model was made for.

    Args:
        splits: those that are asked; by default of training and of evaluation.

    Returns:
        With one more warning where positions must be stretched beyond `max_position_embeddings`.

    Raises:
        ConfigError: a prompt and `rollout.max_completion_length` have more tokens together.
    """
    asked = splits or ("train", config.eval.split)
    prompt = max((problems.longest_of.get(split, 0) for split in asked), default=0)
    told = beyond_positions(shape, prompt, config.rollout.max_completion_length)
    if not told:
        return problems
    warnings = (*problems.task.warnings, told)
    return problems._replace(task=replace(problems.task, warnings=warnings))


def beyond_positions(
    shape: QwenConfig, prompt: int, new: int, name: str = "rollout.max_completion_length"
) -> str:
    """What to tell of texts of `prompt` and `new` tokens; nothing where they fit.

    Args:
        name: what the user calls `new`.

    Raises:
        ConfigError: they reach beyond the positions that the model's rotations are for.
    """
    total, made_for = prompt + new, shape.max_position_embeddings
    if total <= made_for:
        return ""
    text = f"texts of up to {total:,} tokens (a prompt of {prompt:,}, {name}={new})"
    if total <= shape.positions:
        return (
            f"{text}: more than max_position_embeddings={made_for}; the model's rope_scaling "
            f"reaches {shape.positions:,}."
        )
    room = shape.positions - prompt
    change = f"set {name}={room} or lower" if room > 0 else "such prompts are too long for it"
    raise ConfigError(f"{text}, and the model has {shape.positions:,} positions: {change}.")


def _scored(task: Task, tokenizer: Tokenizer) -> Task:
    """The task, which its own reward can score; with a warning where nothing asks for the box."""
    if task.unscored:
        raise ConfigError(task.unscored)
    split = next((s for s, size in task.size.items() if size), None)
    if not task.unboxed or split is None:
        return task
    if "\\boxed" in tokenizer.render(task.problem(split, 0).prompt):  # the template asks for it
        return task
    return replace(task, warnings=(*task.warnings, task.unboxed))


def _encoded(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    try:
        return tokenizer.encode_prompt(problem.prompt)
    except DataError as error:
        raise DataError(f"{problem.id!r:.60}: {error}") from None


def _stages(task: Task, kept: list[int], starts: dict[str, float]) -> tuple:
    """The curriculum that `task.curriculum` describes, by the problems' difficulty or level."""
    if not starts:
        return ()
    columns = [task.problem("train", i).columns for i in kept]
    levels = [str(each.get("difficulty", each.get("level"))) for each in columns]
    return tuple(curriculum_stages(levels, starts))


class TextSizes(NamedTuple):
    """What an `Objective` knows of the lengths of texts: fixed for a run, as are its programs."""

    microbatch_tokens: int
    longest: int
    shortest_prompt: int


def text_sizes(config: Config, problems: Problems, mesh: Mesh) -> TextSizes:
    """The longest text that the task and the length limit allow, and how many run together."""
    longest = -(-(problems.longest + config.rollout.max_completion_length) // 8) * 8
    tokens = config.algo.microbatch * longest
    per_device = MICROBATCH_TOKENS["cpu" if platform_of(mesh) == "cpu" else "accelerator"]
    tokens = tokens or per_device * ways_of(RULES["batch"], mesh)
    return TextSizes(tokens, longest, problems.shortest)


class Passes(NamedTuple):
    """How forward and backward passes are run; the result is the same with any.

    `memory.passes` decides it, for a run and for its plan.
    """

    attention: str = "xla"  # or "cudnn"
    remat: str = "none"  # of models.remat.POLICIES


PLAIN = Passes()


def attention(config: Config, dtype: str, shape: QwenConfig, mesh: Mesh) -> Choice:
    """The attention of the training programs on this mesh; the first call may try cuDNN's."""
    if config.model.attention == "xla":
        return Choice("xla")
    device = mesh.local_devices[0]
    return choose(dtype, shape.num_heads, shape.num_kv_heads, shape.head_dim, device)
