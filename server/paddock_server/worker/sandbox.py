"""jinja2 as chat templates expect it: like Hugging Face's `apply_chat_template`, with limits on growth."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, pass_eval_context
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paddock_server.worker.filters import bounded_filters
from paddock_server.worker.growth import (
    TextBuffer,
    bounded_parts,
    check_format,
    check_growth,
    check_method,
    check_printf,
    check_result,
    check_sum,
    check_widths,
    text_length,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jinja2 import Template, nodes
    from jinja2.compiler import Frame
    from jinja2.nodes import EvalContext
    from jinja2.parser import Parser
    from jinja2.runtime import Context

__all__ = ["TemplateError", "TemplateSyntaxError", "compile_template"]

MOST_FORM_CHARACTERS: Final = 1024
"""Longest form of a date: C's strftime may write hundreds of characters for each of its own."""

Value = Any
"""Whatever a template may hold: JSON values and functions."""


def compile_template(source: str) -> Template:
    """Compile a chat template.

    Raises:
        TemplateSyntaxError: It is wrong.
    """
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing is evaluated before its time, and its limits, begin
        finalize=_finalize,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters = bounded_filters()
    del environment.globals["lipsum"]  # makes texts of any length, and no prompt
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=functions)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model was trained on; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  declared by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Code(CodeGenerator):
    """Code that counts what it joins."""

    def buffer(self, frame: Frame) -> None:
        """Collect what macros and blocks say where it is counted."""
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.text_buffer()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  named by jinja2
        """Write `~` like jinja2 does, with its operands counted."""
        joining = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            joining = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"{joining}(environment.bounded_parts((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox keeps templates from Python's objects; this keeps them from filling memory at a stroke."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"*", "**", "+", "%"})
    text_buffer = TextBuffer
    bounded_parts = staticmethod(bounded_parts)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a macro, a block or the whole template said."""
        return "".join(parts if isinstance(parts, TextBuffer) else bounded_parts(parts))

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        if operator == "+":
            check_sum(left, right)
        elif operator != "%":
            check_growth(operator, left, right)
        elif isinstance(left, str | bytes):
            check_printf(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Value, /, *args: Value, **kwargs: Value) -> Value:
        """Call a function; methods that make long texts at a stroke are checked before."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if isinstance(owner, str | bytes):
            if name == "join" and args:
                args = (bounded_parts(args[0], owner), *args[1:])
            check_method(owner, name, [*args, *kwargs.values()])
        elif isinstance(owner, int) and name == "to_bytes":
            check_widths([*args, *kwargs.values()])
        return check_result(super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Value, argument: Value) -> Value:
        """Take an item; an index that is not there stands in the message of the error."""
        if not isinstance(argument, str | int):
            text_length(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Value) -> Callable[..., str] | None:
        """Return a format method with its result bounded, None for other values."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        @functools.wraps(formatted)
        def checked(*args: Value, **kwargs: Value) -> str:
            check_format(value.__self__, [*args, *kwargs.values()])
            return formatted(*args, **kwargs)

        return checked


@pass_eval_context  # with it jinja2 does not evaluate constants while it compiles
def _finalize(context: EvalContext, value: Value) -> Value:
    """Return what `{{ value }}` writes."""
    del context
    if not isinstance(value, str):
        text_length(value)
    return value


def _raise_exception(message: Value) -> NoReturn:
    text_length(message)
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > MOST_FORM_CHARACTERS:
        text = f"the form of a date must have at most {MOST_FORM_CHARACTERS} characters"
        raise ValueError(text)
    return datetime.now(UTC).astimezone().strftime(form)
