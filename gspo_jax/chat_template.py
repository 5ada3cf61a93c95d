"""Chat templates: programs that come with a model, run without trusting them.

A template is Jinja source written by whoever published the weights. It runs in Jinja's immutable
sandbox, which keeps it from Python's internals, and under a budget: of loop iterations and macro
calls together (no endless loop), and of the length of any text it builds (no memory bomb).
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

MAX_STEPS = 1_000_000  # loop iterations and macro calls of one rendering
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
            DataError: the template raised, broke out of the sandbox's rules, or its budget.
        """
        meter = _Meter()
        known = {"tools": None, "documents": None, **variables}
        parts, chars = [], 0
        try:
            for part in self._template.generate(known, _step=meter.step, _sized=meter.sized):
                parts.append(part)
                chars += len(part)
                if chars > MAX_CHARS:
                    raise _over_budget(f"{MAX_CHARS} characters of text")
        except (jinja2.TemplateError, ArithmeticError, LookupError) as error:
            raise DataError(f"{self.name}: {error}") from None
        except (TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            raise DataError(f"{self.name}: {type(error).__name__}: {error}") from None
        return "".join(parts)


def _over_budget(what: str) -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"the template needs more than {what}.")


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_CHARS:
        raise _over_budget(f"{MAX_CHARS} characters of text")
    return value


class _Meter:
    """Counts the steps of one rendering."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _over_budget(f"{MAX_STEPS} loop iterations")
        return ""

    sized = staticmethod(_sized)


class _Metered(NodeTransformer):
    """Rewrites a template so that every loop iteration and macro call counts one step."""

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name("_step", "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call))
        return node.set_lineno(node.lineno)

    visit_For = visit_Macro = visit_CallBlock = _with_step

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # `~` is the one way to build text that the environment's `intercepted_binops` misses.
        self.generic_visit(node)
        call = nodes.Call(nodes.Name("_sized", "load"), [node], [], None, None)
        return call.set_lineno(node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with operators that cannot build a huge value."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
                if repeats and len(sequence) * count > MAX_CHARS:
                    raise _over_budget(f"{MAX_CHARS} characters of text")
        if operator == "**" and not (abs(left) < 1e6 and abs(right) < 100):
            raise _over_budget("a small power")
        return _sized(super().call_binop(context, operator, left, right))

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


def _environment() -> jinja2.Environment:
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
