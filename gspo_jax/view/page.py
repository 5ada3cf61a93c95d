"""A page as a list of blocks, written as one HTML file or as Markdown beside its pictures.

    page(title, [Heading("Result"), Table(head, rows), Picture(...)])  ->  html(...) | markdown(...)

The HTML loads nothing: its style is inline and named by hash in a policy that allows no script,
no request and no other style; its pictures are inline SVG. Whatever text comes in is shown and
never obeyed: both renderers pass every string through `shown` and their escape.
"""

import base64
import hashlib
import html as escapes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from gspo_jax.files.whole import delivered
from gspo_jax.numbers.shown import measured
from gspo_jax.text.inert import inert, redact
from gspo_jax.view.run_files import Interval, is_number

NONE = "–"  # stands for a number that is not there
MOST_CHARACTERS = 20_000  # of a text
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#+!|~$&])")  # what Markdown would obey


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "" or "answer" (the one that a reader came for) or "note"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Text as it stands, line by line."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text; the first `left` columns hold words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Picture:
    """Panels for a page, each the text of an SVG file; `stem`.svg has them all in one."""

    stem: str
    alt: str
    panels: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until somebody wants them."""

    summary: str
    blocks: Sequence["Block"] = field(default_factory=list)


Block = Heading | Text | Items | Code | Table | Picture | Details


def write(path: Path, text: str) -> Path:
    """Replace a file at once.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    with delivered(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def shown(text: str, *, lines: bool = False, most: int = MOST_CHARACTERS) -> str:
    """`text` without control characters, direction overrides and credentials; cut if very long.

    Args:
        lines: keep its lines; otherwise it becomes a single one.
    """
    left = len(text) - most
    text = redact(text[:most])
    text = "\n".join(map(inert, text.splitlines())) if lines else inert(text)
    return f"{text} … ({left:,} more characters)" if left > 0 else text


def words(value: object, most: int = 4000) -> str:
    """A text, or the messages of a chat, of which at most so many characters are shown."""
    if isinstance(value, list):
        said = [message for message in value if isinstance(message, dict)]
        value = "\n".join(f"{m.get('role')}: {str(m.get('content'))[:most]}" for m in said)
    return shown(str(value), lines=True, most=most)


# ----------------------------------------------------------------------------------- numbers


def number(value: object, digits: int = 4) -> str:
    """Four digits by default: 0.02134, 12.3, 1,234; a dash for what is none."""
    if not is_number(value):
        return NONE
    assert isinstance(value, int | float)
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(interval: Interval | None) -> str:
    """39.3 % [35.1, 43.6]"""
    return _measured(interval, unit=" %")


def points(interval: Interval | None) -> str:
    """+3.1 [+1.2, +5.0], in percentage points"""
    return _measured(interval, sign="+")


def _measured(interval: Interval | None, **form: str) -> str:
    if interval is None or not is_number(interval.value):
        return NONE
    return measured(*interval, **form).replace("inf", "∞").replace("nan", NONE)  # pyright: ignore


# -------------------------------------------------------------------------------------- HTML


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file that loads nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src 'sha256-{digest}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    body = "\n".join(_html(block, f"f{k}") for k, block in enumerate(blocks))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{_escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_escaped(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _escaped(text: str, *, lines: bool = False) -> str:
    return escapes.escape(shown(text, lines=lines))


def _html(block: Block, name: str) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Text(text, kind):
            return f'<p class="{kind}">{_escaped(text)}</p>' if kind else f"<p>{_escaped(text)}</p>"
        case Items(texts):
            return f"<ul>{''.join(f'<li>{_escaped(text)}</li>' for text in texts)}</ul>"
        case Code(text):
            return f'<pre dir="auto">{_escaped(text, lines=True)}</pre>'
        case Table():
            return _html_table(block)
        case Picture(_, alt, panels, caption):
            drawn = "".join(inline(text, alt, f"{name}p{k}") for k, text in enumerate(panels))
            below = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
            return f'<figure><div class="panels">{drawn}</div>{below}</figure>'
        case Details(summary, inside):
            body = "\n".join(_html(b, f"{name}d{k}") for k, b in enumerate(inside))
            return f"<details><summary>{_escaped(summary)}</summary>\n{body}\n</details>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["w" if k < table.left else "n" for k in range(len(cells))]
        pairs = zip(kinds, cells, strict=True)
        return "".join(f'<{tag} class="{kind}">{_escaped(cell)}</{tag}>' for kind, cell in pairs)

    head = f"<thead><tr>{row(table.head, 'th')}</tr></thead>" if table.head else ""
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    # The keyboard reaches what must be scrolled.
    return f'<div class="wide" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def inline(text: str, alt: str, name: str) -> str:
    """An SVG file of ours as an element of a page.

    Its style attributes, which the page's policy forbids, become plain ones; its ids begin with
    `name`, so that figures of one page do not borrow each other's shapes; it has no size of its
    own, and no metadata.
    """
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", text))
    for element in root.iter():
        plain = {}
        for key, value in element.attrib.items():
            key = key.rpartition("}")[2]
            plain |= _presentation(value) if key == "style" else {key: value}
        if plain.get("id", "") not in used:
            plain.pop("id", None)
        for key, value in plain.items():
            if key == "id":
                plain[key] = f"{name}-{value}"
            elif key == "href" or "url(#" in value:
                plain[key] = value.replace("#", f"#{name}-")
        element.tag = _tag(element)
        element.attrib.clear()
        element.attrib.update(plain)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    label = shown(alt)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _presentation(style: str) -> dict[str, str]:
    """`fill: none; font: 700 11px 'A'` as attributes; the family is left to the page."""
    found = {}
    for part in style.split(";"):
        key, _, value = (piece.strip() for piece in part.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            found["font-size"] = size[1] if size else "10"
            if weight := re.match(r"bold|\d00", value):
                found["font-weight"] = weight[0]
        elif key and key != "font-family":
            found[key] = value
    return found


# ---------------------------------------------------------------------------------- Markdown


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same for GitHub; the pictures are files beside it, `stem`.svg."""
    return "\n\n".join([f"# {_quoted(title)}", *map(_markdown, blocks)]) + "\n"


def _quoted(text: str) -> str:
    return SPECIAL.sub(r"\\\1", shown(text))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_quoted(text)}"
        case Text(text, kind):
            return f"**{_quoted(text)}**" if kind == "answer" else _quoted(text)
        case Items(texts):
            return "\n".join(f"- {_quoted(text)}" for text in texts)
        case Code(text):
            text = shown(text, lines=True)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Table(head, rows, left):
            columns = max(map(len, [head, *rows]), default=0)
            rule = ["---" if k < left else "---:" for k in range(columns)]
            cells = [[_quoted(cell) for cell in row] for row in [head or [""] * columns, *rows]]
            lines = [cells[0], rule, *cells[1:]]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(stem, alt, _, caption):
            below = f"\n\n{_quoted(caption)}" if caption else ""
            return f"![{_quoted(alt)}]({stem}.svg){below}"
        case Details(summary, inside):
            body = "\n\n".join(map(_markdown, inside))
            head = escapes.escape(shown(summary))
            return f"<details>\n<summary>{head}</summary>\n\n{body}\n\n</details>"


# -------------------------------------------------------------------------------------- style

DARK = {  # the colours of our figures on a dark page
    "#374151": "#d1d5db",
    "#e5e7eb": "#2c323b",
    "#9aa1ab": "#4b5563",
    "#6b7280": "#9aa1ab",
    "#2f6db3": "#6ea8ea",
    "#d9772b": "#ee9a58",
    "#3a8f4f": "#62bb78",
    "#8e5fb8": "#b894dc",
    "#c0392b": "#ea7a6e",
    "#1f8a94": "#4fbac4",
    "#b0568f": "#d98abb",
    "#8a6d3b": "#bfa06a",
}
_DARK_FIGURES = "\n".join(
    f'  svg [{kind}="{light}"] {{ {kind}: {dark}; }}'
    for light, dark in DARK.items()
    for kind in ("fill", "stroke")
)
STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2937; --soft: #5b6472; --line: #e2e5ea; --shade: #f6f7f9;
  --mark: #2f6db3; --answer: #eef4fb;
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}}
main {{ max-width: 72rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: .6rem 0 .8rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
h1, h2, h3, p, li, td.w, summary {{ overflow-wrap: anywhere; }}
td:first-child {{ overflow-wrap: normal; }}
p, ul {{ max-width: 46rem; margin: .5rem 0; }}
.answer {{
  max-width: none; margin: 1rem 0; padding: .8rem 1rem; background: var(--answer);
  border-left: 4px solid var(--mark); font-size: 1.06rem;
}}
.note, figcaption {{ color: var(--soft); font-size: .9rem; max-width: 60rem; }}
.wide {{ overflow-x: auto; margin: .6rem 0; }}
table {{ border-collapse: collapse; font-size: .92rem; }}
th, td {{
  padding: .32rem 1.1rem .32rem 0; vertical-align: top; text-align: left; unicode-bidi: isolate;
  border-bottom: 1px solid var(--line);
}}
td.w {{ min-width: 7rem; }}
th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
th.n, td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.n {{ white-space: nowrap; }}
figure {{ margin: .6rem 0; }}
.panels {{
  display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
}}
svg {{ width: 100%; max-width: 27rem; height: auto; font-family: inherit; }}
pre {{
  margin: .4rem 0; padding: .6rem .8rem; background: var(--shade); border: 1px solid var(--line);
  border-radius: 6px; font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace;
  unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 36rem;
  overflow-y: auto;
}}
details {{ margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; padding: 0 .8rem; }}
details[open] {{ padding-bottom: .6rem; }}
summary {{ cursor: pointer; padding: .45rem 0; font-weight: 600; }}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #14171c; --ink: #e5e7eb; --soft: #a3abb8; --line: #2c323b; --shade: #1b1f26;
    --mark: #6ea8ea; --answer: #1a2431;
  }}
{_DARK_FIGURES}
}}
@media (max-width: 40rem) {{
  th, td {{ padding-right: .7rem; }}
  td.w {{ min-width: 5.5rem; }}
  table {{ font-size: .84rem; }}
}}
@media print {{ pre {{ max-height: none; }} }}
"""
