"""Chat templates: rendered as their authors meant, and harmless whoever the author is."""

import re
from datetime import datetime

import pytest

from gspo_jax import chat_template
from gspo_jax.chat_template import MAX_CHARS, ChatTemplate
from gspo_jax.errors import DataError

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
    monkeypatch.setattr(chat_template, "MAX_STEPS", 12)  # one rendering takes 8
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
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_broken_template_is_one_line_error(source, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_STEPS", 5000)  # of 200,000, to be quick
    with pytest.raises(DataError, match=r"^t\.jinja: ") as caught:
        assert len(render(source)) < 2 * MAX_CHARS  # and fail, as nothing was raised
    assert "\n" not in str(caught.value)


def test_methods_that_pad_are_refused_before_they_allocate():
    with pytest.raises(DataError, match="'ljust' of 'str' object is unsafe"):
        render("{{ 'a'.ljust(3) }}")
    with pytest.raises(DataError, match="No filter named 'center'"):
        render("{{ 'a'|center(3) }}")


def test_long_conversations_are_within_the_budget():
    messages = [{"role": "user", "content": "x" * 2000}] * 2000  # 4 million characters
    source = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content }}{% endfor %}"
    assert len(render(source, messages=messages)) == 2000 * 2006
