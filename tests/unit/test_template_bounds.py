"""Chat templates are programs of strangers: what real ones need is there, and none can run on or fill the memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pyggml.errors import FormatError
from pyggml.tokenizer.chat_template import ChatTemplate

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "bye"},
]

#: Template: what it writes for TALK.
WRITES = {
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}A:": "U:hi;A:yes;U:bye;A:",
    "{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}": "hiyesbye",
    "{% if tools is not none %}T{% endif %}{% if documents is not none %}D{% endif %}x": "x",
    "{% if tools %}T{% endif %}{% for t in tools %}T{% endfor %}{% for d in documents %}D{% endfor %}x": "x",
    "{% if enable_thinking is defined and enable_thinking is false %}N{% endif %}x": "x",
    "{{ 'functions: ' + functions + '.' }}": "functions: .",
    "{{ functions ~ '.' }}": ".",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }} {% endfor %}":
        "1/3FalseFalse 2/3FalseTrue 3/3TrueTrue ",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "2",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}{% else %}E{% endfor %}": "hi",
    "{% for k, v in messages[0]|dictsort %}{{ k }}={{ v }} {% endfor %}": "content=hi role=user ",
    "{% macro f(x) -%}[{{ x }}]{%- endmacro %}{{ f(messages[0].content) + f(1) }}": "[hi][1]",
    "{{ messages|map(attribute='content')|join(', ') }}": "hi, yes, bye",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "2",
    "{{ messages[-1].content.split('y')[0].strip('b') ~ 'x' * 3 }}": "xxx",
    "{{ '%s-%d' % ('a', 3) }}{{ '{}'.format('b') }}{{ 'aXb'|replace('X', '-') }}": "a-3ba-b",
    "{{ messages[:1]|tojson(indent=1) }}": '[\n {\n  "role": "user",\n  "content": "hi"\n }\n]',
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}": "123",
    "{% set x %}a{{ messages[0].content }}{% endset %}{{ x|upper }}{{ 1.5 * 2 }}{{ 2 ** 3 }}{{ [1] + [2] }}": "AHI3.08[1, 2]",
}  # fmt: skip

X = "'x' * 100000"
LOOP = "{% for a in range(100000) %}"
#: Templates that would take hours or all memory, or nest deeper than a compiler goes.
ENDLESS = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "text": LOOP * 2 + "xxxxxxxxxxxxxxxx" + "{% endfor %}" * 2,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [range(10)|list] recursive %}{{ loop([[1, 2, 3] * 9] * 9) }}{% endfor %}",
    "joined text": "{% set n = namespace(x='x') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "added lists": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
    "block": "{% set x %}" + LOOP + "{{ " + X + " }}{% endfor %}{% endset %}",
    "products of numbers": "{% set n = namespace(x=9) %}" + LOOP + "{% set n.x = n.x * n.x %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "long source": "x" * (1 << 21),
    "lists in text": "{{ ([['x' * 1000] * 1000] * 1000)|string|length }}",
    "lists of lists": "{{ ([range(100000)] * 100000)|map('list')|list|length }}",
} | {
    text: "{{ (" + text + ")|string|length }}"
    for text in (
        "[1]|slice(1000000000)|list", "[1]|batch(1000000000, 'x')|list", "10 ** 1000000", "'x' * 1000000000",
        "[1] * 1000000000", "'x'|center(1000000000)", "'x'.ljust(1000000000)", "'{:1000000000}'.format(1)",
        "'{0:>{1}}'.format('x', 1000000000)", "'%1000000000d' % 1", "'%*d' % (1000000000, 1)", "'%1000000000d'|format(1)",
        f"({X})|replace('x', {X})", f"({X}).replace('x', {X})", f"range(100000)|join({X})", f"({X}).join(['x'] * 100000)",
        "('\n' * 100000)|indent(100000)", "('\t' * 100000).expandtabs(100000)", "([['x' * 1000] * 1000] * 1000)|tojson",
        "{'a': 1}|tojson(indent=1000000000)", "([range(1000)|list] * 1000)|sum(start=[])", "1|round(1000000000)", "lipsum(n=9)",
    )
}  # fmt: skip


@pytest.mark.parametrize("source", WRITES)
def test_what_templates_write(source: str) -> None:
    """Loops, macros, filters, transformers' tags and names that are not given work as authors of templates expect."""
    assert ChatTemplate(source, "m.gguf").render(messages=TALK) == WRITES[source]


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_end(name: str) -> None:
    """A template that would not end, or make more than a machine holds, is a `FormatError` within seconds."""
    start_s = time.monotonic()
    with pytest.raises(FormatError, match="the chat template"):
        ChatTemplate(ENDLESS[name], "m.gguf").render(messages=TALK)
    assert time.monotonic() - start_s < 25  # its own limit is 5 s; the rest is for machines under load


def test_a_long_conversation_is_no_attack() -> None:
    """The bounds grow with what is given: a conversation of 20 MB is rendered."""
    talk = [{"role": "user", "content": "x" * 10_000_000}] * 2
    text = ChatTemplate("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", "m.gguf").render(
        messages=talk
    )
    assert len(text) == 20_000_004


def test_a_template_may_be_used_again_after_it_was_stopped() -> None:
    """Each rendering has a budget of its own."""
    template = ChatTemplate("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}x", "m.gguf")
    with pytest.raises(FormatError):
        template.render(n=100_000)
    assert template.render(n=3) == "x"


@pytest.mark.skipif(
    "LLAMA_CPP_SOURCE" not in os.environ, reason="LLAMA_CPP_SOURCE names no folder of llama.cpp's source"
)
def test_llama_cpps_own_templates() -> None:
    """Every template in llama.cpp's folder of them renders a conversation."""
    found = sorted(Path(os.environ["LLAMA_CPP_SOURCE"], "models", "templates").glob("*.jinja"))
    assert len(found) > 50
    for path in found:
        template = ChatTemplate(path.read_text(encoding="utf-8"), path.name)
        text = template.render(messages=TALK, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
        assert "bye" in text, path.name
