"""How one variant reads dialogues: the token ids it is served, and which of them it would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from linker_core.errors import InvalidRequestError
from linker_core.text.template_source import Renders, template_variables
from linker_core.text.tokenizer import Tokenizer
from linker_core.tuning.dialogues import Dialogue, Turn

_SEPARATOR: Final = "\n\n"  # of messages where a model has no template


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantReader:
    """A variant's text side, as serving uses it."""

    tokenizer: Tokenizer
    template: Renders | None
    eos_token_ids: frozenset[int]  # end an answer in serving
    vocab_size: int  # rows of the variant's own embedding

    def read(self, dialogue: Dialogue, *, max_tokens: int) -> tuple[list[int], list[range]]:
        """Returns a dialogue's tokens and the positions in them that the assistant wrote.

        An answer ends with its stop token. Of a plain text all but the first token is an answer.

        Args:
            dialogue: Any.
            max_tokens: Longer sequences are cut.

        Raises:
            InvalidRequestError: The template or the tokenizer refuses the dialogue, no answer
                begins within `max_tokens`, or an id lies beyond the vocabulary.
        """
        if dialogue.plain:
            ids = self.tokenizer.encode(dialogue.turns[0].content, add_special_tokens=True)
            spans = [range(1, len(ids))]
        else:
            ids, spans = self._teacher_forced(dialogue.turns, max_tokens)
        spans = [range(span.start, min(span.stop, max_tokens)) for span in spans]
        spans = [span for span in spans if span]
        if not spans:
            raise InvalidRequestError(f"no answer begins within the first {max_tokens} tokens")
        ids = ids[: spans[-1].stop]
        self._check_ids(ids)
        return ids, spans

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Returns the tokens of a dialogue up to where its last answer begins.

        Raises:
            InvalidRequestError: The template or the tokenizer refuses the dialogue, or an id lies
                beyond the vocabulary.
        """
        before = dialogue.turns[: _last_answer(dialogue.turns)]
        ids = self._encode(self._render(before, open_answer=True))
        self._check_ids(ids)
        return ids

    def _teacher_forced(
        self, turns: Sequence[Turn], max_tokens: int
    ) -> tuple[list[int], list[range]]:
        ids: list[int] = []
        spans: list[range] = []
        text = ""
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or len(ids) >= max_tokens:
                continue
            prompt = self._render(turns[:index], open_answer=True)
            answered = self._render(turns[: index + 1], open_answer=False)
            appended = prompt.startswith(text) and answered.startswith(prompt)
            if not appended or turn.content.strip() not in answered[len(prompt) :]:
                return self._last_answer_alone(turns)
            ids = self._extended(ids, text, prompt)
            start = len(ids)
            ids = self._extended(ids, prompt, answered)
            spans.append(range(max(start, 1), start + self._answer_length(ids[start:])))
            text = answered
        return ids, spans

    def _last_answer_alone(self, turns: Sequence[Turn]) -> tuple[list[int], list[range]]:
        """Reads a dialogue whose template does not simply append an answer to its prompt.

        Some leave out earlier thoughts, some write an answer otherwise than they announce it.
        """
        last = _last_answer(turns)
        prompt = self._render(turns[:last], open_answer=True)
        answered = self._render(turns[: last + 1], open_answer=False)
        content = turns[last].content.strip()
        _, found, ending = answered.rpartition(content)
        ids = self._encode(prompt)
        start = len(ids)
        ids = self._extended(ids, prompt, prompt + content + (ending if found else ""))
        ids = ids[: start + self._answer_length(ids[start:])]
        if self.eos_token_ids and ids[-1] not in self.eos_token_ids | self.tokenizer.special_ids:
            ids.append(min(self.eos_token_ids))
        return ids, [range(max(start, 1), len(ids))]

    def _render(self, turns: Sequence[Turn], *, open_answer: bool) -> str:
        """Returns the text of messages, up to where an answer begins if it is open."""
        if self.template is None:
            text = _SEPARATOR.join(turn.content for turn in turns)
            return text + _SEPARATOR if turns and open_answer else text
        variables = template_variables(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=open_answer,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )
        return self.template.render(variables)

    def _encode(self, text: str) -> list[int]:
        # As serving does: a rendered template holds its special tokens already.
        return self.tokenizer.encode(text, add_special_tokens=self.template is None)

    def _extended(self, ids: list[int], text: str, longer: str) -> list[int]:
        """Returns the ids of `longer`, which begins with `text`, such that `ids` begin them.

        Serving appends tokens to a prompt's and never changes those. What follows is encoded with
        the text before it where that leaves them alone, as in training, and apart from it if not.
        """
        together = self._encode(longer)
        if together[: len(ids)] == ids:
            return together
        return ids + self.tokenizer.encode(longer[len(text) :], add_special_tokens=False)

    def _answer_length(self, ids: Sequence[int]) -> int:
        """Returns how many tokens the model would write: up to a stop token, which is included.

        What a template writes after that, such as a line break, belongs to the next prompt.
        """
        for ends in (self.eos_token_ids, self.tokenizer.special_ids):
            for index, token_id in enumerate(ids):
                if token_id in ends:
                    return index + 1
        return len(ids)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.vocab_size:
            raise InvalidRequestError(
                f"the tokenizer makes ids beyond the model's last, {self.vocab_size - 1}"
            )


def _last_answer(turns: Sequence[Turn]) -> int:
    return max(index for index, turn in enumerate(turns) if turn.role == "assistant")
