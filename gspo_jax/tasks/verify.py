"""Is the boxed answer of a text the right one? Pure, exact, linear in time; nothing is evaluated.

Only ``\\boxed{...}`` counts. A number somewhere in the text, an answer after "the answer is" or
one repeated from the question is worth nothing: a policy soon finds whatever else is paid for.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from gspo_jax.tasks.units import Unit, unit

COUNTS_REASONING = "counts_reasoning"  # an attribute of reward functions
MAX_TEXT = 200_000  # characters after the reasoning that are read, counted from the end
MAX_ANSWER = 400  # characters of a boxed answer; a longer one is never right
MAX_LISTS = 50  # boxes that are compared with each other as lists, counted from the end

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(rf"([+-]?)\\frac\{{(-?{_DECIMAL})\}}\{{({_DECIMAL})\}}")
_BARE_FRAC = re.compile(r"\\frac\s*(?:([0-9])|\{([^{}]*)\})\s*(?:([0-9])|\{([^{}]*)\})")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_SPACING = re.compile(r"\\[,;:! ]|~|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_WITH_UNIT = re.compile(
    r"([-+]?[\\a-z0-9{}.,/]*[0-9}])((?:square|cubic)?[A-Za-z]{1,12}(?:\^\{?[23]\}?)?)"
)
_LETTER_UNIT = re.compile(r"[0-9}][A-Za-z](?:\^\{?[23]\}?)?$")
_UNITS = re.compile(rf"^(?:{_TEXT.pattern})+|(?:{_TEXT.pattern})+$")  # not between two numbers
_VARIABLE = re.compile(r"[A-Za-z]=")


def counts_reasoning(function: Callable) -> Callable:
    """Mark a reward function that tells reasoning from answer: all of this library's do.

    Where the prompt itself opens the reasoning, a response shows only its end, or nothing of it if
    it was cut off. A marked function gets the response with the opening before it, so that
    `after_reasoning` holds; others get the response as it was sampled.
    """
    setattr(function, COUNTS_REASONING, True)
    return function


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
    12 equals 12.0 and 1/3 does not equal 0.3333. Where both have a known unit, it is converted:
    120 cm equals 1.2 m, and 12 cm does not equal 12 m. Anything else must be the same text, up to
    spacing. Two boxes with different answers are no answer.
    """
    answer = boxed(text)
    if answer is None:
        return Verdict(0.0, None, "no answer")
    if not answer:
        return Verdict(0.0, answer, "blank")
    if len(answer) > MAX_ANSWER:
        return Verdict(0.0, answer[:MAX_ANSWER], "too long")
    if any(not _same(other, answer) for other in _boxes(text) if other):
        return Verdict(0.0, answer, "ambiguous")
    right = str(gold).strip() != "" and _same(answer, str(gold))
    return Verdict(float(right), answer, "correct" if right else "wrong")


@counts_reasoning
def accuracy(
    prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the boxed answer equals the gold one, 0.0 elsewhere, None without a gold one.

    A reward function in TRL's form: one prompt, completion and answer per response; completions
    are texts or chats, of which the last message counts.
    """
    return _scores(check, prompts, completions, answer)


@counts_reasoning
def list_accuracy(
    prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any
) -> list[float | None]:
    """`accuracy` by `check_list`, for gold answers that may be lists of words."""
    return _scores(check_list, prompts, completions, answer)


def _scores(
    compare: Callable[..., Verdict], prompts: list[Any], completions: list[Any], answer: list[Any]
) -> list[float | None]:
    return [
        None if gold is None else compare(own_words(prompt, completion), gold).score
        for prompt, completion, gold in zip(prompts, completions, answer, strict=True)
    ]


def check_list(text: str, gold: str) -> Verdict:
    """Compare the boxed list of words in `text` with `gold`, "red, blue", item by item.

    Items are separated by commas or "and", in the right order; case and space do not matter.
    Two boxes with different lists are no answer.
    """
    verdict = check(text, gold)
    if verdict.reason not in ("wrong", "ambiguous"):
        return verdict
    lists = {items(other) for other in _boxes(text)[-MAX_LISTS:] if other}
    if len(lists) > 1:
        return Verdict(0.0, verdict.answer, "ambiguous")
    right = lists == {items(gold)}
    return Verdict(float(right), verdict.answer, "correct" if right else "wrong")


def one_box(text: str) -> str | None:
    """`boxed`, but None where two boxes say different things."""
    contents = {box for box in _boxes(text) if box}
    return contents.pop() if len(contents) == 1 else None


def items(answer: str) -> tuple[str, ...]:
    """The items of a list of words, without case and LaTeX; "and" before one is no part of it."""
    items = re.split(r" ?, ?(?:and )?| and ", unwrapped(answer[:MAX_ANSWER]).removesuffix("."))
    return tuple(item.strip().casefold() for item in items)


def unwrapped(answer: str) -> str:
    """The words of an answer: without ``\\text{}``, dollars, and more than one space at a time."""
    return _TEXT.sub(r"\1", _SPACING.sub(" ", answer).replace("$", "")).strip()


def braced(answer: str) -> str:
    """``\\frac43`` and ``\\sqrt2`` with the braces that TeX does not need there."""
    return _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_FRAC.sub(r"\\frac{\1\2}{\3\4}", answer))


def after_reasoning(text: str) -> str:
    """What follows the last ``</think>``; nothing, if the reasoning never ends."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def own_words(prompt: Any, completion: Any) -> str:
    """The completion's text, less a word-for-word copy of a prompt that shows a box itself."""
    question, text = (
        turns if isinstance(turns, str) else turns[-1]["content"] for turns in (prompt, completion)
    )
    return text.replace(question, "") if "\\boxed" in question else text


def _boxes(text: str) -> list[str]:
    """The stripped content of every innermost balanced box after the reasoning, in order."""
    text = after_reasoning(text)[-MAX_TEXT:]
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


def numeric(answer: str) -> Fraction | None:
    """The exact value of an answer that is written as a number, perhaps with a unit; else None."""
    value = _measure(answer)[0]
    return None if isinstance(value, str) else value


def _same(one: str, other: str) -> bool:
    """Do two answers say the same? A unit counts where both have one."""
    (a, unit_a), (b, unit_b) = _measure(one), _measure(other)
    if unit_a is None or unit_b is None or isinstance(a, str) or isinstance(b, str):
        return a == b
    return unit_a.measures == unit_b.measures and a * unit_a.size == b * unit_b.size


def _measure(answer: str) -> tuple[Fraction | str, Unit | None]:
    """What an answer says: a number, or its text in one spelling; and the unit, if it is known."""
    if len(answer) > MAX_ANSWER:
        return answer, None
    # "5m" may be algebra; "5 m" and "5\\text{m}" are not.
    apart = _LETTER_UNIT.search(answer.strip().strip("$").removesuffix(".")) is None
    text = _SPACING.sub("", answer.replace("\u2212", "-"))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(left|right)(?![A-Za-z])", "", text))
    text = text.replace("{,}", ",")  # a comma without the space that TeX puts after one
    text = braced(text)
    dollars = "\\$" in text
    text = text.strip("$").removesuffix(".").replace("\\$", "").replace("$", "")
    text = _VARIABLE.sub("", text, count=1) if _VARIABLE.match(text) else text
    if apart and (match := _WITH_UNIT.fullmatch(_TEXT.sub(r"\1", text))):
        number, found = _number(match[1]), unit(match[2])
        if found and number is not None:
            return number, found
    unitless = _UNITS.sub("", text).replace("^\\circ", "").replace("^{\\circ}", "")
    unitless = unitless.replace("\\%", "").replace("%", "")
    number = _number(unitless)
    if number is None:
        return _TEXT.sub(r"\1", text), None
    return number, unit("dollar") if dollars else None


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a fraction of them; None if it is none."""
    match = _NUMBER.fullmatch(text) or _FRAC.fullmatch(text)
    if not match:
        return None
    sign, top, bottom = match.groups()
    numerator, denominator = (Fraction((n or "1").replace(",", "")) for n in (top, bottom))
    return (-1 if sign == "-" else 1) * numerator / denominator if denominator else None
