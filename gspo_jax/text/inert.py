"""Text that is safe to show and to save: inert on a terminal, without credentials."""

import os
import re
import unicodedata
from typing import Any

SECRET_NAME = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
# Long and random: /data/hf_models_and_datasets and runs/sk-learn-baselines are paths.
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-(?:[A-Za-z0-9_]{1,12}-){0,3}[A-Za-z0-9]{20,}[\w-]*"
    r"|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)
PRIVATE_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
REMOVED = "(removed)"  # stands for a credential; plain text in YAML as in JSON
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")


def one_line(text: Any, width: int) -> str:
    """`text` without control characters, on one line of at most `width` characters."""
    if isinstance(text, list):  # a chat: its last message
        text = text[-1].get("content", "") if text and isinstance(text[-1], dict) else str(text)
    # Cut first: a completion of a megabyte is not worth looking through.
    text = inert(str(text)[: 8 * width])
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def inert(text: str) -> str:
    """`text` on one line, without what a terminal would obey instead of showing it."""
    text = ESCAPES.sub("", text).replace("\n", "⏎").replace("\t", " ")
    # Cc, Cf, Cs, Co, Cn: controls, direction overrides and what else has no shape of its own.
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


def redact(text: str) -> str:
    """`text` without what looks like a credential, or is one in this process's environment."""
    for _, value in secrets():
        text = text.replace(value, REMOVED)
    return SECRET_TEXT.sub(REMOVED, text)


def recorded(value: str) -> str:
    """A setting as it is saved to be read again: as it is, but for what would give a secret away.

    Nothing is replaced inside of a value because a variable holds the same letters. A value that
    is a secret variable's as a whole is `${oc.env:NAME}`, which reads as the same where it is set;
    a token of a known form and a password in a URL are left out.
    """
    names = [name for name, secret in secrets() if secret == value]
    return f"${{oc.env:{names[0]}}}" if names else SECRET_TEXT.sub(REMOVED, value)


def secrets() -> list[tuple[str, str]]:
    """(name, value) of the variables that hold one, by their name.

    Not the path of a key file; nor, where the name says no more than KEY, the key of an object in
    a store ("models/Qwen3-0.6B"): words between slashes, and no long run of letters and digits.
    """
    return [
        (name, value)
        for name, value in os.environ.items()
        if SECRET_NAME.search(name)
        and len(value) >= 8
        and not os.path.exists(value)
        and not (
            "/" in value
            and not PRIVATE_NAME.search(name)
            and max(map(len, re.findall(r"[A-Za-z0-9]+", value)), default=0) < 16
        )
    ]
