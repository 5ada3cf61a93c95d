"""A notebook as HTML: its text, its code, and the outputs that are stored in it."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

from formulas import picture
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def as_html(path: Path, lead: Callable[[Path], str]) -> str:
    """All cells in order; pictures are part of the page, links to files lead where `lead` says."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(_cell(cell) for cell in cells)
    for href, place, anchor in set(re.findall(r'(href="([^":#]+)((?:#[^"]*)?)")', text)):
        text = text.replace(href, f'href="{lead((path.parent / place).resolve())}{anchor}"')
    return text.replace("<table>", '<table class="docutils">').replace(
        "<code>", '<code class="docutils literal">'
    )


def _cell(cell: dict) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return _markdown().render(text)
    if cell["cell_type"] != "code":
        return ""
    shown = [f'<div class="highlight-python notranslate">{_coloured(text)}</div>']
    return "\n".join([*shown, *map(_output, cell.get("outputs", []))])


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return _plain("".join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        return f'<p><img alt="Output of the cell above" src="data:image/png;base64,{png}"></p>'
    return _plain("".join(data["text/plain"])) if "text/plain" in data else ""


def _plain(text: str) -> str:
    return f'<div class="highlight output"><pre>{html.escape(ESCAPES.sub("", text))}</pre></div>'


def _coloured(text: str) -> str:
    return highlight(text, PythonLexer(), HtmlFormatter())


def _markdown() -> MarkdownIt:
    def formula(text: str, options: dict) -> str:
        return picture(text, inline=not options["display_mode"])

    plugin = {"renderer": formula, "allow_labels": False}
    return MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, **plugin)
