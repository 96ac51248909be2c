"""FM's three metrics on a user's files: read and encoded once, measured of a model as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.evaluation import perplexity
from analysis.evaluation.choices import ChoiceScore, Questions, pooled
from analysis.evaluation.instructions import (
    DEFAULT_LIMIT,
    Instruction,
    InstructLoss,
    encode_instructions,
    instruct_loss,
    load_instructions,
)
from analysis.evaluation.mmlu import LIMIT, SUBJECTS, load_mmlu
from analysis.evaluation.perplexity import Protocol, Reading, text_loss
from analysis.evaluation.texts import MAX_TOKENS, first_tokens, read_text
from analysis.evaluation.token_loss import TokenLoss
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.tasks import Task, load_tasks
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteFiles:
    """Where the questions are, and how many are asked. A metric without its file is left out."""

    wikitext: Path | None = None
    instruct: Path | None = None
    mmlu: Path | None = None  # a directory of SUBJECT_test.csv
    tasks: Path | None = None  # a directory of *.jsonl, see linker_core.tuning.tasks
    subjects: tuple[str, ...] = SUBJECTS
    protocols: tuple[Protocol, ...] = (Protocol.SLIDING,)
    num_tokens: int = perplexity.NUM_TOKENS
    window: int = perplexity.WINDOW
    stride: int | None = None  # None: half a window
    full_length: int | None = None  # None: the model's context
    num_instructions: int = DEFAULT_LIMIT
    num_questions: int = LIMIT  # of each subject and task


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What was measured of one model."""

    text: Mapping[Protocol, TokenLoss]
    instruct: InstructLoss | None
    mmlu: Mapping[str, ChoiceScore]  # by subject
    tasks: Mapping[str, ChoiceScore]  # by task

    @property
    def mmlu_all(self) -> ChoiceScore | None:
        """Over all questions of all subjects."""
        return pooled(tuple(self.mmlu.values())) if self.mmlu else None

    @property
    def tasks_all(self) -> ChoiceScore | None:
        """Over all questions of all tasks."""
        return pooled(tuple(self.tasks.values())) if self.tasks else None

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; None for what was not measured or is not finite."""
        return {
            **{f"wikitext_{protocol}": loss.to_json() for protocol, loss in self.text.items()},
            "instruct_record": self.instruct and self.instruct.record.to_json(),
            "instruct_response": self.instruct and self.instruct.response.to_json(),
            "mmlu": self.mmlu_all and self.mmlu_all.to_json(),
            "tasks": self.tasks_all and self.tasks_all.to_json(),
            "by_subject": {name: score.to_json() for name, score in self.mmlu.items()},
            "by_task": {name: score.to_json() for name, score in self.tasks.items()},
        }


class Suite:
    """The texts of a suite. Immutable; `encode` makes them into one tokenizer's tokens."""

    def __init__(
        self,
        files: SuiteFiles,
        *,
        text: str | None,
        instructions: list[Instruction],
        mmlu: list[Task],
        tasks: list[Task],
    ) -> None:
        self.files = files
        self.text = text
        self.instructions = instructions
        self.mmlu = mmlu
        self.tasks = tasks

    @classmethod
    def load(cls, files: SuiteFiles) -> Suite:
        """Reads all files.

        Raises:
            InvalidRequestError: No file is named, a number is out of bounds, or a file is no such
                thing.
        """
        _check(files)
        return cls(
            files,
            text=read_text(files.wikitext, param="wikitext") if files.wikitext else None,
            instructions=(
                load_instructions(files.instruct, limit=files.num_instructions)
                if files.instruct
                else []
            ),
            mmlu=(
                load_mmlu(files.mmlu, files.subjects, limit=files.num_questions)
                if files.mmlu
                else []
            ),
            tasks=load_tasks(files.tasks, limit=files.num_questions) if files.tasks else [],
        )

    def encode(self, model: StudyModel) -> EncodedSuite:
        """Returns the suite in a model's tokens; see `EncodedSuite`."""
        return EncodedSuite(self, model.tokenizer, model.config)


class EncodedSuite:
    """A suite in the tokens of one tokenizer; serves every model that has it and the context.

    Raises:
        InvalidRequestError: The tokenizer fails on a text, makes ids beyond the model's, or finds
            a single token in the text.
    """

    def __init__(self, suite: Suite, tokenizer: Tokenizer, config: ModelConfig) -> None:
        files, context = suite.files, config.max_position_embeddings
        self.readings: dict[Protocol, Reading] = {}
        self._ids: list[int] = []
        if suite.text is not None:
            readings = {
                Protocol.SLIDING: perplexity.sliding(
                    context, window=files.window, stride=files.stride
                ),
                Protocol.FULL: perplexity.full(context, length=files.full_length),
            }
            self.readings = {protocol: readings[protocol] for protocol in files.protocols}
            self._ids = first_tokens(
                tokenizer, suite.text, limit=files.num_tokens, vocab_size=config.vocab_size
            )
            if len(self._ids) < 2:
                raise InvalidRequestError(
                    f"--wikitext: the text has {len(self._ids)} token, and the first of a text is "
                    "not predicted. Give a longer one.",
                    param="wikitext",
                )
        self._records = (
            encode_instructions(
                suite.instructions, tokenizer, vocab_size=config.vocab_size, context=context
            )
            if suite.instructions
            else []
        )
        self._mmlu = Questions(suite.mmlu, tokenizer, config)
        self._tasks = Questions(suite.tasks, tokenizer, config)

    @property
    def notes(self) -> list[str]:
        """What is measured, in words, for a reader of the numbers."""
        notes = [
            f"{protocol}: {len(self._ids)} tokens in {reading.words}."
            for protocol, reading in self.readings.items()
        ]
        if self._records:
            notes.append(
                f"Instruction perplexity: {len(self._records)} records in Alpaca's format; over "
                "all tokens but the first (record) and over the response's tokens alone (response)."
            )
        return notes

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is read."""
        spans = (
            span.stop - span.start
            for reading in self.readings.values()
            for span in reading.spans(len(self._ids))
        )
        records = (len(record.token_ids) for record in self._records)
        return max((*spans, *records, self._mmlu.longest, self._tasks.longest))

    def check_context(self, checkpoint: Checkpoint) -> None:
        """Refuses a model that was made for shorter sequences than are read; costs nothing.

        Raises:
            InvalidRequestError: See above.
        """
        context = checkpoint.config.max_position_embeddings
        if self.longest > context:
            raise InvalidRequestError(
                f"{checkpoint.path}: its context is {context} tokens, and {self.longest} are read "
                f"at a time. Give --window and --full-length of at most {context}, or leave the "
                "model out."
            )

    def measure(self, model: StudyModel) -> Scores:
        """Returns the scores of a model with the weights that it has now.

        Raises:
            InvalidRequestError: As `check_context`.
        """
        self.check_context(model.checkpoint)
        return Scores(
            text={
                protocol: text_loss(model, self._ids, reading)
                for protocol, reading in self.readings.items()
            },
            instruct=instruct_loss(model, self._records) if self._records else None,
            mmlu=self._mmlu.ask(model),
            tasks=self._tasks.ask(model),
        )


def _check(files: SuiteFiles) -> None:
    if not any((files.wikitext, files.instruct, files.mmlu, files.tasks)):
        raise InvalidRequestError(
            "Nothing to measure: give --wikitext, --instruct, --mmlu or --tasks."
        )
    bounds = {
        "tokens": (files.num_tokens, 2, MAX_TOKENS),
        "window": (files.window, 2, MAX_TOKENS),
        "full-length": (2 if files.full_length is None else files.full_length, 2, MAX_TOKENS),
        "records": (files.num_instructions, 1, 100_000),
        "questions": (files.num_questions, 1, 10_000),
    }
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise InvalidRequestError(f"--{name} is {value}, expected {low} to {high}.", param=name)
