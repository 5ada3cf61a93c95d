"""Chat templates: rendered as their authors meant, and harmless whoever the author is."""

import json
import re
import subprocess
import sys
from datetime import datetime

import pytest

from gspo_jax.errors import DataError
from gspo_jax.prompt import sandbox
from gspo_jax.prompt.chat_template import MAX_SOURCE, ChatTemplate
from gspo_jax.prompt.sandbox import MAX_CHARS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & é?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Why?"},
]


def render(source, **variables):
    given = {"messages": MESSAGES, "add_generation_prompt": True, **variables}
    return ChatTemplate(source, name="t.jinja").render(given)


# The constructs that published templates use: a namespace changed in a loop, messages read
# backwards, slices, string methods, loop controls, macros, tests, concatenation with ~.
ELABORATE = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, text) -%}
    {{ '<|im_start|>' ~ role + '\\n' + text ~ '<|im_end|>\\n' }}
{%- endmacro %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- turn(message.role, content) }}
    {%- if loop.last %}{{ messages[0].content|trim }}{{ ns.last }}{% endif %}
{%- endfor %}
{%- if tools %}never{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def test_an_elaborate_template_renders_as_written():
    text = (
        "<|im_start|>user\n1 < 2 & é?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\nBe brief.3<|im_start|>assistant\n"
    )
    assert render(ELABORATE) == text
    assert render(ELABORATE, enable_thinking=False) == text + "<think>\n\n</think>\n\n"


def test_rendering_equals_that_of_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    blocks = (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  [{{ m | tojson }}]\n"
        "    {% endif %}\n{% endfor %}\n{{ messages | tojson(indent=2) }}"
    )
    for source in (ELABORATE, blocks):
        (theirs,), _ = render_jinja_template([MESSAGES], chat_template=source)
        assert render(source, add_generation_prompt=False) == theirs


def test_json_is_not_escaped_for_html():
    assert render("{{ messages[1].content | tojson }}") == '"1 < 2 & é?"'


def test_the_usual_helpers_exist():
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{{ strftime_now('%Y') }}")[:2] == datetime.now().strftime("%Y")[:2]
    assert render("a{% generation %}b{{ 1 + 1 }}{% endgeneration %}c") == "ab2c"
    with pytest.raises(DataError, match=r"^t\.jinja: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_rendering_twice_gives_the_same_and_has_the_budget_twice(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 12)  # one rendering takes 8
    template = ChatTemplate(ELABORATE)
    first = template.render({"messages": MESSAGES})
    assert template.render({"messages": MESSAGES}) == first


def nested(body):
    """10^20 turns of a loop that `range` alone does not refuse."""
    return "{% for a in range(99999) %}" * 4 + body + "{% endfor %}" * 4


HOSTILE = {
    "python internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ strftime_now.__globals__.os.getcwd() }}",
    "init": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "environment": "{{ environment.step() }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "huge range": "{% for a in range(10**9) %}x{% endfor %}",
    "silent endless loop": nested(""),
    "writing endless loop": nested("x"),
    "own step": "{% set step = namespace %}{% set environment = 1 %}" + nested(""),
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "call block": "{% macro f() %}{{ caller() }}{% endmacro %}"
    + nested("{% call f() %}{% endcall %}"),
    "gigabyte": "{{ 'a' * 10**9 }}",
    "gigabyte, other way": "{{ 10**9 * 'a' }}",
    "gigabyte of list": "{{ [1] * 10**9 }}",
    "gigabyte in parts": "{% for a in range(1001) %}{{ 'a' * 10000 }}{% endfor %}",
    "doubling with +": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "power": "{{ 9**9**9 }}",
    "padding method": "{{ 'a'.ljust(10**9) }}",
    "padding filter": "{{ 'a'|center(10**9) }}",
    "division": "{{ 1 // 0 }}",
    "undefined": "{{ messages[0].nothing.at_all }}",
    "type": "{{ 1 + 'a' }}",
    "syntax": "{% for %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "loops that Python does not nest so deep": "{% for a in [1] %}" * 21 + "{% endfor %}" * 21,
    "gigabyte of source": "x" * (MAX_SOURCE + 1),
    "own error over many lines": "{{ raise_exception('a\\n\\x1b[2Jb' * 10000) }}",
}

BIG = "{% set big = 'ab' * 4000000 %}"  # 8 of the 10 million characters that a text may have
# Each would take gigabytes or hours where the sandbox counts loops and calls alone.
BOMBS = {
    "width of %": "{{ '%1000000000d' % 1 }}",
    "width of % by argument": "{{ '%*d' % (1000000000, 1) }}",
    "precision of %": "{{ '%.1000000000f' % 1.5 }}",
    "width after a key": "{{ '%(a)01000000000d' % {'a': 1} }}",
    "width of the filter": "{{ '%1000000000d'|format(1) }}",
    "width of the filter by keyword": "{{ '%(a)1000000000d'|format(a=1) }}",
    "width of format": "{{ '{:>1000000000}'.format(1) }}",
    "width of format by argument": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "width of format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "width of format, fetched": "{{ ('{:>1000000000}'|attr('format'))(1) }}",
    "width of format, mapped": "{{ ['%1000000000d']|map('format', 1)|list }}",
    "format of many": BIG + "{{ ('{0}' * 1000).format(big) }}",
    "% of many": BIG + "{{ ('%(a)s' * 1000) % {'a': big} }}",
    "replace": BIG + "{{ big.replace('a', big) }}",
    "replace of nothing": BIG + "{{ big.replace('', big) }}",
    "replace filter": BIG + "{{ big|replace('a', big) }}",
    "replace in map": BIG + "{{ ['a' * 1000]|map('replace', 'a', big)|list }}",
    "join by a long text": BIG + "{{ big.join('a' * 1000) }}",
    "join filter": BIG + "{{ range(1000)|join(big) }}",
    "join of one text many times": BIG + "{{ ([big] * 1000)|join }}",
    "join of an attribute": BIG + "{{ ([{'a': big}] * 1000)|join(attribute='a') }}",
    "join of a generator": BIG + "{{ ([1] * 1000)|map('default', 0)|join(big) }}",
    "a list with one text many times": BIG + "{{ [big] * 1000 }}",
    "a list, concatenated": BIG + "{{ 'a' ~ [big, big] ~ [big, big] }}",
    "texts from a map": BIG + "{{ range(1000)|map('replace', '1', big)|list|length }}",
    "translate": BIG + "{{ big.translate({97: big}) }}",
    "indent": "{{ ('a\\n' * 100000)|indent(1000000) }}",
    "indent by a text": BIG + "{{ ('a\\n' * 100000)|indent(big) }}",
    "indented JSON": "{{ [[1]]|tojson(indent=1000000000) }}",
    "JSON of one list many times": BIG + "{{ ([big[:4000000]] * 1000)|tojson }}",
    "JSON separated by a text": BIG + "{{ range(1000)|list|tojson(separators=(big, big)) }}",
    "deep JSON": "{% set n = namespace(l=[1] * 50000) %}{% for a in range(300) %}"
    "{% set n.l = [n.l] %}{% endfor %}{{ n.l|tojson(indent=16) }}",
    "doubling list": "{% set n = namespace(l=[1]) %}{% for a in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "doubling dict": "{% set n = namespace(l={}) %}{% for a in range(60) %}"
    "{% set n.l = {'a': n.l, 'b': n.l} %}{% endfor %}{{ n.l }}",
    "doubling namespaces": "{% set n = namespace(l=1) %}{% for a in range(60) %}"
    "{% set n.l = namespace(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}",
    "doubling by comparison": "{% set n = namespace(l=[1], m=[1]) %}{% for a in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
    "doubling by views": "{% set n = namespace(l={}) %}{% for a in range(60) %}"
    "{% set n.l = {'a': n.l.items(), 'b': n.l.items()} %}{% endfor %}{{ n.l }}",
    "a variable written into": BIG + "{% set x %}{% for a in range(99999) %}{{ big }}{% endfor %}"
    "{% endset %}",
    "a variable of constants": "{% set x %}{% for a in range(99999) %}"
    + "x" * 100000
    + "{% endfor %}{% endset %}",
    "a macro that doubles": "{% macro f(n) %}{% if n %}{% set x = f(n-1) %}{{ x }}{{ x }}"
    "{% else %}aaaaaaaaaa{% endif %}{% endmacro %}{{ f(60)|length }}",
    "blocks that call themselves": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "squared numbers": "{% set n = namespace(x=999) %}{% for a in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "round": "{{ 5|round(-1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "wordwrap": BIG + "{{ ('a b ' * 100000)|wordwrap(1, wrapstring=big) }}",
    "slow comparisons": BIG + BIG.replace("big", "same") + "{% if big == same %}{% endif %}" * 5000,
    "slow searches": BIG + "{% for a in range(99999) %}{{ big.count('b') + big.count('a') }}"
    "{% endfor %}",
    "slow filters": BIG + "{% for a in range(99999) %}{% set x = big|upper|lower|title %}"
    "{% endfor %}",
    "slow slices": BIG + "{% set x = big[::-1] %}" * 5000,
    "slow tests": BIG + "{% for a in range(99999) %}{{ big is upper or big is lower }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_broken_template_is_one_line_error(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 5000)  # of 200,000, to be quick
    with pytest.raises(DataError, match=r"^t\.jinja: ") as caught:
        assert len(render(source)) < 2 * MAX_CHARS  # and fail, as nothing was raised
    assert "\n" not in str(caught.value)


# Python itself and Jinja are some 0.3 GB of address space; a text of 10 M wide characters is 40 MB.
UNDER_LIMITS = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
from gspo_jax.prompt import sandbox
from gspo_jax.prompt.chat_template import MAX_SOURCE, ChatTemplate
from gspo_jax.errors import DataError
sandbox.MAX_SECONDS = 0.3
for name, source in json.load(sys.stdin).items():
    began = time.monotonic()
    try:
        said = f"nothing, and wrote {len(ChatTemplate(source, name='t').render({}))}"
    except DataError as error:
        said = str(error)
    # Not ru_maxrss: that of a child starts at what its parent had when it was forked.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) / 2**10
    print(json.dumps([name, said, time.monotonic() - began, peak]))
"""


@pytest.mark.long
def test_bombs_are_refused_in_time_and_before_they_take_memory():
    """In a process that may not have more than 2 GB, so that a mistake here costs nothing."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMITS],
        input=json.dumps(BOMBS),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in told] == list(BOMBS)
    limits = "the template |unsafe|is undefined|No filter named|maximum recursion"
    for name, said, _, peak in told:
        assert re.search(limits, said), (name, said)
        assert "MemoryError" not in said and peak < 1024, (name, said, peak)


def test_methods_that_pad_are_refused_before_they_allocate():
    with pytest.raises(DataError, match="'ljust' of 'str' object is unsafe"):
        render("{{ 'a'.ljust(3) }}")
    with pytest.raises(DataError, match="No filter named 'center'"):
        render("{{ 'a'|center(3) }}")


def test_long_conversations_are_within_the_budget():
    messages = [{"role": "user", "content": "x" * 2000}] * 2000  # 4 million characters
    source = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content }}{% endfor %}"
    assert len(render(source, messages=messages)) == 2000 * 2006
