from __future__ import annotations

from pathlib import Path

import pytest

import configs
from linker_core.errors import InvalidRequestError
from server.settings import Settings, load_settings, parse_size


def test_shipped_defaults_are_the_defaults() -> None:
    assert load_settings(Path(configs.__path__[0]) / "default.yaml", {}) == Settings()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("http: {port: 1, host: '::1'}\nengine: {memory_budget: 8GiB}\n")
    settings = load_settings(file, {"http": {"port": 2}})
    assert (settings.http.port, settings.http.host) == (2, "::1")
    assert settings.engine.memory_budget == 8 * 1024**3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http: {prot: 1}", ("http.prot: there is no such setting. Is http.port meant?",)),
        ("enigne: {device: cpu}", ("enigne: there is no such setting. Is engine meant?",)),
        ("analysis: {x: 1}", ("analysis.x: there is no", "analysis takes enabled, settle_s.")),
        ("models: {serve: [{name: a}]}", ("models.serve.0.path: it is missing",)),
        ("models: {serve: [{pth: a}]}", ("models.serve.0",)),
        ("engine: {device: tpu}", ("engine.device = 'tpu': it has to be cpu or cuda.",)),
        ("engine: {page_tokens: 3}", ("'3': it has to be 1, 2, 4, 8, 16, 32, 64, 128 or 256.",)),
        ("http: {port: 70000}", ("http.port = '70000': it has to be an integer from 0 to 65535.",)),
        ("http: {port: many}", ("http.port = 'many': it has to be an integer from 0 to 65535.",)),
        ("http: {strict: 7}", ("http.strict = '7': it has to be true or false.",)),
        ("http: {send_timeout_s: 0}", ("it has to be a number above 0 and up to 3600.",)),
        ("engine: {max_model_len: x}", ("it has to be an integer from 1 to 16777216 or null.",)),
        ("- 1", ("mapping",)),
        ("http: 3", ("http = '3': it has to be a mapping of settings to values.",)),
        ("a: [", ("YAML", "line 1, column 5")),
        ("http:\n  port: 1\n port: 2\n", ("YAML", "line 3, column 2")),
        ("http: \x01", ("YAML",)),
        ("engine: {memory_budget: much}", ("engine.memory_budget", "much")),
        (
            "telemetry: {otlp_endpoint: 'localhost:4318'}",
            ("'localhost:4318': an address has to begin with http:// or https://",),
        ),
        ("sharing: {policy: auto}", ("sharing.policy", "auto", "budget")),
        ("sharing: {budget_kl: .inf}", ("sharing.budget_kl", "inf")),
        ("sharing: {max_bytes: -1}", ("sharing.max_bytes", "-1")),
    ],
)
def test_bad_file_is_refused_naming_file_key_and_value(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError) as caught:
        load_settings(file, {})
    assert all(word in caught.value.message for word in (str(file), *words))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nothing\.yaml: there is no such file"):
        load_settings(tmp_path / "nothing.yaml", {})


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("512M", 512 << 20), ("8G", 8 << 30), ("8GiB", 8 << 30), ("1kb", 1024)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "G", "1P", "1 G B"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="powers of 1024"):
        parse_size(text)


def test_state_lies_under_the_users_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert Settings().registry_url() == "sqlite:////data/linker-llm/registry.sqlite3"
