"""Write gspo_jax/assets/demo: tokenizer, chat template and configuration of the demo model.

    python scripts/train_demo_tokenizer.py [OUT_DIR]

A byte-level BPE in Qwen2's layout, of 296 entries: the 256 bytes, merges that make single tokens
of the words of the arithmetic task and of the chat template, and the three special tokens at the
end. Digits, and the signs between them, are always tokens of their own.
The output is the same on every run; the weights beside it come from `gspo-jax sft`.
"""

import json
import sys
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

# What the merges are learned on: the words that the prompt, the chat template and the worked
# solutions are made of. Earlier ones are merged first.
WORDS = [
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
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 296  # a multiple of 8, so that an 8-way split of the vocabulary needs no padding

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train() -> Tokenizer:
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
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    weighted = [word for rank, word in enumerate(reversed(WORDS)) for _ in range(rank + 1)]
    tokenizer.train_from_iterator(weighted, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the words give {tokenizer.get_vocab_size()} entries: {VOCAB_SIZE=}")
    return tokenizer


def configs(tokenizer: Tokenizer) -> dict[str, dict]:
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
            "intermediate_size": 512,
            "max_position_embeddings": 256,
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
            "vocab_size": VOCAB_SIZE,
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
            "model_max_length": 256,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }


def main() -> None:
    default = Path(__file__).parents[1] / "gspo_jax" / "assets" / "demo"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in configs(tokenizer).items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
