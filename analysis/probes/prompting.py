"""Prompts as a variant is served them: in its own chat format, in its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from analysis.evaluation.outputs import load_prompts
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.text.template_process import template_process
from linker_core.text.template_source import TemplateSource
from linker_core.tuning.dialogues import Dialogue, Turn
from linker_core.tuning.reading import VariantReader

_ANSWER = Turn(role="assistant", content="-")  # stands where a prompt's answer would be


@contextmanager
def reading(model: StudyModel) -> Iterator[VariantReader]:
    """Holds a model's text side; its chat template runs in a process of its own.

    Raises:
        BadCheckpointError: Tokenizer or template are damaged.
    """
    with template_process(TemplateSource.load(model.checkpoint.path)) as template:
        yield VariantReader(
            tokenizer=model.tokenizer,
            template=template,
            eos_token_ids=model.checkpoint.eos_token_ids,
            vocab_size=model.config.vocab_size,
        )


def asked(prompts: Sequence[str]) -> list[Dialogue]:
    """Returns prompts as dialogues whose answer is still to come."""
    return [
        Dialogue(turns=(Turn(role="user", content=prompt), _ANSWER), kind="given")
        for prompt in prompts
    ]


def encoded_prompts(
    model: StudyModel, dialogues: Sequence[Dialogue], *, room: int
) -> list[list[int]]:
    """Returns the tokens up to where each dialogue's last answer begins.

    Args:
        model: Whose format and tokens.
        dialogues: With an answer each.
        room: Positions of the context that are left free behind a prompt.

    Raises:
        InvalidRequestError: A prompt that the template or the tokenizer refuses, or that leaves
            less room.
        BadCheckpointError: Tokenizer or template are damaged.
    """
    with reading(model) as reader:
        encoded = [reader.prompt(dialogue) for dialogue in dialogues]
    most = model.config.max_position_embeddings - room
    for dialogue, ids in zip(dialogues, encoded, strict=True):
        if not 1 <= len(ids) <= most:
            raise InvalidRequestError(
                f"The prompt {dialogue.turns[0].content!r:.60} has {len(ids)} tokens in the "
                f"model's format, expected 1 to {most}. Shorten it.",
                param="prompts",
            )
    return encoded


def prompts_of(path: Path, *, param: str, limit: int) -> list[str]:
    """Returns at most `limit` prompts of a file; see `load_prompts`.

    Raises:
        InvalidRequestError: The file is of no use, or `limit` is below one.
    """
    if limit < 1:
        raise InvalidRequestError(f"{limit} prompts were asked for, expected at least 1.")
    return load_prompts(path, param=param)[:limit]
