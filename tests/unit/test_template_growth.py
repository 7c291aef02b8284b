"""No construct of a template makes a huge text at a stroke; each route has its test."""

from __future__ import annotations

import pytest

from paddock_server.worker.growth import MOST_CHARACTERS, TextBuffer, text_length
from paddock_server.worker.sandbox import compile_template

HUGE = MOST_CHARACTERS + 1
TEXT = "x" * 10_000
DOUBLING = "{% set ns = namespace(s=text) %}{% for i in range(12) %}"
NESTING = "{% set ns = namespace(l=['x']) %}{% for i in range(30) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
"""A list that takes 30 small lists of memory, and as a text gigabytes."""

ROUTES = {
    "concat": DOUBLING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "concat of markup": DOUBLING
    + "{% autoescape true %}{% set ns.s = ns.s ~ ns.s %}{% endautoescape %}{% endfor %}",
    "concat of a list": NESTING + "{{ '' ~ ns.l }}",
    "plus": DOUBLING + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "set block": DOUBLING + "{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}{% endfor %}",
    "loop in a set block": "{% set s %}{% for i in range(2000) %}{{ text }}{% endfor %}{% endset %}",
    "macro": "{% macro m() %}{% for i in range(2000) %}{{ text }}{% endfor %}{% endmacro %}{{ m() }}",
    "call block": (
        "{% macro m() %}{% for i in range(2000) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call m() %}{{ text }}{% endcall %}"
    ),
    "filter block": "{% filter upper %}{% for i in range(2000) %}{{ text }}{% endfor %}{% endfilter %}",
    "filter block that pads": "{% filter center(" + str(HUGE) + ") %}x{% endfilter %}",
    "recursive loop": (
        "{% for i in l recursive %}{% for j in range(2000) %}{{ text }}{% endfor %}{{ loop([]) }}{% endfor %}"
    ),
    "block": (
        "{% set x %}{% block b %}{% for i in range(2000) %}{{ text }}{% endfor %}{% endblock %}{% endset %}"
    ),
    "block by name": (
        "{% if no %}{% block b %}{% for i in range(2000) %}{{ text }}{% endfor %}{% endblock %}{% endif %}"
        "{{ self.b() | length }}"
    ),
    "output of a list": NESTING + "{{ ns.l }}",
    "output of a namespace": NESTING + "{{ ns }}",
    "string": NESTING + "{{ ns.l | string | length }}",
    "tojson": NESTING + "{{ ns.l | tojson | length }}",
    "tojson with a wide indent": "{{ [1] | tojson(indent=" + str(HUGE) + ") }}",
    "tojson with a long indent": "{{ range(2000) | list | tojson(indent=text) }}",
    "tojson with long separators": "{{ range(2000) | list | tojson(separators=(text, text)) }}",
    "pprint": NESTING + "{{ ns.l | pprint }}",
    "upper": NESTING + "{{ ns.l | upper }}",
    "map": NESTING + "{{ [ns.l] | map('string') | list }}",
    "safe": NESTING + "{{ ns.l | safe }}",
    "xmlattr": NESTING + "{{ {'a': ns.l} | xmlattr }}",
    "urlencode": NESTING + "{{ ns.l | urlencode }}",
    "join": "{{ ([text] * 2000) | join }}",
    "join with a long separator": "{{ range(2000) | join(text) }}",
    "join of an attribute": "{{ ([{'a': text}] * 2000) | join(attribute='a') }}",
    "join of mapped texts": "{{ ([text] * 2000) | map('upper') | join }}",
    "method join": "{{ text.join(['a'] * 2000) }}",
    "method join of mapped texts": "{{ ''.join(([text] * 2000) | map('upper')) }}",
    "replace": "{{ text | replace('x', text) }}",
    "replace nothing": "{{ text | replace('', text) }}",
    "method replace": "{{ text.replace('x', text) }}",
    "method replace of bytes": "{{ text.encode().replace('x'.encode(), text.encode()) }}",
    "method translate": "{{ text.translate({120: text}) }}",
    "method expandtabs": "{{ ('\t' * 10000).expandtabs(10000) }}",
    "method center": "{{ 'x'.center(" + str(HUGE) + ") }}",
    "method zfill of bytes": "{{ 'x'.encode().zfill(" + str(HUGE) + ") }}",
    "method to_bytes": "{{ (1).to_bytes(" + str(HUGE) + ", 'big') }}",
    "center": "{{ 'x' | center(" + str(HUGE) + ") }}",
    "center by name": "{{ 'x' | center(width=" + str(HUGE) + ") }}",
    "indent": "{{ ('x\n' * 10000) | indent(10000) }}",
    "indent with a text": "{{ ('x\n' * 10000) | indent(text) }}",
    "wordwrap": "{{ text | wordwrap(1, wrapstring=text) }}",
    "urlize": "{{ ('a.com ' * 10000) | urlize(target=text) }}",
    "truncate": NESTING + "{{ ns.l | truncate(5) }}",
    "percent": "{{ '%" + str(HUGE) + "d' % 1 }}",
    "percent with a width from a value": "{{ '%*d' % (" + str(HUGE) + ", 1) }}",
    "percent with a precision": "{{ '%-+5." + str(HUGE) + "d' % 1 }}",
    "percent with a precision from a value": "{{ '%.*d' % (" + str(HUGE) + ", 1) }}",
    "percent behind two": "{{ '%%(%" + str(HUGE) + "d)' % 1 }}",
    "percent of a key": "{{ '%(a)" + str(HUGE) + "d' % {'a': 1} }}",
    "percent of a nested key": "{{ '%(a(b))" + str(HUGE) + "d' % {'a(b)': 1} }}",
    "percent many times": "{{ ('%(a)s' * 2000) % {'a': text} }}",
    "percent of a list": NESTING + "{{ '%s' % [ns.l] }}",
    "percent of bytes": "{{ '%17000000d'.encode() % 1 }}",
    "format": "{{ '%" + str(HUGE) + "d' | format(1) }}",
    "format by name": "{{ ('%(a)s' * 2000) | format(a=text) }}",
    "method format": "{{ '{:" + str(HUGE) + "}'.format(1) }}",
    "method format many times": "{{ ('{0}' * 2000).format(text) }}",
    "method format_map": "{{ ('{a}' * 2000).format_map({'a': text}) }}",
    "escape": "{{ ('&' * 1000000)" + " | forceescape" * 5 + " }}",
    "index": NESTING + "{{ ''[(ns.l,)] + 1 }}",
    "exception": NESTING + "{{ raise_exception(ns.l) }}",
}


@pytest.mark.parametrize("source", ROUTES.values(), ids=ROUTES.keys())
def test_a_huge_text_is_refused_before_it_is_made(source: str) -> None:
    with pytest.raises(ValueError, match="a text of more than"):
        compile_template(source).render(text=TEXT, l=[1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ '{:{}}'.format(1, 9) }}", "takes a width"),
        ("{% for i in [1] %}{{ '{0.index}'.format(loop) }}{% endfor %}", "looks into a value"),
        ("{{ [1] | batch(99999999, 'x') | list }}", "a repetition of more than"),
        ("{{ [1] | slice(99999999) | list }}", "a repetition of more than"),
        ("{{ [1] | batch(linecount=99999999, fill_with='x') | list }}", "a repetition of more than"),
        ("{{ [1] | slice(slices=99999999) | list }}", "a repetition of more than"),
        ("{{ ([[1] * 100000] * 1000) | sum(start=[]) | length }}", "a repetition of more than"),
        ("{{ 1 | round(99999999, 'floor') }}", "precision must be at most"),
        ("{{ strftime_now('%Y' * 10000) }}", "the form of a date"),
    ],
)
def test_what_cannot_be_counted_or_makes_no_text_is_refused_by_name(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_template(source).render(text=TEXT)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ nothing }}", "a1None[1, 'b']"),
        ("{% autoescape true %}{{ '<' ~ ('<b>' | safe) }}{% endautoescape %}", "&lt;<b>"),
        ("{{ [1, {'a': 2}] }}|{{ none }}|{{ nothing }}|{{ 1.5 }}", "[1, {'a': 2}]|None||1.5"),
        ("{% set s %}a{{ 1 }}{{ 'b' }}{% endset %}{{ s }}{{ s }}", "a1ba1b"),
        ("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m(1) %}c{% endcall %}", "<1c>"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% block b %}x{% endblock %}{{ self.b() }}", "xx"),
        (
            "{{ [1, 'a'] | join('-') }}{{ [{'a': 2}] | join(attribute='a') }}{{ ','.join(['b', 'c']) }}",
            "1-a2b,c",
        ),
        ("{{ 'aXa' | replace('a', 'b') }}{{ 'aXa'.replace('a', 'b', 1) }}", "bXbbXa"),
        ("{{ 'a\nb' | indent(2) }}{{ 'c' | center(3) }}", "a\n  b c "),
        ("{{ '%s %3d' % ('a', 7) }}{{ '%s' | format(1) }}{{ '{} {n:>3}'.format('a', n=7) }}", "a   71a   7"),
        (
            "{{ 'Cutoff 20250726: %s' % 'x' }}{{ '20250726 %5.1f' | format(2) }}",
            "Cutoff 20250726: x20250726   2.0",
        ),
        ("{{ '*%d* 100%%' % 20250726 }}{{ '%(20250726)s' % {'20250726': 1} }}", "*20250726* 100%1"),
        ("{{ {'a': [1, 'é']} | tojson }}{{ [1] | tojson(indent=1) }}", '{"a": [1, "é"]}[\n 1\n]'),
        ("{{ [1, 2] | sum }}{{ [[1], [2]] | sum(start=[]) }}{{ 7 % 4 }}{{ 2.55 | round(1) }}", "3[1, 2]32.5"),
        ("{{ ['a', 'b'] | map('upper') | list }}{{ 'abc' | length }}", "['A', 'B']3"),
        ("{{ {'a': 1}.items() | list }}{{ {'b': 1} | dictsort }}", "[('a', 1)][('b', 1)]"),
    ],
)
def test_ordinary_templates_write_what_jinja_writes(source: str, expected: str) -> None:
    assert compile_template(source).render() == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ [1, 2, 3] | batch(linecount=2, fill_with=0) | list }}", "[[1, 2], [3, 0]]"),
        ("{{ [1, 2, 3] | slice(slices=2, fill_with=0) | list }}", "[[1, 2], [3, 0]]"),
        ("{{ 'a' | center(width=3) }}{{ 'a' | indent(width=1, first=true, blank=true) }}", " a  a"),
        (
            "{{ 'aa' | replace(old='a', new='b', count=1) }}{{ 1.25 | round(precision=1, method='ceil') }}",
            "ba1.3",
        ),
        ("{{ 'abcdef' | truncate(length=3, killwords=true, end='-', leeway=0) }}", "ab-"),
        ("{{ 'a b' | wordwrap(width=1, wrapstring='|') }}{{ ' a ' | trim(chars=' ') }}", "a|ba"),
        ("{{ [1, 2] | join(d='-') }}{{ [1] | sum(start=1) }}{{ [1] | tojson(indent=1) }}", "1-22[\n 1\n]"),
    ],
)
def test_filters_take_their_arguments_by_the_names_of_jinja(source: str, expected: str) -> None:
    assert compile_template(source).render() == expected


def test_replacing_in_a_long_text_is_counted_as_it_is() -> None:
    long = "x" * 2_000_000

    assert compile_template("{{ t.replace('<|im_start|>', '') }}").render(t=long) == long


def test_a_value_counts_once_for_every_place_it_stands_in() -> None:
    inner = ["x" * 1000]

    assert text_length([inner, inner]) > 2000


def test_what_a_buffer_holds_is_counted() -> None:
    buffer = TextBuffer()
    buffer.extend(["a", "b"])
    buffer.append("c")

    assert buffer == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a text of more than"):
        buffer.append("x" * MOST_CHARACTERS)
