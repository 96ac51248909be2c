"""docs/compatibility.md says what there is: every route, parameter, header, field and error.

A row names a test by a link; the test has to exist and to be about what the row is about.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from pydantic import BaseModel

from server.gateway import deadlines, idempotency, request_ids
from server.gateway.access import AUDIENCES
from server.gateway.errors import REJECTION_REASONS
from server.gateway.schemas.chat import CHAT_NEUTRAL, ChatRequest
from server.gateway.schemas.generation import COMPLETION_NEUTRAL, CompletionRequest
from server.gateway.schemas.operators import (
    ChangeBody,
    FitBody,
    LoadBody,
    OnboardBody,
    PlanBody,
    UnloadBody,
)
from server.gateway.schemas.scores import ScoresBody
from server.gateway.schemas.tokenization import (
    TOKENIZE_NEUTRAL,
    DetokenizeBody,
    TokenizeChatBody,
    TokenizeTextBody,
)
from tests.clients.environments import PROJECT
from tests.clients.programs.scenarios import DONOR, VARIANT
from tests.server.live import LiveServer

DOCUMENT = PROJECT / "docs" / "compatibility.md"
_LINK = re.compile(r"\[`(\w+)`\]\((\S+?\.py)\)")
_CODE = re.compile(r"`([^`]+)`")
_BOTH, _CHAT, _TEXT = "Both routes", "Chat completions alone", "Text completions alone"
_REFUSED, _TOKENS = "Known, and refused unless neutral", "The tokenizer's routes"
_OPERATORS = "Operators' bodies"
_OPERATORS_BODIES: tuple[type[BaseModel], ...] = (
    ChangeBody, FitBody, LoadBody, OnboardBody, PlanBody, ScoresBody, UnloadBody,
)  # fmt: skip
# Objects whose keys are data: texts or ids of tokens.
_MAPS = {"choices.logprobs.top_logprobs", "choices.prompt_logprobs", "prompt_logprobs"}


class Row(NamedTuple):
    """What a row is about, and the tests that hold it."""

    section: str
    names: tuple[str, ...]
    tests: tuple[tuple[str, Path], ...]


def rows_of(text: str) -> Iterator[Row]:
    section = ""
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            first, *_, last = line.strip("| ").split(" | ")
            links = _LINK.findall(last)
            tests = tuple((name, (DOCUMENT.parent / path).resolve()) for name, path in links)
            yield Row(section, tuple(_CODE.findall(first)), tests)


ROWS = list(rows_of(DOCUMENT.read_text(encoding="utf-8")))


def named(*sections: str) -> set[str]:
    """Returns what the tables of some sections are about; nothing may be there twice."""
    names = [name for row in ROWS if row.section in sections for name in row.names]
    assert len(names) == len(set(names)), sections
    return set(names)


def records_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from records_in(argument)


def fields(kind: type[BaseModel], prefix: str = "") -> set[str]:
    """Returns the dotted paths of a body; those of a list's entries are its own."""
    found: set[str] = set()
    for name, field in kind.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        found |= {path}.union(*(fields(one, f"{path}.") for one in records_in(field.annotation)))
    return found


def paths(value: object, prefix: str = "") -> set[str]:
    """Returns the dotted paths of a response."""
    if isinstance(value, list):
        return set().union(*(paths(one, prefix) for one in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found: set[str] = set()
    for name, inner in value.items():
        path = f"{prefix}.{name}" if prefix else name
        found.add(path)
        if path in _MAPS:
            entries = inner if isinstance(inner, list) else [inner]
            found |= paths([list((one or {}).values()) for one in entries], f"{path}.*")
        else:
            found |= paths(inner, path)
    return found


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_every_route_has_a_row() -> None:
    routes = {f"{method} {path}" for path, methods in AUDIENCES.items() for method in methods}
    assert named("Routes") == routes


def test_every_parameter_of_generation_has_a_row() -> None:
    assert named(_BOTH, _CHAT) == fields(ChatRequest)
    assert named(_BOTH, _TEXT) == fields(CompletionRequest)


def test_every_parameter_that_is_refused_has_a_row() -> None:
    assert named(_REFUSED) == CHAT_NEUTRAL.keys() | COMPLETION_NEUTRAL.keys()


def test_every_parameter_of_the_tokenizer_has_a_row() -> None:
    bodies: tuple[type[BaseModel], ...] = (TokenizeTextBody, TokenizeChatBody, DetokenizeBody)
    expected = (
        set().union(*(fields(body) for body in bodies)) - named(_CHAT) | TOKENIZE_NEUTRAL.keys()
    )
    assert named(_TOKENS) == expected - {"messages", "tools"}


def test_every_parameter_of_operators_has_a_row(echoing: LiveServer) -> None:
    queries = {
        parameter["name"]
        for path in echoing.client.get("/openapi.json").json()["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    }
    assert named(_OPERATORS) == queries.union(*(fields(body) for body in _OPERATORS_BODIES))


def test_every_error_has_a_row() -> None:
    assert set(REJECTION_REASONS) | {"internal_error"} == named("Errors")


def test_every_request_header_that_is_read_has_a_row() -> None:
    ours = {deadlines.HEADER, idempotency.HEADER, request_ids.HEADER.decode()}
    assert {name.lower() for name in ours} <= {name.lower() for name in named("Request headers")}


@pytest.mark.parametrize(("name", "value"), sorted({
    name: field.neutral for name, field in {**CHAT_NEUTRAL, **COMPLETION_NEUTRAL}.items()
}.items()))  # fmt: skip
def test_refused_parameter_is_taken_at_its_neutral_values_alone(
    echoing: LiveServer, name: str, value: tuple[object, ...]
) -> None:
    """All of CHAT_NEUTRAL and COMPLETION_NEUTRAL."""

    def asked(said: object) -> Iterator[Any]:
        body: dict[str, Any] = {name: said}
        if name in CHAT_NEUTRAL:
            yield echoing.chat(VARIANT, "hi", **body)
        if name in COMPLETION_NEUTRAL:
            yield echoing.complete(VARIANT, "a", **body)

    for neutral in value:
        assert all(response.status_code == 200 for response in asked(neutral))
    for response in asked({"no": "such value"}):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


def chat_bodies() -> Iterator[dict[str, Any]]:
    """Chats that together show every field there is."""
    call = '<tool_call>{"name": "rain", "arguments": {}}</tool_call>'
    tool = {"type": "function", "function": {"name": "rain"}}
    yield {"text": "hi", "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    yield {"text": call, "tools": [tool]}


def test_every_field_of_a_chat_answer_has_a_row(echoing: LiveServer) -> None:
    found = paths(echoing.chat(VARIANT, prompt_logprobs=1).json())
    for body in chat_bodies():
        found |= paths(echoing.chat(VARIANT, **body).json())
    assert named("Chat answers") == found


def test_every_field_of_a_chat_chunk_has_a_row(echoing: LiveServer) -> None:
    options = {"include_usage": True}
    found: set[str] = set()
    for body in chat_bodies():
        response = echoing.chat(VARIANT, **body, stream=True, stream_options=options)
        found |= paths(events_of(response.text))
    assert named("Chunks of chat answers") == found


@pytest.mark.parametrize("stream", [False, True])
def test_every_field_of_a_text_answer_has_a_row(echoing: LiveServer, stream: bool) -> None:
    more: dict[str, Any] = {"logprobs": 2, "return_token_ids": True, "max_tokens": 2}
    if stream:
        more |= {"stream": True, "stream_options": {"include_usage": True}}
        found = paths(events_of(echoing.complete(VARIANT, "ab", **more).text))
        assert found <= named("Text answers and their chunks")
    else:
        whole = echoing.complete(VARIANT, "ab", **more, prompt_logprobs=1).json()
        assert named("Text answers and their chunks") == paths(whole)


def test_every_field_of_models_has_a_row(echoing: LiveServer) -> None:
    listed = echoing.client.get("/v1/models").json()
    one = echoing.client.get(f"/v1/models/{VARIANT}").json()
    assert paths(one) == paths(listed["data"])
    assert named("Models as OpenAI's clients see them") == paths(listed)


def test_every_field_of_the_tokenizers_answers_has_a_row(echoing: LiveServer) -> None:
    client = echoing.client
    asked = {"model": VARIANT, "prompt": "ab", "return_token_strs": True}
    found = paths(client.post("/tokenize", json=asked).json())
    found |= paths(client.post("/detokenize", json={"model": VARIANT, "tokens": [70]}).json())
    found |= paths(client.get(f"/m/{VARIANT}/tokenizer_info").json())
    assert named("The tokenizer's answers") == found


def test_every_field_of_a_models_record_and_a_job_has_a_row(echoing: LiveServer) -> None:
    record = echoing.client.get(f"/models/{VARIANT}").json()
    assert named("A model's record") == set(record)
    source = echoing.served(VARIANT).text.path
    response = echoing.onboard("acme/other", source, wait=False, policy="exact")
    assert (response.status_code, named("A job")) == (202, set(response.json()))
    where = response.headers["Location"]
    echoing.until(lambda: echoing.client.get(where).json()["status"] == "succeeded")
    gone = echoing.client.delete("/models/acme/other").json()
    assert gone == {"id": "acme/other", "object": "model", "deleted": True}


def test_every_field_of_details_has_a_row(echoing: LiveServer) -> None:
    asked = {"include": ["blocks", "tensors", "frontier"]}
    details = echoing.client.get(f"/models/{VARIANT}", params=asked).json()["details"]
    rows = named("Details of a model")
    assert set(details) == {name for name in rows if "." not in name}
    assert {name for name in rows if not name.startswith("frontier.")} == paths(details)


def test_every_field_of_a_status_and_a_session_has_a_row(echoing: LiveServer) -> None:
    with echoing.client.stream("GET", "/models/events") as response:
        _, status = itertools.islice(filter(None, response.iter_lines()), 2)
    told = json.loads(status.removeprefix("data: "))
    loads = told.pop("models").values()
    assert {field for load in loads for field in load} == {
        "running", "waiting", "generation_tokens",
    }  # fmt: skip
    assert named("The server's status") == paths(told) | {"models"}
    assert named("The page's session") == set(echoing.client.get("/ui/session").json())


def test_error_has_the_fields_of_its_rows(echoing: LiveServer) -> None:
    body = echoing.chat("nobody").json()
    assert paths(body) == {"error"} | named("An error's fields")


def test_every_response_header_has_a_row(echoing: LiveServer) -> None:
    responses = [
        echoing.chat(VARIANT),
        echoing.chat(VARIANT, stream=True),
        echoing.chat("nobody"),
        echoing.client.delete(f"/models/{DONOR}"),
        echoing.client.put("/v1/models"),
        echoing.client.get("/metrics"),
        echoing.client.get("/"),
        echoing.client.get("/ui"),
    ]
    found = {name for response in responses for name in response.headers}
    assert found <= {name.lower() for name in named("Response headers")}


class Sources:
    """Functions of the tests, with what they use of their own modules."""

    def __init__(self) -> None:
        self._modules: dict[Path, Mapping[str, str]] = {}

    def about(self, path: Path, name: str) -> str:
        """Returns a test's text, and that of what it names at the top of its module."""
        if path not in self._modules:
            self._modules[path] = dict(_definitions(path))
        module = self._modules[path]
        assert name in module, f"{path} has no {name}"
        seen, left = {name}, [name]
        while left:
            used = set(re.findall(r"\w+", module[left.pop()])) & module.keys() - seen
            seen |= used
            left += used
        return "\n".join(module[one] for one in seen)


def _definitions(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        names: Iterable[str] = ()
        start = node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = (node.name,)
            start = min([start, *(one.lineno for one in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)
                     and isinstance(one.ctx, ast.Store)]  # fmt: skip
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = (node.target.id,)
        for name in names:
            yield name, "\n".join(lines[start - 1 : node.end_lineno])


_SOURCES = Sources()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.names[0]}")
def test_row_names_tests_that_are_about_it(row: Row) -> None:
    assert row.tests, "a row without a test"
    sources = [_SOURCES.about(path, name) for name, path in row.tests]
    for name in row.names:
        assert any(_word(row, name) in text.lower() for text in sources), name


def _word(row: Row, name: str) -> str:
    """Returns what a test that is about a row's name says."""
    if row.section == _REFUSED:
        return "neutral"  # one test goes through all of them
    if row.section == "Routes":
        literal = re.sub(r"/\{[^}]*\}", "", name)
        return literal.rsplit("/", 1)[1]
    return name.rsplit(".", 1)[-1].lower()
