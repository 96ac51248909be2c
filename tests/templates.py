"""Chat templates as tests have them: compiled in the test's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from linker_core.text.chat_template import ChatTemplate
from linker_core.text.template_source import TemplateSource, template_variables


def compiled(text: str) -> ChatTemplate:
    return ChatTemplate(TemplateSource.of(text))


def compiled_in(directory: Path) -> ChatTemplate:
    """Returns the template of a checkpoint, which has one."""
    source = TemplateSource.load(directory)
    assert source is not None
    return ChatTemplate(source)


def rendered(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, object]],
    *,
    bos: str | None = None,
    eos: str | None = None,
    prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    variables = template_variables(
        messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos, tools=tools
    )
    return template.render(variables)
