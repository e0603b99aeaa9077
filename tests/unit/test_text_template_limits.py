"""A template that never ends, or makes gigabytes, is refused; and what the limits change is nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text import template_limits
from dist_moe.text.chat_template import ChatTemplate

DOUBLING = "{% set ns = namespace(x='abc') %}{% for i in range(26) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
FIBONACCI = (
    "{% macro f(n) %}{% if n %}{% if f(n-1) %}{% endif %}{% if f(n-1) %}{% endif %}{% endif %}{% endmacro %}{{ f(80) }}"
)
TOO_MUCH = "it computes more than"
TOO_LONG = "it makes a text of more than"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TOO_MUCH),
        ("{% set s = 'a' * 1000000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}", TOO_MUCH),
        (DOUBLING.replace("OP", "~"), TOO_MUCH),
        (DOUBLING.replace("OP", "+"), TOO_MUCH),
        ("{% set s = 'a' * 99999 %}{% for a in range(9999) %}{{ s|upper }}{% endfor %}", TOO_MUCH),
        ("{% set s = 'a' * 99999 %}{% for a in range(9999) %}{% set t = s.upper() %}{% endfor %}", TOO_MUCH),
        (DOUBLING.replace("{% set ns.x = ns.x OP ns.x %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), TOO_MUCH),
        ("{% set s = 'a' * 140000000 %}{% set s = 'a' * 140000000 %}", TOO_MUCH),
        ("{{ 'a' * 10000000000 }}", TOO_LONG),
        ("{{ 'x'|center(10000000000) }}", TOO_LONG),
        ("{{ 'x'.ljust(10000000000) }}", TOO_LONG),
        ("{{ '{:{w}}'.format(1, w=10000000000) }}", TOO_LONG),
        ("{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}", TOO_LONG),
        ("{{ '%1000000000d' % 1 }}", "a width of more than 99999"),
        ("{{ '{:1000000000}'.format(1) }}", "a width of more than 99999"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "it computes a power"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(100001) }}", "Range too big"),
    ],
)
def test_a_template_has_an_end(source: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"a\.jinja cannot render these messages: .*" + reason):
        ChatTemplate(source, "a.jinja").render([])


@pytest.mark.parametrize("source", [FIBONACCI, "{% for a in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}"])
def test_time_is_limited_where_work_cannot_be_counted(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(UsageError, match=TOO_MUCH):
        ChatTemplate(source, "a.jinja").render([], s="a" * 10_000_000)


def test_a_template_too_deep_for_the_compiler_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a\.jinja cannot be used as a template"):
        ChatTemplate("{{ 'a'" + "|upper" * 5000 + " }}", "a.jinja")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for a in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}{% endfor %}",
            "1/32/33/3!",
        ),
        ("{% for a in 'ab' %}{{ loop.previtem }}{{ loop.nextitem }},{% endfor %}", "b,a,"),
        ("{% for k, v in {'a': 1}|items %}{{ k ~ v ~ none }}{% endfor %}", "a1None"),
        ("{% for a in missing %}x{% else %}y{% endfor %}", "y"),
        ("{% for a in range(5) if a % 2 %}{% if a > 2 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
        ("{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        (
            "{{ '%s: %05.1f' % ('a', 2.25) }} {{ '{:>5}'.format('b') }} {{ 7 * 6 }} {{ 1 + 2.5 }}",
            "a: 002.2     b 42 3.5",
        ),
        ("{{ [1, 2]|map('string')|join('-') }}{{ ('a' ~ missing)|length }}{{ none ~ '' }}", "1-21None"),
        ("{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call f(1) %}2{% endcall %}", "<12>"),
        ("{% generation %}{{ 'x' }}{% endgeneration %}y", "xy"),
        ("{{ {'b': '<ü>', 'a': 1}|tojson }}{{ [1, 'ü']|tojson(indent=1) }}", '{"b": "<ü>", "a": 1}[\n 1,\n "ü"\n]'),
        (
            "{{ {'b': 'ü', 'a': 1}|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
            '{"a":1,"b":"\\u00fc"}',
        ),
    ],
)
def test_what_templates_do_is_unchanged(source: str, expected: str) -> None:
    assert ChatTemplate(source, "a.jinja").render([]) == expected


def test_one_rendering_does_not_use_up_the_next_ones_limit() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% endfor %}x", "a.jinja")
    messages: list[dict[str, Any]] = []
    assert [template.render(messages) for _ in range(20)] == ["x"] * 20
