"""Is the boxed answer of a text the right one? Pure, exact, linear in time; nothing is evaluated.

Only ``\\boxed{...}`` counts. A number somewhere in the text, an answer after "the answer is" or
one repeated from the question is worth nothing: a policy soon finds whatever else is paid for.
"""

import re
from fractions import Fraction
from typing import Any, NamedTuple

MAX_TEXT = 200_000  # characters after the reasoning that are read, counted from the end
MAX_ANSWER = 400  # characters of a boxed answer; a longer one is never right

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(rf"([+-]?)\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}")
_SPACING = re.compile(r"\\[,;:! ]|~|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_UNITS = re.compile(rf"^(?:{_TEXT.pattern})+|(?:{_TEXT.pattern})+$")  # not between two numbers
_VARIABLE = re.compile(r"[A-Za-z]=")


class Verdict(NamedTuple):
    """What `check` decided.

    Attributes:
        score: 1.0 or 0.0.
        answer: what was read as the answer; None if there was none.
        reason: "correct", "wrong", "no answer", "blank", "ambiguous" or "too long".
    """

    score: float
    answer: str | None
    reason: str


def boxed(text: str) -> str | None:
    """The content of the last balanced ``\\boxed{...}`` after the reasoning, or None.

    Reasoning ends at the last ``</think>``; a ``<think>`` that never ends leaves no answer.
    Blank boxes are passed over if another box says something. A box around another box is not
    an answer, the inner one is.
    """
    boxes = _boxes(text)
    return next((b for b in reversed(boxes) if b), boxes[-1] if boxes else None)


def check(text: str, gold: str | int | float) -> Verdict:
    """Compare the boxed answer of `text` with `gold`.

    Integers, decimals and fractions (``1,234``, ``12.50``, ``3/4``, ``\\frac{3}{4}``, with a
    sign, ``$``, ``%`` or a unit in ``\\text{}``) are compared as exact rational numbers, so that
    12 equals 12.0 and 1/3 does not equal 0.3333. Anything else must be the same text, up to
    spacing. Two boxes with different answers are no answer.
    """
    answer = boxed(text)
    if answer is None:
        return Verdict(0.0, None, "no answer")
    if not answer:
        return Verdict(0.0, answer, "blank")
    if len(answer) > MAX_ANSWER:
        return Verdict(0.0, answer[:MAX_ANSWER], "too long")
    value = _value(answer)
    if any(_value(other) != value for other in _boxes(text) if other):
        return Verdict(0.0, answer, "ambiguous")
    right = str(gold).strip() != "" and value == _value(str(gold))
    return Verdict(float(right), answer, "correct" if right else "wrong")


def accuracy(
    prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the boxed answer equals the gold one, 0.0 elsewhere, None without a gold one.

    A reward function in TRL's form: one prompt, completion and answer per response; completions
    are texts or chats, of which the last message counts.
    """
    return [
        None if gold is None else check(_own_words(prompt, completion), gold).score
        for prompt, completion, gold in zip(prompts, completions, answer, strict=True)
    ]


def _own_words(prompt: Any, completion: Any) -> str:
    """The completion's text, less a word-for-word copy of a prompt that shows a box itself."""
    question, text = (
        turns if isinstance(turns, str) else turns[-1]["content"] for turns in (prompt, completion)
    )
    return text.replace(question, "") if "\\boxed" in question else text


def _boxes(text: str) -> list[str]:
    """The stripped content of every innermost balanced box after the reasoning, in order."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return []
    text = text[-MAX_TEXT:]
    found = []
    # One entry per open brace: where its content starts, whether it is a box, and whether a box
    # lies inside. Each brace is looked at once, so that thousands of unclosed boxes cost no more
    # than their length.
    open_braces: list[list[Any]] = []
    for token in _BRACE.finditer(text):
        mark = token[0]
        if mark == "{" or mark.startswith("\\boxed"):
            open_braces.append([token.end(), mark != "{", False])
        elif mark == "}" and open_braces:
            start, is_box, has_box = open_braces.pop()
            if is_box and not has_box:
                found.append(text[start : token.start()].strip())
            if open_braces:
                open_braces[-1][2] |= is_box or has_box
    return found


def _value(answer: str) -> Fraction | str:
    """What an answer says: a number where it is one, else its text in one spelling."""
    if len(answer) > MAX_ANSWER:
        return answer
    text = _SPACING.sub("", answer.replace("\u2212", "-"))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(left|right)(?![A-Za-z])", "", text))
    text = text.strip("$").removesuffix(".").replace("\\$", "").replace("$", "")
    text = _VARIABLE.sub("", text, count=1) if _VARIABLE.match(text) else text
    unitless = _UNITS.sub("", text).replace("^\\circ", "").replace("^{\\circ}", "")
    unitless = unitless.replace("\\%", "").replace("%", "")
    match = _NUMBER.fullmatch(unitless) or _FRAC.fullmatch(unitless)
    if not match:
        return _TEXT.sub(r"\1", text)
    sign, top, bottom = match.groups()
    numerator, denominator = (Fraction((n or "1").replace(",", "")) for n in (top, bottom))
    if not denominator:
        return text
    return (-1 if sign == "-" else 1) * numerator / denominator
