"""A Jinja sandbox with a budget: of steps, of characters made, of seconds.

Jinja's own immutable sandbox keeps a template from Python's internals and from changing what it is
given. It does not keep it from running for ever, or from filling the memory. Here

    a step    is a loop iteration or a macro call; they are counted
    a text    is at most MAX_CHARS long, and all texts made together MAX_MADE
    a list    is weighed with everything in it, as often as it is in it: what is written, compared
              or joined later cannot be larger than what was weighed
    a clock   is looked at in each of these places, and in every call and filter

What makes a text much longer than its arguments (replace, join, indent, a format's width) is
reckoned before it is done. Filters and methods of strings are those on a list: the others are
rarely seen in chat templates and would each need a bound of their own.
"""

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from functools import wraps
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # loop iterations and macro calls of one rendering
MAX_CHARS = 10_000_000  # of any text built on the way; a prompt of 2 M tokens is about 8 M
MAX_MADE = 10 * MAX_CHARS  # of all of them together
MAX_SECONDS = 20.0
ITEM = 16  # characters that one element of a list, or one number, is counted as
WIDTH = 999  # of a formatted field, at most

FILTERS = """abs attr capitalize count d default dictsort e escape first float format groupby indent
int items join last length list lower map max min reject rejectattr replace reverse round safe
select selectattr sort string title tojson trim truncate unique upper wordcount""".split()  # noqa: SIM905
METHODS = """capitalize casefold count endswith find format format_map index isalnum isalpha isascii
isdecimal isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
swapcase title upper""".split()  # noqa: SIM905
LONG_FIELD = re.compile(r"%(\([^)]*\))?[-#0 +]*(\d{4}|\*|\d*\.(\d{4}|\*))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. `begin` gives it a fresh budget; `metered` is what it compiles."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name in {"lipsum"} & set(self.globals):
            del self.globals[name]
        own = {"indent": _indent, "join": _join, "replace": _replace, "round": _round}
        own |= {"format": self._format, "tojson": _tojson}
        known = {name: self.filters[name] for name in FILTERS} | own
        self.filters = {name: self._watched(function) for name, function in known.items()}
        self.tests = {name: self._watched(test) for name, test in self.tests.items()}
        self.begin()

    def begin(self) -> None:
        """A fresh budget."""
        self._steps = self._made = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def metered(self, source: str) -> nodes.Template:
        """The syntax tree of a template, in which everything that costs is counted."""
        return _Metered().visit(self.parse(source))

    # What the tree calls, through attributes of the environment: a template cannot name them.

    def step(self) -> None:
        """A loop iteration, or a macro call."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _too_much(f"takes more than {MAX_STEPS} steps")
        self.tick()

    def out(self, value: Any) -> str:
        """What is written, into the result or into a variable."""
        return self.sized(value if isinstance(value, str) else str(value))

    def sized(self, value: Any) -> Any:
        """`value`, if it is not too large."""
        self.tick()
        if isinstance(value, str):
            self._made += len(value)
            _at_most(len(value))
            if self._made > MAX_MADE:
                raise _too_much(f"makes more than {MAX_MADE} characters")
        else:
            weigh(value)
        return value

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise _too_much(f"takes more than {MAX_SECONDS:g} seconds")

    # What Jinja itself calls.

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)
        __self.tick()
        own = OWN_METHODS.get(__obj.__name__) if isinstance(owner, str) else None
        if own is not None:
            return __self.sized(own(owner, *args))
        return __self.sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and numbers and left.bit_length() + right.bit_length() > 1024:
            raise _too_much("multiplies large numbers")
        if operator == "*" and not numbers:
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str) and isinstance(count, int):
                    _at_most(len(sequence) * count)
                if isinstance(sequence, list | tuple) and isinstance(count, int):
                    _at_most(weigh(sequence) * count)
        if operator == "**" and not (abs(left) < 1000 and abs(right) < 100):
            raise _too_much("takes a power of a large number")
        if operator == "%" and isinstance(left, str):
            if LONG_FIELD.search(left):
                raise _too_much(f"formats a field wider than {WIDTH}")
            _at_most(len(left) + left.count("%") * (weigh(right) + 2 * WIDTH))
        return self.sized(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int | float) and callable(value):
            return isinstance(obj, str) and attr in METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        @wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            fields = [spec for _, name, spec, _ in Formatter().parse(text) if name is not None]
            if any(re.search(r"\d{4}|\{", spec or "") for spec in fields):
                raise _too_much(f"formats a field wider than {WIDTH}")
            _at_most(len(text) + len(fields) * (weigh([args, kwargs]) + 2 * WIDTH))
            return wrapped(*args, **kwargs)

        return checked

    def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
        return self.call_binop(None, "%", str(text), kwargs or args)

    def _watched(self, function: Callable) -> Callable:
        """A filter or test that looks at the clock, and whose result is weighed."""

        @wraps(function)  # also copies the mark that says what Jinja passes first
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return self.sized(function(*args, **kwargs))

        return watched


class _Metered(NodeTransformer):
    """Puts a call into the tree wherever something is repeated, made, compared or written."""

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step")))
        return node.set_lineno(node.lineno)

    visit_For = visit_Macro = visit_CallBlock = _with_step

    def _sized(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # the target of an assignment
        return node if stored else _call("sized", node)

    visit_Concat = visit_Compare = visit_List = visit_Tuple = visit_Dict = _sized

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._sized(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _call("out", nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n)
            for n in node.nodes
        ]
        return node


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
    if arguments:
        call.set_lineno(arguments[0].lineno)
    return call


def weigh(value: Any) -> int:
    """Characters that writing `value` may take, what is in it counted as often as it is there.

    Raises:
        jinja2.TemplateRuntimeError: more than MAX_CHARS.
    """
    weight, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str | bytes):
            weight += len(item) + ITEM
        elif isinstance(item, int):
            weight += item.bit_length() // 3 + ITEM
        elif isinstance(item, dict):
            weight += ITEM
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            weight += ITEM
            left.extend(item)
        elif isinstance(item, Namespace):
            weight += ITEM
            left.append(item._Namespace__attrs)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            weight += ITEM
        if weight + len(left) * ITEM > MAX_CHARS:
            raise too_long()
    return weight


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _at_most(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


@pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: str | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [environment.getattr(item, attribute) for item in items]
    _at_most(weigh(items) + len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _join_method(separator: str, items: Any) -> str:
    return _join(None, items, separator)


OWN_METHODS: dict[str, Callable[..., str]] = {"replace": _replace, "join": _join_method}


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, WIDTH)
    lines = str(text).split("\n")
    _at_most(len(text) + len(lines) * len(prefix))
    filled = [prefix + line if line or blank else line for line in lines[1:]]
    return "\n".join([prefix + lines[0] if first else lines[0], *filled])


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a language model should not have to read.
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise _too_much("indents JSON by more than 16")
    encoder = json.JSONEncoder(
        indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
    )
    return "".join(_limited(encoder.iterencode(value)))


def _limited(parts: Iterable[str]) -> Iterable[str]:
    length = 0
    for part in parts:
        length += len(part)
        _at_most(length)
        yield part


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 100:
        raise _too_much("rounds to more than 100 digits")
    return do_round(value, precision, method)  # pyright: ignore[reportArgumentType]


def _at_most(length: int) -> None:
    if length > MAX_CHARS:
        raise too_long()


def too_long() -> jinja2.TemplateRuntimeError:
    return _too_much(f"writes more than {MAX_CHARS} characters")


def _too_much(what: str) -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"the template {what}.")
