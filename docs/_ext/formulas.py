"""Formulas as pictures that are part of the page: no script, no font, no request.

ziamath sets LaTeX with its own STIX font, in pure Python. The colour is the text's, the size
follows it, and a screen reader gets the LaTeX.
"""

import re
from html import escape

import ziamath
from docutils import nodes
from sphinx.errors import ExtensionError

SIZE = 16  # ziamath's units per em
TALLEST = 12  # em; a formula that comes out higher is broken

ziamath.config.svg2 = False  # <use> would point into another formula of the same page
ziamath.config.math.color = "currentColor"
ziamath.config.precision = 2


def picture(latex: str, *, inline: bool) -> str:
    """An <svg> whose baseline is the text's."""
    # \lvert stretches, and where fractions nest ziamath stretches it without end.
    latex = re.sub(r"\\[lr]vert\b ?", "|", latex.strip())
    svg = ziamath.Latex(latex, size=SIZE, inline=inline).svg()
    head, box, rest = re.split(r'width="[^"]*" height="[^"]*" (viewBox="[^"]*")', svg, maxsplit=1)
    _, top, width, height = (float(x) / SIZE for x in re.findall(r"[-\d.]+", box))
    if height > TALLEST:
        raise ExtensionError(f"this formula comes out {height:.0f} em high: {latex}")
    style = f"width:{width:.2f}em;height:{height:.2f}em"
    style += f";vertical-align:{-top - height:.2f}em" if inline else ""
    return f'{head}role="img" aria-label="{escape(latex)}" style="{style}" {box}{rest}'


def visit_inline(translator, node):
    translator.body.append(f'<span class="math">{picture(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def visit_block(translator, node):
    translator.body.append(f'<div class="math">{picture(node.astext(), inline=False)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("formulas", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
