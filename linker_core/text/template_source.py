"""A chat template as text. It is a stranger's program, so nothing here compiles or runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

from linker_core.errors import BadCheckpointError
from linker_core.text.files import TEMPLATE_FILE, read_tokenizer_config
from linker_core.weights.files import read_optional

MAX_TEMPLATE_CHARS: Final = 1 << 20
_IN_CONFIG: Final = "tokenizer_config.json: chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSource:
    """What a template is made of.

    Attributes:
        text: The program.
        digest: Of the text.
        origin: The file it came from, for messages.
    """

    text: str
    digest: str
    origin: str

    @classmethod
    def of(cls, text: str, *, origin: str = "chat template") -> Self:
        """Returns the source that a text is.

        Raises:
            BadCheckpointError: It is too long, or not Unicode.
        """
        if len(text) > MAX_TEMPLATE_CHARS:
            raise BadCheckpointError(f"{origin}: longer than {MAX_TEMPLATE_CHARS} characters")
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise BadCheckpointError(f"{origin}: holds half of a surrogate pair") from error
        return cls(text=text, digest=digest, origin=origin)

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Reads the template of a checkpoint; None where it has none.

        `chat_template.jinja` comes first, then `chat_template` of `tokenizer_config.json`: a text,
        or a list of named templates of which `default` is taken.

        Raises:
            BadCheckpointError: The files are damaged, or the template is too long.
        """
        data = read_optional(directory, TEMPLATE_FILE, max_bytes=4 * MAX_TEMPLATE_CHARS)
        if data is not None:
            return cls.of(_decoded(data), origin=TEMPLATE_FILE)
        value = read_tokenizer_config(directory).get("chat_template")
        if isinstance(value, list):
            value = _default_of(value)
        if value is None:
            return None
        if not isinstance(value, str):
            raise BadCheckpointError(f"{_IN_CONFIG}: neither a text nor a list of named templates")
        return cls.of(value, origin=_IN_CONFIG)


class Renders(Protocol):
    """Whatever turns a dialogue into the prompt's text with one template."""

    def render(self, variables: Mapping[str, object]) -> str:
        """Returns the text.

        Raises:
            InvalidRequestError: The template refuses the dialogue, or comes to no end with it.
        """


def template_variables(
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
    tools: Sequence[Mapping[str, object]] | None = None,
    more: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Returns what a template sees of a dialogue, named as transformers names it.

    Args:
        messages: Plain JSON records with `role` and `content`.
        add_generation_prompt: Whether the text ends where the assistant's answer begins.
        bos_token: Left undefined in the template if None, as transformers leaves it.
        eos_token: Likewise.
        tools: Function descriptions as JSON records.
        more: Further variables; those above come before them.
    """
    special = {"bos_token": bos_token, "eos_token": eos_token}
    return {
        **(more or {}),
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: token for name, token in special.items() if token is not None},
    }


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadCheckpointError(f"{TEMPLATE_FILE}: not UTF-8 at byte {error.start}.") from error


def _default_of(templates: list[object]) -> object:
    for entry in templates:
        if isinstance(entry, Mapping) and entry.get("name") == "default":
            return entry.get("template")
    return None
