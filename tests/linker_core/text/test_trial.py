from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from linker_core.errors import BadCheckpointError, InsufficientCapacityError
from linker_core.text import trial, trial_worker
from linker_core.text.files import TokenizerFiles
from linker_core.text.template_source import TemplateSource
from linker_core.text.tokenizer import Tokenizer
from linker_core.text.trial import pass_trial
from tests.linker_core.text import tokenizers_by_kind as kinds
from tests.tiny import CHATML

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _nothing_has_passed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_passed", type(trial._passed)())
        yield


def files(inner: tokenizers.Tokenizer, **changes: Any) -> TokenizerFiles:
    record = json.loads(inner.to_str()) | changes
    return TokenizerFiles(json.dumps(record).encode(), {})


def split_by(pattern: str) -> TokenizerFiles:
    inner = kinds.byte_level()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return files(inner)


@pytest.mark.parametrize("inner", [kinds.byte_level(), kinds.byte_fallback()])
def test_what_models_have_passes(inner: tokenizers.Tokenizer) -> None:
    pass_trial(files(inner), TemplateSource.of(CHATML))


def test_pattern_of_a_large_model_passes() -> None:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pass_trial(split_by(words), None)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(☃+)+$", "(é|é)*!", "(.*)*z", "(ab|a|b)*☃"])
def test_pattern_that_explodes_is_a_bad_checkpoint(pattern: str) -> None:
    with pytest.raises(BadCheckpointError, match=r"tokenizer\.json"):
        pass_trial(split_by(pattern), None)


def test_pattern_of_squared_time_is_a_bad_checkpoint() -> None:
    with pytest.raises(BadCheckpointError, match=r"far longer|too long"):
        pass_trial(split_by("a*b"), None)


@pytest.mark.parametrize(("again_s", "passes"), [(0.001, True), (0.5, False)])
def test_text_that_took_long_once_is_read_again(
    monkeypatch: pytest.MonkeyPatch, again_s: float, passes: bool
) -> None:
    """A busy machine is slow for a moment, a bad pattern every time."""
    taken_s = iter([0.5, *[0.001] * 8, again_s, again_s])
    monkeypatch.setattr(trial_worker, "_encoded", lambda *_: (1, next(taken_s)))
    tokenizer = Tokenizer.of(files(kinds.byte_level()))
    with nullcontext() if passes else pytest.raises(BadCheckpointError, match="far longer"):
        trial_worker._check_pace(tokenizer, "a", "b", num_chars=1 << 10)


def test_chain_of_replacements_is_a_bad_checkpoint() -> None:
    inner = kinds.byte_level()
    inner.normalizer = normalizers.Sequence(
        [normalizers.Replace(one, two * 10) for one, two in ("ab", "bc", "cd", "de")]
    )
    with pytest.raises(BadCheckpointError, match=r"can make 1e\+04 characters of one"):
        pass_trial(files(inner), None)


def test_decoder_that_panics_is_a_bad_checkpoint() -> None:
    inner = kinds.byte_fallback()
    inner.decoder = decoders.Strip("a", 10, 10)
    with pytest.raises(BadCheckpointError, match="cannot be used"):
        pass_trial(files(inner), None)


def test_tokens_without_number_are_a_bad_checkpoint() -> None:
    record = json.loads(kinds.byte_level().to_str())
    token = record["added_tokens"][0]
    many = [{**token, "id": 9000 + i, "content": f"<{i}>"} for i in range(100_000)]
    with pytest.raises(BadCheckpointError, match="added_tokens"):
        pass_trial(files(kinds.byte_level(), added_tokens=many), None)


def test_token_of_a_million_characters_is_a_bad_checkpoint() -> None:
    inner = kinds.byte_level()
    inner.add_tokens(["x" * 1_000_000])
    with pytest.raises(BadCheckpointError, match="reads as more than"):
        pass_trial(files(inner), None)


@pytest.mark.parametrize(
    "source", [ENDLESS, "{{ 'a' * 9 }}{% for i in range(9) %}" + ENDLESS + "{% endfor %}"]
)
def test_template_that_comes_to_no_end_is_a_bad_checkpoint(source: str) -> None:
    with pytest.raises(BadCheckpointError, match="too long"):
        pass_trial(None, TemplateSource.of(source))


def test_template_that_takes_all_memory_is_a_bad_checkpoint() -> None:
    # In leaps: to fill half a gigabyte takes a busy machine longer than a template has.
    squaring = (
        "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(9) %}"
        "{% set ns.a = ns.a.replace('a', ns.a[:9999]) %}{% endfor %}"
    )
    with pytest.raises(BadCheckpointError, match="memory"):
        pass_trial(None, TemplateSource.of(squaring))


def test_template_that_does_not_compile_is_a_bad_checkpoint() -> None:
    with pytest.raises(BadCheckpointError, match="does not compile"):
        pass_trial(None, TemplateSource.of("{% if %}"))


def test_template_that_refuses_a_dialogue_passes() -> None:
    pass_trial(None, TemplateSource.of("{{ raise_exception('system first') }}"))


def test_what_passed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = files(kinds.byte_level())
    pass_trial(tried, TemplateSource.of(CHATML))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second trial")

    monkeypatch.setattr(subprocess, "run", refuse)
    pass_trial(tried, TemplateSource.of(CHATML))
    with pytest.raises(AssertionError, match="second trial"):
        pass_trial(files(kinds.byte_fallback()), None)


def test_what_failed_is_tried_again() -> None:
    for _ in range(2):
        with pytest.raises(BadCheckpointError):
            pass_trial(None, TemplateSource.of("{% if %}"))


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import os; os.abort()", BadCheckpointError, "ends the process"),
        ("import os; os.kill(os.getpid(), 9)", InsufficientCapacityError, "memory"),
        ("import os; os.kill(os.getpid(), 27)", BadCheckpointError, "too long"),
    ],
)
def test_end_of_the_process_is_told_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(trial, "_COMMAND", (trial._COMMAND[0], "-c", program))
    with pytest.raises(error, match=message):
        pass_trial(files(kinds.byte_level()), None)


def test_process_sees_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = "import json, os; print(json.dumps({'error': ' '.join(os.environ)}))"
    monkeypatch.setattr(trial, "_COMMAND", (trial._COMMAND[0], "-c", program))
    with pytest.raises(BadCheckpointError) as caught:
        pass_trial(files(kinds.byte_level()), None)
    assert "RAYON_NUM_THREADS" in caught.value.message
    assert "HF_TOKEN" not in caught.value.message


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "alpaca", "chatml", "gemma-it", "llama-3-instruct", "mistral-instruct",
        "qwen2.5-instruct", "zephyr",
    ],
)  # fmt: skip
def test_templates_of_models_pass(shared: Path, name: str) -> None:
    source = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    pass_trial(None, TemplateSource.of(source))


def test_server_that_is_stopped_with_all_its_processes_calls_no_template_bad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = (
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); "
        "from linker_core.text.trial_worker import main; main()"
    )
    monkeypatch.setattr(trial, "_COMMAND", (sys.executable, "-c", stopped))
    pass_trial(None, TemplateSource.of(CHATML))
