"""Text to token ids and back: the chat template, and the only file that knows special tokens."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from gspo_jax.errors import ConfigError, DataError
from gspo_jax.models.hf import files
from gspo_jax.prompt.chat_template import ChatTemplate

THINK = "<think>"  # begins the reasoning, in the templates of all Qwen families
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Tokenizer:
    """A model directory's tokenizer, with its chat template and its special tokens.

    Attributes:
        backend: the tokenizer proper.
        eos_ids: every token that ends a response, the model's own first; never empty.
        pad_id: what fills the rest of a row. It may be one of `eos_ids`: nothing may therefore
            tell padding by its value, only by a mask.
        template: how a chat is written as text; None for a base model without one.
        specials: `bos_token`, `eos_token`, ... as the template may use them.
        template_args: further variables of the template, such as `enable_thinking`.
        directory: where it was read from.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    pad_id: int
    template: ChatTemplate | None = None
    specials: dict[str, str] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's own table may be larger, never smaller."""
        return 1 + max(self.backend.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as it stands: nothing is put before or after it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; ids beyond the vocabulary are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many rows."""
        ids = [[int(i) for i in row] for row in rows]
        return self.backend.decode_batch(ids, skip_special_tokens=True)

    def render(self, prompt: Prompt) -> str:
        """`prompt` as the model reads it, up to where its answer begins.

        A string is one user message; without a chat template it is left as it is.

        Raises:
            DataError: a chat without a template, or a template that refuses this chat.
        """
        if self.template is None:
            if isinstance(prompt, str):
                return prompt
            raise DataError(
                "got a prompt that is a list of messages, but the model has no chat template; "
                "use prompts that are strings, or add chat_template.jinja to the model directory."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for index, message in enumerate(messages):
            if len(message) == 2:
                continue
            if unread := message.keys() - {"role", "content"} - self.template.keys:
                raise DataError(
                    f"messages[{index}] has {sorted(unread)}, of which the chat template "
                    f"{self.template.name} reads nothing; take it out of the data, or train a "
                    "model whose template reads it."
                )
        return self.template.render(
            {
                **self.specials,
                **self.template_args,
                "messages": messages,
                "add_generation_prompt": True,
            }
        )

    def opened(self, prompt: Prompt) -> str:
        """ "<think>" where `render(prompt)` ends with it, else "".

        The templates of R1, QwQ, Qwen3-Thinking and Qwen3.5 begin the reasoning themselves; the
        response then has only its end. A prompt that mentions the mark elsewhere opens nothing.
        """
        return THINK if self.render(prompt).rstrip().endswith(THINK) else ""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The ids of `render(prompt)`; see `encode_prompts`."""
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of each prompt, ready for the model to answer.

        A template writes a beginning-of-sequence token itself if the model wants one. Without a
        template the tokenizer adds what it adds to any text, usually that token or nothing.
        """
        texts = [self.render(p) for p in prompts]
        encodings = self.backend.encode_batch(texts, add_special_tokens=self.template is None)
        return [e.ids for e in encodings]


def load_tokenizer(path: str | Path, *, template_args: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    Reads tokenizer.json. A directory that has only older files (vocab.json and merges.txt, or
    a sentencepiece model) is converted by transformers, which is imported only then.

    Args:
        path: the directory.
        template_args: variables for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        DataError: no such directory, no readable tokenizer in it, or no end-of-sequence token.
            Nothing outside the directory is read.
        ConfigError: a variable that the chat template does not look at.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such model directory.")
    settings = _read_json(path, "tokenizer_config.json")
    template = _read_template(path, settings)
    _check_arguments(path, template, template_args or {})
    backend = _read_backend(path)
    # Whoever calls cuts and pads; settings saved with the tokenizer must not do it behind them.
    backend.no_padding()
    backend.no_truncation()
    specials = _special_tokens(settings, _read_json(path, "special_tokens_map.json"))
    generation = _read_json(path, "generation_config.json")
    model = _read_json(path, "config.json")

    def token_id(name: str) -> list[int]:
        id_ = backend.token_to_id(specials[name]) if name in specials else None
        return [] if id_ is None else [id_]

    # A model often stops on more tokens than its tokenizer calls "eos": the end of a turn and
    # the end of a document.
    eos_ids = _ids(generation.get("eos_token_id")) + token_id("eos_token")
    eos_ids = eos_ids or _ids(model.get("eos_token_id"))
    if not eos_ids:
        raise DataError(
            f"{path}: no end-of-sequence token; set eos_token_id in generation_config.json "
            "or eos_token in tokenizer_config.json."
        )
    pad_ids = token_id("pad_token") + _ids(generation.get("pad_token_id"))
    pad_ids += _ids(model.get("pad_token_id")) + eos_ids
    largest = max([v for v in [model.get("vocab_size")] if type(v) is int], default=2**31) - 1
    for id_ in (*eos_ids, pad_ids[0]):
        if not 0 <= id_ <= largest:
            raise DataError(f"{path}: special token id {files.short(id_)}, wanted 0 to {largest}.")
    return Tokenizer(
        backend=backend,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=pad_ids[0],
        template=template,
        specials=specials,
        template_args=dict(template_args or {}),
        directory=path,
    )


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """`eos_token_id`, `pad_token_id` and, if there is one, `bos_token_id`, as configs have them."""
    eos = list(tokenizer.eos_ids)
    bos = tokenizer.backend.token_to_id(tokenizer.specials.get("bos_token", ""))
    ids = {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else eos}
    ids["pad_token_id"] = tokenizer.pad_id
    return {name: value for name, value in ids.items() if value is not None}


def _find(directory: Path, name: str) -> Path | None:
    """The file `name` of the directory, or None if there is none."""
    return files.file_in(directory, name) if os.path.lexists(directory / name) else None


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object in a file of the directory, or {} if there is no such file."""
    file = _find(directory, name)
    if file is None:
        return {}
    content = files.read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file}: got a JSON {type(content).__name__}, wanted an object.")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = _find(path, "tokenizer.json")
    if file is None:
        return _converted(path)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the Rust library raises bare Exception, or panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{file}: not a tokenizer ({_one_line(error)}).") from None


def _converted(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory that has only older files."""
    if _find(path, "tokenizer_config.json") is None and _find(path, "vocab.json") is None:
        raise DataError(f"{path}: no tokenizer.json in this directory.")
    for entry in sorted(path.iterdir()):  # transformers follows links wherever they lead
        if entry.is_symlink():
            files.file_in(path, entry.name)
    # It would say that torch is missing, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever the conversion of foreign files may raise
        raise DataError(
            f"{path}: no tokenizer.json, and transformers cannot read this tokenizer "
            f"({_one_line(error)})."
        ) from None
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{path}: {type(converted).__name__} has no fast form; add a tokenizer.json."
        )
    return backend


def _check_arguments(path: Path, template: ChatTemplate | None, given: dict[str, Any]) -> None:
    """An argument that no template looks at would change nothing: a slip of the pen."""
    taken = template.variables if template else set()
    for name in given:
        if name not in taken:
            has = f"looks at {sorted(taken)}" if template else "does not exist"
            raise ConfigError(f"model.template_args.{name}: the chat template of {path} {has}.")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """`*_token` entries, each a string or an object with its "content"; earlier sources win."""
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                found.setdefault(name, content)
    return found


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _read_template(path: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json, else None."""
    file = _find(path, "chat_template.jinja")
    if file is not None:
        return ChatTemplate(files.read_text(file), name=str(file))
    file = path / "tokenizer_config.json"
    source = settings.get("chat_template")
    if isinstance(source, list):  # several templates, each with a name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default") or source
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"{file}: chat_template is {files.short(source)}, wanted a text.")
    return ChatTemplate(source, name=str(file))
