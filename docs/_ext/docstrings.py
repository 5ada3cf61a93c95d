"""Our docstrings as reStructuredText, and signatures as they stand in the source.

A docstring here is plain text: `code` between single backticks, formulas and tables indented, and
Google's sections. Everything else that reStructuredText would read as markup is escaped.
"""

import ast
import dataclasses
import inspect
import re
import textwrap

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
MOST_FIELDS = 6  # of a record whose fields are shown in its signature
MARKUP = re.compile(r"[\\|]|(?<=\w)_(?!\w)|\*(?!\w[^*\n]*\*)(?<!\w\*)")  # *word* stays
SPAN = re.compile(r"`([^`]+)`", re.DOTALL)


def as_rst(lines: list[str]) -> list[str]:
    """Spans doubled, markup escaped, indented blocks outside of sections made literal."""
    out: list[str] = []
    prose: list[str] = []
    in_section = in_literal = False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            in_section, in_literal = bool(SECTION.match(line)), False
        elif line.strip() and not in_section and not in_literal and not (prose and prose[-1]):
            in_literal = True
            out += [*_escaped(prose), "", "::", ""]
            prose = []
        if in_literal:
            out.append(line)
        else:
            prose.append(line)
    return out + _escaped(prose)


def _escaped(lines: list[str]) -> list[str]:
    pieces = SPAN.split("\n".join(lines))
    for i, piece in enumerate(pieces):
        code = " ".join(piece.split()) if i % 2 else ""
        pieces[i] = f"``{code}``" if code else MARKUP.sub(r"\\\g<0>", piece)
    return "".join(pieces).split("\n")


def as_written(function) -> tuple[str, str | None] | None:
    """Parameters and result of a function, with the annotations' own names and spelling."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    (node,) = ast.parse(source).body
    if not isinstance(node, ast.FunctionDef):
        return None
    a = node.args
    positional, stars = [*a.posonlyargs, *a.args], []
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    parts = [_parameter(source, *pair) for pair in zip(positional, defaults, strict=True)]
    parts = [part for part in parts if part not in ("self", "cls")]
    if a.vararg:
        stars = [f"*{_parameter(source, a.vararg, None)}"]
    elif a.kwonlyargs:
        stars = ["*"]
    keywords = zip(a.kwonlyargs, a.kw_defaults, strict=True)
    parts += stars + [_parameter(source, *pair) for pair in keywords]
    if a.kwarg:
        parts.append(f"**{_parameter(source, a.kwarg, None)}")
    returns = ast.get_source_segment(source, node.returns) if node.returns else None
    return f"({', '.join(parts)})", returns and " ".join(returns.split())


def _parameter(source: str, argument: ast.arg, default: ast.expr | None) -> str:
    text = " ".join((ast.get_source_segment(source, argument) or argument.arg).split())
    if default is None:
        return text
    space = " = " if argument.annotation else "="
    return f"{text}{space}{ast.get_source_segment(source, default)}"


def fields_of(kind: type) -> dict[str, str]:
    """Name -> annotation, as written, of a dataclass or named tuple; nothing for other classes."""
    if not (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        return {}
    source = textwrap.dedent(inspect.getsource(kind))
    body = ast.parse(source).body[0].body
    known = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {n.target.id: ast.get_source_segment(source, n.annotation) for n in known}


def on_docstring(app, what, name, obj, options, lines):
    if what == "class" and "Attributes:" in lines:
        for field, kind in fields_of(obj).items():
            start = f"    {field}: "
            lines[:] = [line.replace(start, f"    {field} (`{kind}`): ", 1) for line in lines]
    lines[:] = as_rst(lines)


def on_signature(app, what, name, obj, options, signature, returns):
    if what in ("function", "method") and callable(obj):
        return as_written(obj)
    if what == "class":
        fields = fields_of(obj)
        if 0 < len(fields) <= MOST_FIELDS:
            return f"({', '.join(f'{name}: {kind}' for name, kind in fields.items())})", None
        return "" if fields or "__init__" not in vars(obj) else as_written(obj.__init__)[0], None
    return None


def setup(app):
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", on_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
