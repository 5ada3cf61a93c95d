"""Write a model directory without weights: tokenizer, chat template and a tiny Qwen2's config.

    python scripts/make_tiny_model.py CONFIG.yaml [section.key=value ...] [--phrases N]
    python scripts/make_tiny_model.py demo [OUT_DIR]

The first reads the training problems of the config's task and writes to its `model.path`; `gspo-jax
sft` with the same config then draws the weights and trains them. The second writes what the package
has in gspo_jax/assets/demo.

The tokenizer is a byte-level BPE in Qwen2's layout: the 256 bytes, merges that make single tokens
of the task's words (and with --phrases of what returns in most of its texts, which makes these
several times shorter), and three special tokens at the end. Digits are always tokens of their own.
The output is the same on every run.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from gspo_jax.config.load import Config, load_config
from gspo_jax.errors import ConfigError
from gspo_jax.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "gspo_jax" / "assets" / "demo"
# What the demo's merges are learned on: the words that the prompt, the chat template and the
# worked solutions are made of. Earlier ones are merged first.
DEMO_WORDS = [
    "\\boxed",
    "assistant",
    "What",
    " is",
    "user",
    "system",
    "answer",
    " the",
    " and",
    " so",
    "hence",
]
# How Qwen2 cuts a text before merging: words keep one leading character, digits stand alone.
# transformers builds its Qwen2 tokenizer around this pattern, whatever tokenizer.json says.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = r"\p{N}"  # where the texts of a task are cut: phrases may be of many words
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ENOUGH = 2000  # training problems that show all words of a task
SOME = 300  # of these problems, to find its phrases
MULTIPLE = 8  # of this is the model's vocabulary, so that an 8-way split of it needs no padding

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def demo_words() -> Iterator[str]:
    """The demo's words, each more often than those after it."""
    for rank, word in enumerate(reversed(DEMO_WORDS)):
        yield from [word] * (rank + 1)


def task_texts(config: Config) -> Iterator[str]:
    """What a model will read and write: the chat's roles, prompts and worked solutions."""
    c = config.task
    task = load_task(c.name, seed=c.seed, fields=c.fields, **{"path": c.path, **c.options})
    yield "user\nassistant\n"
    for index in range(min(task.size["train"], ENOUGH)):
        problem = task.problem("train", index)
        yield f"{problem.prompt}\n{problem.columns.get('completion', '')}"


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries; fewer where every word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


def with_phrases(tokenizer: Tokenizer, texts: list[str], often: float) -> Tokenizer:
    """The same with further merges, of whole words that come together `often` times per text.

    No digit is joined to anything. Word merges rank first, so that no phrase takes part of a word.
    """
    content = json.loads(tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    rows = [tokenizer.encode(text).tokens for text in texts]
    while True:
        counts = Counter(pair for row in rows for pair in pairwise(row))
        pairs = [(n, pair) for pair, n in counts.items() if not any(map(has_digit, pair))]
        count, pair = max(pairs)
        if count < often * len(texts):
            break
        vocab.setdefault("".join(pair), len(vocab))
        merges.append(list(pair))
        rows = [joined(row, pair) for row in rows]
    ids = {token: id_ for id_, token in enumerate([t for t in vocab if t not in SPECIAL] + SPECIAL)}
    content["model"]["vocab"] = ids
    for added in content["added_tokens"]:
        added["id"] = ids[added["content"]]
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": DIGITS}
    return Tokenizer.from_str(json.dumps(content))


def has_digit(token: str) -> bool:
    return any(c.isdigit() for c in token)


def joined(row: list[str], pair: tuple[str, str]) -> list[str]:
    """`row` with every such pair, from the left, as one."""
    out: list[str] = []
    for token in row:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def configs(tokenizer: Tokenizer, *, positions: int, mlp: int, kind: str) -> dict[str, dict]:
    """The JSON files beside tokenizer.json, as transformers would write them."""
    pad, _, eos = (tokenizer.token_to_id(s) for s in SPECIAL)
    return {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "bfloat16",
            "eos_token_id": eos,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": positions,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "pad_token_id": pad,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": -(-tokenizer.get_vocab_size() // MULTIPLE) * MULTIPLE,
        },
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(s)): {
                    "content": s,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for s in SPECIAL
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": positions,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": kind,
            "unk_token": None,
        },
    }


def write(
    out: Path, tokenizer: Tokenizer, *, positions: int, mlp: int, kind: str = "Qwen2Tokenizer"
) -> None:
    """Everything but weights, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in configs(tokenizer, positions=positions, mlp=mlp, kind=kind).items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG.yaml", help='or "demo"')
    parser.add_argument("rest", nargs="*", metavar="section.key=value", help="or OUT_DIR")
    parser.add_argument(
        "--phrases",
        type=float,
        metavar="N",
        help="join words that come together N times per problem: fewer, longer tokens",
    )
    given = parser.parse_args()
    if given.config == "demo":
        out = Path(given.rest[0]) if given.rest else DEMO
        write(out, train(demo_words(), 296), positions=256, mlp=512)
        return
    try:
        config = load_config(given.config, given.rest)
        if config.model.path == "demo" or config.model.init != "random":
            raise ConfigError(
                f"model.path={config.model.path} with model.init={config.model.init}: wanted a "
                "directory to write, and init=random, for the weights that are not there."
            )
        longest = config.task.max_prompt_length + config.rollout.max_completion_length
        texts = list(task_texts(config))
        tokenizer, kind = train(texts, 2048), "Qwen2Tokenizer"
        if given.phrases:
            tokenizer = with_phrases(tokenizer, texts[:SOME], given.phrases)
            # transformers would put Qwen2's own cuts between words back into its Qwen2Tokenizer.
            kind = "PreTrainedTokenizerFast"
        write(Path(config.model.path), tokenizer, positions=longest, mlp=256, kind=kind)
    except ConfigError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
