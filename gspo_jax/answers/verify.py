"""Is the boxed answer of a text the right one? Pure, exact, linear in time; nothing is evaluated.

Only ``\\boxed{...}`` counts. A number somewhere in the text, an answer after "the answer is" or
one repeated from the question is worth nothing: a policy soon finds whatever else is paid for.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from gspo_jax.answers.notation import TEXT, choice, is_blank, peeled, plain, spaceless, unwrapped
from gspo_jax.answers.units import Unit, unit

COUNTS_REASONING = "counts_reasoning"  # an attribute of reward functions
MAX_TEXT = 200_000  # characters after the reasoning that are read, counted from the end
MAX_ANSWER = 400  # characters of a boxed answer; a longer one is never right
MAX_LISTS = 50  # boxes that are compared with each other as lists, counted from the end

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(rf"([+-]?)\\frac\{{(-?{_DECIMAL})\}}\{{({_DECIMAL})\}}")
_MIXED = re.compile(r"([+-]?)([0-9]+)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_POWER = re.compile(
    rf"([+-]?)({_DECIMAL})(?:\\times|\\cdot|\*|\u00d7|\u00b7)10\^\{{?([+-]?[0-9]{{1,3}})\}}?"
)
_SPACING = re.compile(r"\\[,;: ]|\\(?:quad|qquad)(?![A-Za-z])|~|\s+")
_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")  # 1 234 567
# Space that says something: "5 6" is not 56, and "32, 349" are two numbers.
_IDLE_SPACE = re.compile(r"(?!(?<=[0-9]) [0-9]|(?<=[0-9],) [0-9]{3}(?![0-9])) ")
_WITH_UNIT = re.compile(
    r"([-+]?[\\a-z0-9{}.,/^ ]*[0-9}])"
    r"([A-Za-z]{1,24}(?:\^\{?[23]\}?)?(?:/[A-Za-z]{1,12}(?:\^\{?[23]\}?)?)?)"
)
_LETTER_UNIT = re.compile(r"[0-9}][A-Za-z](?:\^\{?[23]\}?)?$")
_UNITS = re.compile(rf"^(?:{TEXT.pattern} ?)+|(?:{TEXT.pattern} ?)+$")  # not between two numbers
_DEGREES = re.compile(r"\^\{?\\circ\}?|\u00b0|\\degrees?(?![A-Za-z])|\\?%")
_VARIABLE = re.compile(r"[A-Za-z]=")
# Words beside a number that are no unit: they make another number, or several, of it.
_COUNTS = re.compile(
    r"[0-9]|\b(?:or|and|not?|to|than|least|most|more|less|minus|plus|negative|between|except"
    r"|dozen|hundred|thousand|million|billion|trillion)\b",
    re.IGNORECASE,
)
_EXPANDED = re.compile(r"10\s*\^|[0-9]\s*\\[dtc]?frac|[0-9]\s+[0-9]+/")


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


def boxed(text: str, question: str = "") -> str | None:
    """The content of the last balanced ``\\boxed{...}`` after the reasoning, or None.

    Reasoning ends at the last ``</think>``; a ``<think>`` that never ends leaves no answer.
    Blank boxes, and those that stand in `question`, are passed over if another box says something.
    A box around another box is not an answer, the inner one is.
    """
    boxes = _boxes(text)
    said = _said(boxes, question)
    return said[-1] if said else boxes[-1] if boxes else None


def check(text: str, gold: str | int | float, question: str = "") -> Verdict:
    """Compare the boxed answer of `text` with `gold`.

    Integers, decimals and fractions (``1,234``, ``12.50``, ``3/4``, ``\\frac{3}{4}``, with a
    sign, ``$``, ``%``, a power of ten or a unit) are compared as exact rational numbers, so that
    12 equals 12.0 and 1/3 does not equal 0.3333. Where both have a known unit, it is converted:
    120 cm equals 1.2 m, and 12 cm does not equal 12 m. Anything else must be the same text, up to
    spacing, fonts, and the parentheses of a single letter. Two boxes with different answers are no
    answer; a box that `question` shows is passed over where there is another.
    """
    boxes = _boxes(text)
    said = _said(boxes, question)
    answer = said[-1] if said else boxes[-1] if boxes else None
    if answer is None:
        return Verdict(0.0, None, "no answer")
    if not said:
        return Verdict(0.0, answer, "blank")
    if len(answer) > MAX_ANSWER:
        return Verdict(0.0, answer[:MAX_ANSWER], "too long")
    if any(not _same(other, answer) for other in {*said} - {answer}):
        return Verdict(0.0, answer, "ambiguous")
    right = str(gold).strip() != "" and _same(answer, str(gold))
    right = right and not _only_copied(answer, str(gold), question)
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
        None if gold is None else compare(own_words(prompt, completion), gold, asked(prompt)).score
        for prompt, completion, gold in zip(prompts, completions, answer, strict=True)
    ]


def check_list(text: str, gold: str, question: str = "") -> Verdict:
    """Compare the boxed list of words in `text` with `gold`, "red, blue", item by item.

    Items are separated by commas or "and", in the right order; case and space do not matter.
    Two boxes with different lists are no answer.
    """
    verdict = check(text, gold, question)
    if verdict.reason not in ("wrong", "ambiguous"):
        return verdict
    lists = {items(other) for other in _said(_boxes(text), question)[-MAX_LISTS:]}
    if len(lists) > 1:
        return Verdict(0.0, verdict.answer, "ambiguous")
    right = lists == {items(gold)}
    return Verdict(float(right), verdict.answer, "correct" if right else "wrong")


def one_box(text: str) -> str | None:
    """`boxed`, but None where two boxes say different things."""
    contents = {*_said(_boxes(text), "")}
    return contents.pop() if len(contents) == 1 else None


def items(answer: str) -> tuple[str, ...]:
    """The items of a list of words, without case and LaTeX; "and" before one is no part of it."""
    items = re.split(r" ?, ?(?:and )?| and ", unwrapped(answer[:MAX_ANSWER]).removesuffix("."))
    return tuple(item.strip().casefold() for item in items)


def after_reasoning(text: str) -> str:
    """What follows the last ``</think>``; nothing, if the reasoning never ends."""
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def asked(turns: Any) -> str:
    """A text, or the last message of a chat."""
    return turns if isinstance(turns, str) else turns[-1]["content"]


def own_words(prompt: Any, completion: Any) -> str:
    """The completion's text, less a word-for-word copy of a prompt that shows a box itself."""
    question, text = asked(prompt), asked(completion)
    return text.replace(question, "") if "\\boxed" in question else text


def _said(boxes: list[str], question: str) -> list[str]:
    """The boxes that are not blank, and of those the ones that `question` does not show, if any."""
    said = [box for box in boxes if box[:1].isalnum() or not is_blank(box)]
    if "\\boxed" not in question:
        return said
    shown = set(_boxes(question))
    return [box for box in said if box not in shown] or said


def _only_copied(answer: str, gold: str, question: str) -> bool:
    """Is an answer that is still to be worked out a piece of the question, and not of the gold?"""
    if not question or _EXPANDED.search(answer) is None:
        return False
    copied = spaceless(answer)
    return copied in spaceless(question) and copied != spaceless(gold)


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
    return _read(answer).value


class _Reading(NamedTuple):
    """What an answer says: its text in one spelling, and its value and unit where it has them."""

    text: str
    value: Fraction | None = None
    unit: Unit | None = None


def _same(answer: str, gold: str) -> bool:
    """Does an answer say the same as another? A unit counts where both have one."""
    a, b = _read(answer), _read(gold)
    if a.value is None or b.value is None:
        # A comma may part two numbers or the digits of one: it is read as the gold answer has it.
        return a.text == b.text and (b.value is None or "," not in b.text)
    if a.unit is None or b.unit is None:
        return a.value == b.value
    return a.unit.measures == b.unit.measures and a.value * a.unit.size == b.value * b.unit.size


def _read(answer: str) -> _Reading:
    if len(answer) > MAX_ANSWER:
        return _Reading(answer)
    if match := _NUMBER.fullmatch(answer):  # most answers, at once
        return _Reading(answer, _value(match))
    dollars = "\\$" in answer
    inner = peeled(answer.replace("\\$", "").replace("\\!", "").replace("{,}", ","))
    if (letter := choice(inner)) is not None:
        return _Reading(letter)
    text = _without_name(_tight(plain(inner).replace("$", "")))
    spelled = text.replace(", ", ",")
    # "5m" may be algebra; "5 m" and "5\\text{m}" are not.
    if _LETTER_UNIT.search(inner) is None and (match := _WITH_UNIT.fullmatch(text)):
        number, found = _number(match[1]), unit(match[2])
        if found and number is not None:
            return _Reading(spelled, number, None if found.measures.startswith("unit") else found)
    # A unit that is not known has to say so: \text{ apples}.
    marked = _SPACING.sub(" ", inner.replace("$", "")).strip()
    unitless = _DEGREES.sub("", _UNITS.sub(_unless_it_counts, marked))
    number = _number(_without_name(_tight(plain(unitless))))
    return _Reading(spelled, number, unit("dollar") if dollars and number is not None else None)


def _unless_it_counts(words: re.Match[str]) -> str:
    return words[0] if _COUNTS.search(TEXT.sub(r"\1 ", words[0])) else ""


def _without_name(text: str) -> str:
    """``x=5`` without ``x=``."""
    return text[2:] if _VARIABLE.match(text) else text


def _tight(text: str) -> str:
    """`text` without the space that says nothing."""
    text = _GROUPS.sub(lambda m: m[0].replace(" ", ""), _SPACING.sub(" ", text))
    return _IDLE_SPACE.sub("", text).strip()


def _number(text: str) -> Fraction | None:
    """The exact value of a number: an integer, a decimal, a fraction of them, or one with a power
    of ten or a fraction behind it; None if it is none."""
    if text[:1] == "(" and text[-1:] == ")" and "," not in text:
        text = text[1:-1]
    if match := _NUMBER.fullmatch(text) or _FRAC.fullmatch(text):
        return _value(match)
    if match := _POWER.fullmatch(text):
        value = Fraction(match[2].replace(",", "")) * Fraction(10) ** int(match[3])
    elif match := _MIXED.fullmatch(text):
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        if top >= bottom:
            return None
        value = int(match[2]) + Fraction(top, bottom)
    else:
        return None
    return -value if match[1] == "-" else value


def _value(match: re.Match[str]) -> Fraction | None:
    sign, top, bottom = match.groups()
    numerator, denominator = (Fraction((n or "1").replace(",", "")) for n in (top, bottom))
    return (-1 if sign == "-" else 1) * numerator / denominator if denominator else None
