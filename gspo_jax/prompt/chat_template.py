"""Chat templates: programs that come with a model, run without trusting them.

A template is Jinja source written by whoever published the weights. It runs in a sandbox under a
budget of steps, characters and seconds: see `sandbox`.
"""

from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols

from gspo_jax.errors import DataError
from gspo_jax.prompt.sandbox import MAX_CHARS, Sandbox, too_long

MAX_SOURCE = 2**18  # characters; published templates have some ten thousand


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        name: says in errors where it came from.
        variables: the names that it looks at: `messages`, `bos_token`, `enable_thinking`, ...
        keys: the names of parts that it looks at, of messages and of what is in them: `content`,
            `tool_calls`, ...
    """

    def __init__(self, source: str, *, name: str = "chat template"):
        self.name = name
        self._environment = _environment()
        if len(source) > MAX_SOURCE:
            raise DataError(f"{name}: {len(source)} characters; at most {MAX_SOURCE} are read.")
        try:
            parsed = self._environment.parse(source)
            self.variables = meta.find_undeclared_variables(parsed)
            self.keys = {node.attr for node in parsed.find_all(nodes.Getattr)}
            self.keys |= {
                node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)
            }
            self._template = self._environment.from_string(self._environment.metered(source))
        except Exception as error:  # Python compiles what Jinja made of it, and may refuse it too
            raise DataError(f"{name}: not a chat template ({_one_line(error)}).") from None

    def render(self, variables: dict[str, Any]) -> str:
        """The text for these variables: `messages`, `add_generation_prompt`, token strings.

        Raises:
            DataError: the template raised, or left the sandbox's rules or its budget.
        """
        self._environment.begin()
        known = {"tools": None, "documents": None, **variables}
        parts, length = [], 0
        try:
            for part in self._template.generate(known):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARS:
                    raise too_long()
        except jinja2.TemplateError as error:
            raise DataError(f"{self.name}: {_one_line(error)}") from None
        except Exception as error:  # the template is a program: it can fail like any other
            kind = type(error).__name__
            raise DataError(f"{self.name}: {kind}: {_one_line(error)}") from None
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which some templates put around the answers.

    It marks text for other tools and writes nothing itself.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> Sandbox:
    """The settings and helpers that chat templates are written for (those of transformers)."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(str(form)[:100])
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    """What the template's author may have written, without line breaks and terminal commands."""
    text = " ".join(str(error)[:1000].split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
