"""A checkpoint's chat template, compiled: messages to the prompt's text.

Templates are programs of strangers. They run in jinja2's sandbox, where they reach no code of ours;
the length of what they return is bounded. Their time and memory on the way are bounded by the
process that they run in, which is never one that does anything else (`template_worker`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.text.template_source import TemplateSource

MAX_PROMPT_CHARS: Final = 4 << 20
_MAX_POWER_BITS: Final = 4_096  # of an integer that a template may build with **
_MAX_MESSAGE_CHARS: Final = 300  # of a template's own complaint

# What evaluating an expression of a template can raise over the messages it was given.
_TEMPLATE_FAILURES: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,  # RecursionError too
    SyntaxError,  # of the Python that jinja2 makes of deeply nested blocks
)


class ChatTemplate:
    """Renders messages as `apply_chat_template(…, tokenize=False)` of transformers does."""

    def __init__(self, source: TemplateSource) -> None:
        """Compiles the template.

        Raises:
            BadCheckpointError: It does not compile.
        """
        origin = source.origin
        try:
            self._template = _environment().from_string(source.text)
        except jinja2.TemplateSyntaxError as error:
            raise BadCheckpointError(
                f"{origin}: line {error.lineno} does not compile: {_bounded(error)}"
            ) from error
        except _TEMPLATE_FAILURES as error:
            raise BadCheckpointError(f"{origin}: does not compile: {_bounded(error)}") from error

    def render(self, variables: Mapping[str, object]) -> str:
        """Returns the prompt's text; it holds its special tokens, so encode it without adding any.

        Args:
            variables: See `template_variables`.

        Raises:
            InvalidRequestError: The template refuses these messages, or its text grows too long.
            MemoryError: It takes more than this process has.
        """
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                num_chars += len(part)
                if num_chars > MAX_PROMPT_CHARS:
                    raise _too_long()
                parts.append(part)
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {_bounded(error)}",
                param="messages",
            ) from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the operators bounded that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    _check_repetition(len(sized), times)
        elif not (isinstance(left, int) and isinstance(right, int)):
            raise jinja2.TemplateRuntimeError("** takes whole numbers only")
        elif left.bit_length() * max(right, 0) > _MAX_POWER_BITS:
            raise jinja2.TemplateRuntimeError("a power is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training: here it is a scope."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _check_repetition(num_items: int, times: int) -> None:
    if num_items * times > MAX_PROMPT_CHARS:
        raise _too_long()


def _too_long() -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"it makes more than {MAX_PROMPT_CHARS} characters")


def _bounded(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[:_MAX_MESSAGE_CHARS] + "…"
