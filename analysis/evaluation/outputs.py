"""Greedy answers along a kernel (FM 4.5), and how much of them repeats itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from analysis.evaluation.instructions import Instruction
from analysis.evaluation.sweep import Told, unheard
from analysis.evaluation.texts import refusal
from analysis.family import StudiedFamily
from analysis.kernel.kernel import Kernel
from analysis.kernel.put import put_kernel
from analysis.model import StudyModel
from linker_core.errors import InvalidRequestError
from linker_core.tuning.json_lines import parse_rows, read_bytes

SCALES: Final = (0.0, 0.5, 1.0, 2.0)  # FM 4.5
MAX_TOKENS: Final = 64
PROMPTS: Final = (
    "How do I make a mushroom risotto?",
    "Explain to a child why the sky is blue.",
    "Give three tips for learning a new language.",
    "Write a short letter to a friend about a day at the sea.",
    "What is the difference between a village and a city?",
)
_MAX_PROMPTS: Final = 1000
_MAX_PROMPT_CHARS: Final = 100_000
_GRAM: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a model wrote."""

    prompt: str
    scale: float
    text: str
    num_tokens: int
    repeated: float  # share of its runs of four tokens that it wrote before

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def load_prompts(path: Path, *, param: str = "prompts") -> list[str]:
    """Returns the prompts of a file of JSON lines, each `"text"` or `{"prompt": "text"}`.

    Raises:
        InvalidRequestError: It cannot be read, is too large, or a row is no prompt.
    """
    try:
        return parse_rows(read_bytes(path), _prompt, max_rows=_MAX_PROMPTS)
    except ValueError as error:
        raise refusal(path, str(error), param=param) from error


def greedy_outputs(
    model: StudyModel,
    family: StudiedFamily,
    kernel: Kernel,
    prompts: Sequence[str],
    *,
    scales: Sequence[float] = SCALES,
    max_tokens: int = MAX_TOKENS,
    alpaca: bool = False,
    told: Told = unheard,
) -> Iterator[Output]:
    """Yields the answers to every prompt at every scale, scale by scale.

    Args:
        model: The base's; it has the base's weights again at the end.
        family: The kernel's.
        kernel: Which is added.
        prompts: Texts.
        scales: The alpha of FM Eq. 5.
        max_tokens: Of an answer.
        alpaca: Whether a prompt is put into Alpaca's format, or stands as it is.
        told: Hears what is written next.

    Raises:
        InvalidRequestError: A prompt leaves no room for an answer in the model's context.
    """
    encoded = [encode_prompt(model, prompt, alpaca=alpaca) for prompt in prompts]
    try:
        for scale in scales:
            told(f"answers at {scale:g}")
            put_kernel(model, family, kernel, scale=scale)
            for prompt, ids in zip(prompts, encoded, strict=True):
                answer = model.greedy(ids, max_tokens=max_tokens)
                yield Output(
                    prompt=prompt,
                    scale=scale,
                    text=model.tokenizer.decode(answer),
                    num_tokens=len(answer),
                    repeated=repeated_share(answer),
                )
    finally:
        model.restore(kernel.tensors)


def check_max_tokens(max_tokens: int) -> None:
    """Refuses answers without a token.

    Raises:
        InvalidRequestError: See above.
    """
    if max_tokens < 1:
        raise InvalidRequestError(
            f"--max-tokens is {max_tokens}, expected 1 or more.", param="max_tokens"
        )


def encode_prompt(model: StudyModel, prompt: str, *, alpaca: bool) -> list[int]:
    """Returns a prompt's tokens.

    Raises:
        InvalidRequestError: They are none, too many for the context, or not the model's.
    """
    text = Instruction(instruction=prompt, input="", output="").prompt if alpaca else prompt
    ids = model.tokenizer.encode(text, add_special_tokens=True)
    context = model.config.max_position_embeddings
    if not 1 <= len(ids) < context or max(ids) >= model.config.vocab_size:
        raise InvalidRequestError(
            f"The prompt {prompt!r:.60} has {len(ids)} tokens; expected 1 to {context - 1} that "
            "the model knows.",
            param="prompts",
        )
    return ids


def repeated_share(ids: Sequence[int]) -> float:
    """Returns the share of runs of four tokens that occurred before; 0 for fewer than five."""
    runs = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _prompt(row: Any) -> str:
    text = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(text, str) or not 0 < len(text.strip()) <= len(text) <= _MAX_PROMPT_CHARS:
        raise ValueError(
            f'expected "text" or {{"prompt": "text"}} of 1 to {_MAX_PROMPT_CHARS} characters'
        )
    return text
