"""Every setting of a run: one frozen dataclass per YAML section, a sentence under every field.

    YAML path  ==  dotted override  ==  attribute path        rollout.group_size

`load` reads them from a file and the command line, `checks` says what must hold between them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Resume = Literal["same", "data", "learning", "free", "silent"]


def setting(default: Any, *, resume: Resume, at_least: int | None = None) -> Any:
    """A field: its default, its smallest value if it has one, and its rule where a run continues.

    Args:
        resume: what becomes of another value than that of the checkpoint.
            "same": refused, since it would be another run.
            "data": judged by the problems that it leads to, which have to be the same.
            "learning": taken, and told as a change of what is learned from here.
            "free": taken and told; of no consequence for what is learned.
            "silent": where the run lies and how it continues; taken without a word.
    """
    made: Any = {"default": default}
    if isinstance(default, dict | list):
        made = {"default_factory": default.copy}
    return field(**made, metadata={"resume": resume, "at_least": at_least})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained."""

    path: str = setting("demo", resume="same")
    """A Hugging Face model directory; "demo" is the tiny model inside the package."""
    init: Literal["pretrained", "random"] = setting("pretrained", resume="same")
    """Where the weights come from; "random" takes the architecture and tokenizer alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", resume="same")
    """Of activations and cache; "auto" is bfloat16 on accelerators and float32 on the CPU."""
    attention: Literal["auto", "xla"] = setting("auto", resume="free")
    """Of training; "auto" is cuDNN's on NVIDIA, in 16 bits and where it proves right."""
    remat: Literal["auto", "none", "dots", "full"] = setting("auto", resume="free")
    """What the backward pass recomputes instead of keeping: "dots" all but products with weights,
    "full" whole layers, a third more compute; "auto" is the least that fits into a GPU."""
    template_args: dict[str, Any] = setting({}, resume="same")
    """Variables of the model's chat template, such as Qwen3's {enable_thinking: false}."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Prompts, and what scores the responses."""

    name: str | None = setting("arithmetic", resume="data")
    """A built-in task, from tasks.TASKS; null where `path` is set."""
    path: str | None = setting(None, resume="data")
    """Data of your own: a JSONL, JSON, CSV or parquet file, a directory, or a hub dataset."""
    fields: dict[str, str] = setting({}, resume="data")
    """Which columns of the data are meant: {prompt: "{Body} {Question}", answer: solution}."""
    options: dict[str, Any] = setting({}, resume="data")
    """Keyword arguments of the built-in task, or of tasks.user_data."""
    curriculum: dict[str, float] = setting({}, resume="learning")
    """Difficulty -> share of the run from which its problems are asked; empty is all of them."""
    max_prompt_length: int = setting(512, resume="data", at_least=1)
    """Tokens, chat template included."""
    long_prompts: Literal["drop", "refuse"] = setting("drop", resume="data")
    """Problems with longer prompts: left out and counted, or a reason not to start."""
    rewards: list[str] = setting([], resume="learning")
    """Reward functions, "module:function" or "file.py:function"; empty is the task's own."""
    reward_weights: list[float] = setting([], resume="learning")
    """One weight per reward function; empty is 1 each."""
    reward_timeout: float = setting(60.0, resume="learning")
    """Seconds that one call of a reward function may take, which runs in a process of its own."""
    reward_memory: float = setting(0.0, resume="learning", at_least=0)
    """GB of address space that this process may have; 0 is no limit."""
    reward_errors: Literal["zero", "unscored", "stop"] = setting("zero", resume="learning")
    """What comes of responses on which a function raises, hangs, crashes or returns no finite
    number, which are counted: 0 from it; no reward, so that they are in no baseline and teach
    nothing; or a stop of the run, saved. None from a function is no failure: it does not apply."""
    seed: int = setting(0, resume="data")
    """Chooses the problems of a task that makes them up; run.seed orders them."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled. A step is one rollout and all of its updates."""

    prompts: int = setting(16, resume="same", at_least=1)
    """Prompts per step."""
    group_size: int = setting(8, resume="same", at_least=1)
    """Responses per prompt; TRL's num_generations."""
    max_completion_length: int = setting(256, resume="same", at_least=1)
    """Tokens, EOS included."""
    temperature: float = setting(1.0, resume="learning")
    """Of the sampling distribution, and of the policy that is trained."""
    top_p: float = setting(1.0, resume="learning")
    """Sample from the most likely tokens that hold this much probability; 1 is all of them."""
    top_k: int = setting(0, resume="learning", at_least=0)
    """Sample from this many most likely tokens; 0 is all of them."""
    resample: int = setting(0, resume="same", at_least=0)
    """Further rounds of prompts, at most, to replace groups whose responses all score alike."""
    overlong_buffer: int = setting(0, resume="learning", at_least=0)
    """Tokens before the length limit over which the reward falls by up to 1; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty for leaving the starting model."""

    coef: float = setting(0.0, resume="learning", at_least=0)
    """Its weight; above 0 a second copy of the starting weights stays in memory."""
    kind: Literal["k1", "k2", "k3"] = setting("k3", resume="learning")
    """The estimator in the loss, from losses.kl; in the reward it is k1."""
    placement: Literal["loss", "reward"] = setting("loss", resume="learning")
    """Where the penalty goes; "reward" takes it from every token's reward, as in PPO."""
    target: float = setting(0.0, resume="learning", at_least=0)
    """KL in nats per token to which the weight is steered, with the placement "reward", by at most
    a fifth in 10,000 responses; 0 leaves it as it is."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value network of PPO, for the advantage named gae."""

    kind: Literal["none", "separate", "shared"] = setting("none", resume="same")
    """"separate" is a second network, from the policy's weights; "shared" a head on the policy."""
    learning_rate: float = setting(1e-5, resume="learning", at_least=0)
    """The peak for the critic's own weights; the rest is that of optim."""
    clip: float = setting(0.2, resume="learning")
    """How far a value may move from that of the rollout, in units of reward."""
    coef: float = setting(0.5, resume="learning", at_least=0)
    """Weight of a shared critic's loss in the policy's."""


CLIP = {"clip_low": 0.2, "clip_high": 0.2, "delta": None}

TRACKERS = ("wandb", "tensorboard")  # a table in run.trackers has their classes

LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "delta": None},
    "gspo_token": {"clip_low": 3e-4, "clip_high": 4e-4, "delta": None},
    "luspo": {"clip_low": 2e-3, "clip_high": 2.5e-3, "delta": None},
    "gmpo": {"log_clip_low": 0.4, "log_clip_high": 0.4},
    "grpo": CLIP,
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "dr_grpo": CLIP | {"max_length": None},
    "dapo": CLIP | {"clip_high": 0.28},
    "ppo": CLIP,
    "cispo": {"cap": 5.0, "floor": 0.0},
    "reinforce": {},
}
"""What algo.loss takes beside each name, and the defaults: those of the functions of losses, here
so that a configuration is read without JAX."""

GAE = {"gamma": 1.0, "lam": 0.95, "whiten": True}

ADVANTAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "group_normalised": {"ddof": 1, "eps": 1e-4, "scale": "group"},
    "group_centred": {},
    "leave_one_out": {},
    "reinforce_pp": {"eps": 1e-8},
    "normalise_then_sum": {"ddof": 1, "eps": 1e-4, "scale": "group"},
    "gae": GAE,
}
"""What algo.advantage takes beside each name, and the defaults: likewise those of advantages."""


@dataclass(frozen=True, kw_only=True)
class AlgoConfig:
    """What is optimised."""

    loss: dict[str, Any] = setting({"name": "gspo"}, resume="same")
    """`name` of a loss, and its options (LOSS_OPTIONS)."""
    advantage: dict[str, Any] = setting({"name": "group_normalised"}, resume="same")
    """`name` of a function of advantages, and its options (ADVANTAGE_OPTIONS). gae needs
    algo.critic; normalise_then_sum puts several reward functions on one scale."""
    minibatches: int = setting(4, resume="same", at_least=1)
    """Updates per pass over a rollout; 1 means on-policy, and clipping can never act."""
    epochs: int = setting(1, resume="same", at_least=1)
    """Passes over each rollout."""
    microbatch: int = setting(0, resume="free", at_least=0)
    """Responses of full length per forward and backward pass, or so many tokens of shorter ones; 0
    is, for each device, 512 tokens on a CPU or 16,384 on an accelerator. Changes memory and speed
    alone."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The pull back to the starting model."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value network of PPO."""
    entropy_coef: float = setting(0.0, resume="learning", at_least=0)
    """Weight of a bonus on the mean entropy per token; above 0 keeps the policy exploring."""
    mask_truncated: bool = setting(False, resume="learning")
    """Leave responses that hit the length limit out of the loss."""
    routing_replay: Literal["off", "R2", "R3"] = setting("off", resume="same")
    """Experts of a rollout's updates: chosen anew, or those that the training program (R2) or
    the sampler (R3) chose before the first of them."""
    router_aux_coef: float = setting(0.0, resume="learning", at_least=0)
    """Weight of the load-balancing loss, which is num_experts_per_tok where all load is equal."""
    router_z_coef: float = setting(0.0, resume="learning", at_least=0)
    """Weight of the mean squared log-sum of the router's exponentials."""

    def __post_init__(self):
        # null means "the function's own default", so that an override can undo a file's choice.
        for name in ("loss", "advantage"):
            kept = {key: value for key, value in getattr(self, name).items() if value is not None}
            object.__setattr__(self, name, kept)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    learning_rate: float = setting(1e-6, resume="learning", at_least=0)
    """The peak."""
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", resume="learning")
    """After the warm-up; the latter two end at 0."""
    warmup: int = setting(0, resume="learning", at_least=0)
    """Updates of linear rise."""
    weight_decay: float = setting(0.0, resume="learning", at_least=0)
    """Decoupled, on matrices alone."""
    b1: float = setting(0.9, resume="learning")
    """Decay of the first moment."""
    b2: float = setting(0.99, resume="learning")
    """Decay of the second moment."""
    eps: float = setting(1e-8, resume="learning")
    """Added to the root of the second moment."""
    max_grad_norm: float = setting(1.0, resume="learning")
    """Longer gradients are scaled down to this length; inf never scales."""
    state: Literal["8bit", "float32"] = setting("8bit", resume="same")
    """How the moments are kept."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work."""

    data: int = setting(-1, resume="free")
    """Devices that split the batch and hold all weights; one of the four may be -1: the rest."""
    fsdp: int = setting(1, resume="free")
    """Devices that split both the batch and the weights, and gather them layer by layer."""
    tensor: int = setting(1, resume="free")
    """Devices that split heads, MLP and vocabulary; must divide num_key_value_heads."""
    expert: int = setting(1, resume="free")
    """Devices that split the batch and the experts of a mixture; must divide num_experts."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The measurement on held-out problems."""

    split: str = setting("test", resume="free")
    """Of the task."""
    problems: int = setting(512, resume="free", at_least=1)
    """Problems, from the start of the split; fewer if it has fewer."""
    samples: int = setting(8, resume="free", at_least=0)
    """Responses per problem: the k of avg@k."""
    temperature: float = setting(1.0, resume="free", at_least=0)
    """Of those samples; greedy accuracy is measured beside them."""
    every: int = setting(0, resume="free", at_least=0)
    """Steps between evaluations; 0 is before and after training alone."""
    batch: int = setting(64, resume="free", at_least=1)
    """Problems at a time."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised training on worked solutions."""

    batch_size: int = setting(64, resume="same", at_least=1)
    """Solutions per update."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself, and what it writes."""

    name: str = setting("", resume="silent")
    """Folder of the run; empty is the config file's name and the seed."""
    dir: str = setting("runs", resume="silent")
    """Where runs are kept."""
    seed: int = setting(0, resume="same", at_least=0)
    """Of sampling, of the order of problems and of random weights."""
    steps: int = setting(100, resume="free", at_least=1)
    """Rollouts; in supervised training, updates."""
    save_every: int = setting(0, resume="free", at_least=0)
    """Steps between checkpoints; 0 leaves it to run.save_minutes."""
    save_minutes: float = setting(30.0, resume="free", at_least=0)
    """Minutes after which a step's end is a checkpoint in any case; 0 is never. The end of a run
    always is one."""
    keep: int = setting(2, resume="free", at_least=1)
    """Checkpoints kept, the newest; the best by evaluation is kept beside them."""
    keep_every: int = setting(0, resume="free", at_least=0)
    """Steps between checkpoints that are saved and kept for good; 0 is none."""
    resume: str = setting("auto", resume="silent")
    """"auto" continues the run if it has a checkpoint, "never" starts anew, or a checkpoint."""
    allow_data_change: bool = setting(False, resume="silent")
    """Continue a run although its data or the choice of its data is no longer the same."""
    report_to: list[str] = setting([], resume="free")
    """Trackers that get the metrics too: "wandb", "tensorboard"."""
    profile_steps: list[int] = setting([], resume="free")
    """Steps whose trace is written to profile/, for TensorBoard or Perfetto."""
    log_completions: int = setting(20, resume="free", at_least=0)
    """Steps between tables of sample responses; 0 is never."""
    skip_budget: int = setting(10, resume="free", at_least=0)
    """Updates with non-finite gradients, in all, that are skipped before the run stops."""
    spike_sigmas: float = setting(0.0, resume="learning", at_least=0)
    """Skip an update whose gradient is longer than the mean of the last 128 by this many standard
    deviations; 0 is off."""
    save_by: float = setting(0.0, resume="free", at_least=0)
    """Minutes since the process began, in which the run is to have saved and stopped (exit code
    75); it takes no step that would end later. 0 is no limit."""


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "task": TaskConfig,
    "rollout": RolloutConfig,
    "algo": AlgoConfig,
    "optim": OptimConfig,
    "mesh": MeshConfig,
    "eval": EvalConfig,
    "sft": SFTConfig,
    "run": RunConfig,
}
"""In the order in which they are written."""
