"""How LaTeX writes an answer: what says nothing is peeled off, and what says something is told.

Work is linear in the length of an answer, which `verify` bounds; nothing is evaluated.
"""

import re
from collections import Counter

_STYLES = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|underline|mbox|hbox"
    "|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bold|bm|ensuremath|operatorname"
)
TEXT = re.compile(rf"\\(?:{_STYLES})\s*\{{([^{{}}]*)\}}")
_STYLE = re.compile(rf"\\(?:{_STYLES})\s*(?=\{{)")
_SWITCH = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|bfseries|itshape|bf|rm|it)(?![A-Za-z])"
)
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_AROUND = "$~ \t\n\r"
_SPACE = re.compile(r"\\(?:[,;:! ]|(?:quad|qquad|thinspace|enspace)(?![A-Za-z]))|~|\s+")
_HIDDEN = re.compile(
    rf"\\[hv]?phantom\s*\{{[^{{}}]*\}}|\\[hv]space\*?\s*\{{[^{{}}]*\}}|{_STYLE.pattern}"
    r"|\\(?:[lc]?dots|square|Box)(?![A-Za-z])|\\_|[{}$_.\s~]"
)
_BARE_FRAC = re.compile(r"\\frac\s*(?:([0-9])|\{([^{}]*)\})\s*(?:([0-9])|\{([^{}]*)\})")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_BARE_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_CHOSEN = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[).:]?")
_MARK = re.compile(r"\\.|[{}]", re.DOTALL)
_BASE = re.compile(r"[0-9][0-9A-Fa-f]*_\{?([0-9]+)")
_CLOCK = re.compile(r"[0-9]+:[0-9]+(?::[0-9]+)?")
_BRACKET = re.compile(r"\{,\}|\\[{}]|[][(){},]")
_COMPUTES = re.compile(
    r"[+*/^!\u00d7\u00f7]|[\w)}]\s*[-\u2212]"
    r"|\\(?:[dtc]?frac|sqrt|c?dot|times|div|[dt]?binom|log|ln|exp|sin|cos|tan|sec|csc|cot|arc\w+"
    r"|sum|prod|int|lim|max|min|gcd|p?mod)(?![A-Za-z])"
)


def peeled(answer: str) -> str:
    """An answer without what says nothing around the whole of it.

    Fonts, braces, dollars, ``\\(...\\)``, sizes and a final period are taken off, as often as they
    come: ``\\(\\mathbf{42}\\)``, ``{42}`` and ``\\displaystyle 42`` all become ``42``.
    """
    text = _SWITCH.sub("", answer) if "\\" in answer else answer
    text = text.strip()
    if not text or (text[0].isalnum() and text[-1].isalnum()):
        return text
    closing = _braces(text)
    start, end = 0, len(text)
    while True:
        inner = text[start:end].lstrip(_AROUND)
        start, inner = end - len(inner), inner.rstrip(_AROUND).removesuffix(".").rstrip(_AROUND)
        end = start + len(inner)
        style = _STYLE.match(text, start, end)
        opens = style.end() if style else start
        if closing.get(opens) == end - 1:
            start, end = opens + 1, end - 1
        elif inner[:2] in ("\\(", "\\[") and inner[2:].endswith(("\\)", "\\]")):
            start, end = start + 2, end - 2
        else:
            return inner


def _braces(text: str) -> dict[int, int]:
    """Where each open brace is closed, by where it stands."""
    closing: dict[int, int] = {}
    starts: list[int] = []
    for mark in _MARK.finditer(text):
        if mark[0] == "{":
            starts.append(mark.start())
        elif mark[0] == "}" and starts:
            closing[starts.pop()] = mark.start()
    return closing


def is_blank(content: str) -> bool:
    """Does a box show nothing but space, phantoms, or dots to be filled in?"""
    return not _SPACE.sub("", _HIDDEN.sub("", content))


def plain(answer: str) -> str:
    """An answer in one spelling: without fonts and sizes, with the braces that TeX leaves out."""
    text = _SIZE.sub("", _SWITCH.sub("", answer)) if "\\" in answer else answer
    text = braced(re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\u2212", "-"))
    return _BARE_SCRIPT.sub(r"\1\2", TEXT.sub(r"\1", text))


def spaceless(text: str) -> str:
    """`text` without space and dollars, to be looked for in another."""
    return _SPACE.sub("", text).replace("$", "")


def braced(answer: str) -> str:
    """``\\frac43`` and ``\\sqrt2`` with the braces that TeX does not need there."""
    return _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_FRAC.sub(r"\\frac{\1\2}{\3\4}", answer))


def unwrapped(answer: str) -> str:
    """The words of an answer: without fonts, dollars, and more than one space at a time."""
    return TEXT.sub(r"\1", _SPACE.sub(" ", peeled(answer)).replace("$", "")).strip()


def choice(answer: str) -> str | None:
    """The letter of a choice, as ``C``, ``(C)``, ``C)``, ``C.`` or ``\\text{(C)}``; else None."""
    match = _CHOSEN.fullmatch(TEXT.sub(r"\1", peeled(answer)).strip()) if len(answer) < 40 else None
    return match and (match[1] or match[2])


def computes(answer: str) -> bool:
    """Is an answer an expression that could be worked out further, rather than a name or a list?"""
    return _COMPUTES.search(answer) is not None


def comparable(answer: str, gold: str) -> bool:
    """May a program that computes compare these two?

    Not where the bases of numerals (``4210_7``), times of day and ratios (``7:15``), or the kinds
    of brackets around lists differ: it would read over them.
    """
    a, b = (spaceless(plain(text)) for text in (answer, gold))
    for mark in (_CLOCK, _BASE):
        if Counter(mark.findall(a)) != Counter(mark.findall(b)):
            return False
    here, there = _brackets(a), _brackets(b)
    return not (here - there and there - here)  # a list may lack the brackets of a set


def _brackets(text: str) -> Counter[str]:
    """How often each pair of brackets stands around a list: of intervals, tuples and sets."""
    found: Counter[str] = Counter()
    stack: list[list] = []  # [the open bracket, has a comma directly inside]
    for mark in _BRACKET.finditer(text):
        kind = mark[0].removeprefix("\\")
        if kind == "," and stack:
            stack[-1][1] = True
        elif kind in tuple("([{"):
            stack.append([kind, False])
        elif kind in tuple(")]}") and stack:
            opened, has_comma = stack.pop()
            found[opened + kind] += has_comma
    return +found
