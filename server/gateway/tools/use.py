"""What a request and a model's template make of tools: whether, which and how an answer calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import llguidance

from linker_core.errors import InvalidRequestError
from server.gateway.formats import ANSWER_LINE, Constraint, format_schema, spaced
from server.gateway.generation import SequenceSpec
from server.gateway.schemas.chat import ChatRequest
from server.gateway.schemas.tools import AllowedChoice, Function, NamedTool, ToolChoice
from server.gateway.tools.bounds import MAX_SCHEMA_CHARS
from server.gateway.tools.finder import CallFinder
from server.gateway.tools.forced import ForcedCalls, call_rules, calls_grammar
from server.gateway.tools.pieces import AnswerParser
from server.gateway.tools.wire import PLAIN, WireFormat, wire_format
from server.residency.catalog import ServedModel

TOOLS: Final = "tools"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How an answer may call tools.

    Attributes:
        wire: How the model writes calls.
        functions: What may be called.
        is_forced: Whether the answer is calls and nothing else.
        is_named: Whether the client named the function, so that calling it is no news.
        only_one: Whether there is at most one call.
        answer: The schema of an answer that calls nothing; None: it is free.
    """

    wire: WireFormat
    functions: tuple[Function, ...]
    is_forced: bool
    is_named: bool
    only_one: bool
    answer: Mapping[str, Any] | None

    def parser(self) -> AnswerParser:
        """Returns what reads one answer."""
        if self.is_forced:
            return ForcedCalls(self.wire)
        return CallFinder(self.wire, {one.name for one in self.functions})

    def constraint(self) -> Constraint | None:
        """Returns what an answer has to follow; None where the model is free.

        Raises:
            InvalidRequestError: It would be too large.
        """
        if self.is_forced:
            grammar = calls_grammar(self.wire, self.functions, only_one=self.only_one)
        elif self.only_one or self.answer or any(one.strict for one in self.functions):
            grammar = self._free_grammar()
        else:
            return None
        size = len(grammar.encode())
        if size > MAX_SCHEMA_CHARS:
            raise InvalidRequestError(
                f"The schemas of the tools come to a grammar of {size} bytes; at most "
                f"{MAX_SCHEMA_CHARS} are compiled. Offer fewer tools, or simpler ones.",
                param=TOOLS,
            )
        return Constraint(llguidance.grammar_from("lark", grammar), TOOLS)

    def finish_reason(self, ended: str, *, has_called: bool) -> str:
        """Returns how an answer ended, as OpenAI says it.

        Args:
            ended: Without regard to tools.
            has_called: Whether it made calls, and none that was cut short.
        """
        return "tool_calls" if has_called and ended == "stop" and not self.is_named else ended

    def _free_grammar(self) -> str:
        """Returns the grammar of an answer that may call tools, and then does it right."""
        wire, marker = self.wire, self.wire.marker
        assert marker is not None
        between = "" if self.only_one else f" ({json.dumps(wire.separator)} call)*"
        if self.answer is not None:
            answer = json.dumps(spaced(self.answer))
            start = [f"start: answer | call{between}", f"answer: %json {answer}"]
            assert len(start) == ANSWER_LINE
            return "\n".join([*start, *call_rules(wire, self.functions)])
        if wire.is_bare:
            start = [f"start: | TEXT | call{between}", r"TEXT: /[^{\[ \t\r\n](?s:.*)/"]
            return "\n".join([*start, *call_rules(wire, self.functions)])
        marked = "marked call" if self.only_one else "(marked call)+ TEXT"
        start = [
            f"start: TEXT | {marked}",
            f"marked[suffix={json.dumps(marker)}]: /(?s:.*)/",
            "TEXT: /(?s:.*)/",
        ]
        before = wire.before.removeprefix(marker)
        return "\n".join([*start, *call_rules(wire, self.functions, before=before)])


def tool_use(request: ChatRequest, template: str) -> ToolUse | None:
    """Returns how the answers may call tools; None: they may not.

    Args:
        request: The checked body.
        template: The source of the model's chat template, which knows tools.

    Raises:
        InvalidRequestError: The template's calls cannot be read, or the request wants two things
            at once.
    """
    choice = request.tool_choice
    if not request.tools or choice == "none":
        return None
    if request.structured_outputs is not None:
        raise InvalidRequestError(
            "structured_outputs and tools both say what the answer is; leave one out, or set "
            'tool_choice to "none".',
            param="structured_outputs",
        )
    name = choice.function.name if isinstance(choice, NamedTool) else None
    is_forced = name is not None or _mode(choice) == "required"
    wire = _wire(template, is_forced=is_forced)
    functions = (tool.function for tool in request.offered_tools())
    return ToolUse(
        wire=wire,
        functions=tuple(one for one in functions if name in (None, one.name)),
        is_forced=is_forced,
        is_named=name is not None,
        only_one=name is not None or request.parallel_tool_calls is False,
        answer=None if is_forced else _answer(request, wire),
    )


def _mode(choice: ToolChoice | None) -> object:
    return choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice


def _wire(template: str, *, is_forced: bool) -> WireFormat:
    """Returns how calls are written; forced ones of unknown templates are a list of JSON."""
    wire = wire_format(template)
    if wire is None and not is_forced:
        raise InvalidRequestError(
            "How this model writes calls of tools is not known, so they cannot be found in free "
            'text. Set tool_choice to "required", to a function, or to "none".',
            param="tool_choice",
        )
    return wire or PLAIN


def _answer(request: ChatRequest, wire: WireFormat) -> Mapping[str, Any] | None:
    """Returns the schema of an answer that calls nothing; None: it is free."""
    answer = format_schema(request.response_format)
    if answer is not None and wire.is_bare:
        raise InvalidRequestError(
            "This model's calls of tools are JSON like the answer that response_format asks for, "
            "so they cannot be told apart. Leave one of them out.",
            param="response_format",
        )
    return answer


def with_tools(specs: Iterable[SequenceSpec], use: ToolUse) -> list[SequenceSpec]:
    """Returns the sequences as they run when their answers may call tools.

    Raises:
        InvalidRequestError: See `ToolUse.constraint`.
    """
    constraint = use.constraint()
    return [_with_tools(spec, use, constraint) for spec in specs]


def _with_tools(spec: SequenceSpec, use: ToolUse, constraint: Constraint | None) -> SequenceSpec:
    if constraint is not None:
        grammar, param = constraint
        sampling = replace(spec.sampling, grammar=grammar)
        asked = spec.grammar_param if use.answer is not None else None
        spec = replace(spec, sampling=sampling, grammar_param=param, answer_param=asked)
    if use.is_forced or not _is_special(use.wire.marker, spec.model):
        return spec
    # What marks a call has to be seen.
    return replace(spec, text=replace(spec.text, skip_special_tokens=False))


def _is_special(marker: str | None, model: ServedModel) -> bool:
    tokenizer = model.text.tokenizer
    ids = tokenizer.encode(marker or "", add_special_tokens=False)
    return not tokenizer.special_ids.isdisjoint(ids)
