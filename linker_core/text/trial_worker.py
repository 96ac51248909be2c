"""Tries a stranger's tokenizer and chat template: `python -m linker_core.text.trial_worker`.

Takes one trial on stdin and says on stdout, in one JSON line, what is wrong; `{}` if nothing is.
Whatever the files do to it, only this process ends: by a signal, when they take too long.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from linker_core.errors import BadCheckpointError, InvalidRequestError
from linker_core.text.chat_template import ChatTemplate
from linker_core.text.confinement import arm, confine, less_memory
from linker_core.text.files import TOKENIZER_FILE, TokenizerFiles
from linker_core.text.template_source import TemplateSource, template_variables
from linker_core.text.tokenizer import Tokenizer

MEMORY_BYTES: Final = 3 << 30  # of addresses; the largest tokenizers need a third of it
_TEMPLATE_S: Final = 1.0
_TEMPLATE_BYTES: Final = 512 << 20
_LONG: Final = 1 << 16  # characters of a text in which a slow pattern shows
_MEDIUM: Final = 1 << 11
_MAX_LITERALS: Final = 128
_MAX_TOKENS_PER_CHAR: Final = 64
_MAX_TOKEN_CHARS: Final = 1 << 14
_MAX_EMPTY_TOKENS: Final = 64
_SLOW_S: Final = 0.1  # of processor time, for one text
_CLOCK_S: Final = 0.01  # the coarsest that processor time is told
_SHORTER: Final = 8
_MAX_RATIO: Final = 3  # of a text's time to that of its parts; `_SHORTER` is a square
_DOUBTFUL_S: Final = 1.0  # below it a busy machine may be why a text took long
_SAMPLES: Final = (
    "The quick brown fox jumps over 13 lazy dogs; don't they? ",
    "x = [i ** 2 for i in range(10)]\n    ",
    *("a", " ", "\n", "\t ", "1", "!", "_", "<|", "\x00", "é", "ǅ", "世", "﷽"),
    *("e\u0301\u0323", "\u200d", "\U0001f469\u200d\U0001f467"),
)


class Patterns:
    """The regular expressions and literals of a tokenizer's steps."""

    def __init__(self, record: Any) -> None:
        self.texts: list[str] = []
        self._collect(record)

    def _collect(self, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("Regex", "String", "content", "prepend") and isinstance(value, str):
                    self.texts.append(value)
                self._collect(value)
        elif isinstance(node, list):
            for value in node:
                self._collect(value)

    @property
    def literals(self) -> str:
        """Returns every character that they speak of."""
        return "".join(dict.fromkeys(char for text in self.texts for char in text))

    def provocations(self) -> Iterator[str]:
        """Yields what patterns speak of; over and over, slow ones are slow with it."""
        runs = dict.fromkeys(run for text in self.texts for run in re.findall(r"\w{2,16}", text))
        yield from self.literals[:_MAX_LITERALS]
        yield from list(runs)[:_MAX_LITERALS]


def try_tokenizer(files: TokenizerFiles) -> None:
    """Builds a tokenizer and has it read and write all sorts of texts.

    Raises:
        BadCheckpointError: It fails, or makes far more tokens or text than it is given.
    """
    tokenizer = Tokenizer.of(files)
    record = json.loads(files.data)
    parts = [record.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    try:
        _check_empty(tokenizer)
        patterns = Patterns(parts)
        # What a pattern fails on, then what it needs: without that it is not even tried.
        end = "\x00" + patterns.literals
        for sample in _SAMPLES:
            _check_pace(tokenizer, sample, end, num_chars=_LONG)
        for literal in patterns.provocations():
            _check_pace(tokenizer, literal, end, num_chars=_MEDIUM)
        for token_id in range(tokenizer.num_tokens):
            _check_token(tokenizer, token_id)
    except InvalidRequestError as error:
        raise BadCheckpointError(f"{TOKENIZER_FILE}: cannot be used: {error.message}") from error


def try_template(source: TemplateSource) -> None:
    """Compiles a template and renders a plain dialogue, which it may refuse.

    Raises:
        BadCheckpointError: It does not compile.
    """
    template = ChatTemplate(source)
    variables = template_variables(
        [{"role": "user", "content": "Hello, 世界!"}],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    try:
        template.render(variables)
    except InvalidRequestError:
        return


def try_grammars(files: TokenizerFiles) -> None:
    """Has the engine's grammars read the tokenizer, who may well find it of no use to them."""
    import llguidance  # noqa: PLC0415 - takes a while, and templates need none

    text = files.data.decode().strip()
    if text.startswith("{"):
        try:
            llguidance.LLTokenizer(text)
        except ValueError:
            return


def _check_empty(tokenizer: Tokenizer) -> None:
    num_tokens = len(tokenizer.encode("", add_special_tokens=True))
    if num_tokens > _MAX_EMPTY_TOKENS:
        raise BadCheckpointError(f"{TOKENIZER_FILE}: makes {num_tokens} tokens of no text")


def _check_pace(tokenizer: Tokenizer, unit: str, end: str, *, num_chars: int) -> None:
    """Checks that a unit over and over, then an end, takes time and tokens in step with its length.

    Raises:
        BadCheckpointError: It does not.
    """
    num_units = max(_SHORTER, num_chars // len(unit))
    text = unit * num_units + end
    num_tokens, taken_s = _encoded(tokenizer, text)
    if num_tokens > _MAX_TOKENS_PER_CHAR * len(text):
        raise BadCheckpointError(
            f"{TOKENIZER_FILE}: makes {num_tokens} tokens of {len(text)} characters"
        )
    if taken_s > _SLOW_S:
        shorter = unit * (num_units // _SHORTER) + end
        in_parts_s = sum(_encoded(tokenizer, shorter)[1] for _ in range(_SHORTER))
        bound_s = _MAX_RATIO * (in_parts_s + _CLOCK_S)
        if bound_s < taken_s < _DOUBTFUL_S:
            taken_s = min(_encoded(tokenizer, text)[1] for _ in range(2))
        if taken_s > bound_s:
            raise BadCheckpointError(
                f"{TOKENIZER_FILE}: takes far longer over a text than over its parts. Leave out "
                "the pattern that does so."
            )


def _encoded(tokenizer: Tokenizer, text: str) -> tuple[int, float]:
    """Returns the number of tokens of a text, and the seconds of processor time for it."""
    started_at = time.process_time()
    ids = tokenizer.encode(text, add_special_tokens=True)
    taken_s = time.process_time() - started_at
    tokenizer.decode(ids[:_MEDIUM], skip_special_tokens=False)
    return len(ids), taken_s


def _check_token(tokenizer: Tokenizer, token_id: int) -> None:
    num_chars = len(tokenizer.decode((token_id, token_id), skip_special_tokens=False))
    if num_chars > 2 * _MAX_TOKEN_CHARS:
        raise BadCheckpointError(
            f"{TOKENIZER_FILE}: token {token_id} reads as more than {_MAX_TOKEN_CHARS} characters"
        )


def perform(stream: BinaryIO) -> dict[str, str]:
    """Reads a trial and returns what is wrong with what it holds."""
    head = json.loads(stream.readline())
    data = stream.read(head["tokenizer_bytes"])
    stage = "template"
    try:
        if head["template"] is not None:
            arm(_TEMPLATE_S)
            with less_memory(_TEMPLATE_BYTES):
                try_template(TemplateSource.of(head["template"], origin=head["origin"]))
        stage = "tokenizer"
        if data:
            files = TokenizerFiles(data, head["settings"])
            arm(head["tokenizer_s"])
            try_tokenizer(files)
            try_grammars(files)
    except BadCheckpointError as error:
        return {"error": error.message}
    except MemoryError:
        return {"error": f"The {stage} takes more memory than it may."}
    finally:
        arm(0)
    return {}


def main() -> int:
    """Performs one trial."""
    confine(memory_bytes=MEMORY_BYTES)
    sys.stdout.write(json.dumps(perform(sys.stdin.buffer)) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
