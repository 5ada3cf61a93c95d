"""Chat templates: programs that come with a model, run without trusting them.

A template is Jinja source written by whoever published the weights. It runs in Jinja's immutable
sandbox, which keeps it from Python's internals, and under a budget: of loop iterations and macro
calls together (no endless loop), and of the length of any text that it writes or puts together
(no memory bomb). Widths inside format strings are the one thing not metered.
"""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from gspo_jax.errors import DataError

MAX_STEPS = 200_000  # loop iterations and macro calls of one rendering
MAX_CHARS = 10_000_000  # of any text built on the way; a prompt of 2 M tokens is about 8 M
# Methods and filters whose argument alone makes a text arbitrarily long.
PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs"}


class ChatTemplate:
    """A compiled chat template. `name` says in errors where it came from."""

    def __init__(self, source: str, *, name: str = "chat template"):
        self.name = name
        self._environment = _environment()
        try:
            tree = _Metered().visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{name}: not a chat template ({error}).") from None

    def render(self, variables: dict[str, Any]) -> str:
        """The text for these variables: `messages`, `add_generation_prompt`, token strings.

        Raises:
            DataError: the template raised, or left the sandbox's rules or its budget.
        """
        self._environment.steps = 0
        known = {"tools": None, "documents": None, **variables}
        parts, length = [], 0
        try:
            for part in self._template.generate(known):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARS:
                    raise _TOO_LONG
        except jinja2.TemplateError as error:
            raise DataError(f"{self.name}: {error}") from None
        except Exception as error:  # the template is a program: it can fail like any other
            raise DataError(f"{self.name}: {type(error).__name__}: {error}") from None
        return "".join(parts)


_TOO_LONG = jinja2.TemplateRuntimeError(f"the template writes more than {MAX_CHARS} characters.")


class _Metered(NodeTransformer):
    """Rewrites a template so that every loop iteration and macro call counts one step.

    The calls go through attributes of the environment, which a template cannot name, and so
    cannot replace.
    """

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        return node.set_lineno(node.lineno)

    visit_For = visit_Macro = visit_CallBlock = _with_step

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # `~` is the one operator that `intercepted_binops` below cannot see.
        self.generic_visit(node)
        sized = nodes.Call(nodes.EnvironmentAttribute("sized"), [node], [], None, None)
        return sized.set_lineno(node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, which counts steps and whose operators build no huge value."""

    intercepted_binops = frozenset({"+", "*", "**"})
    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"the template takes more than {MAX_STEPS} steps.")

    def sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARS:
            raise _TOO_LONG
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
                if repeats and len(sequence) * count > MAX_CHARS:
                    raise _TOO_LONG
        if operator == "**" and not (abs(left) < 1000 and abs(right) < 100):
            raise jinja2.TemplateRuntimeError("the template takes a power of a large number.")
        return self.sized(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which some templates put around the answers.

    It marks text for other tools and writes nothing itself.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> _Sandbox:
    """The settings and helpers that chat templates are written for (those of transformers)."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    for name in PADDING & set(environment.filters):
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any):
    # Jinja's own filter escapes HTML, which a language model should not have to read.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
