from __future__ import annotations

import pytest

from linker_core.weights import strict_json


def test_parse_ordinary_document_returns_its_values() -> None:
    assert strict_json.parse(b'{"a": [1, -2.5, true, null, "\\u00e9"]}') == {
        "a": [1, -2.5, True, None, "é"]
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e400]", "out of range"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"a": [["\\ud800"]]}', "surrogate"),
        (b'"\\ud800"', "surrogate"),
        (b"[" * 100_000, "deeper"),
        (b'\xff"', "UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": 1} x', "Extra data"),
        (b"", "Expecting value"),
        (b'"' + b'\\"' * 1_000_000, "Unterminated"),
    ],
)
def test_parse_hostile_document_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.parse(text)


def test_parse_brackets_inside_strings_do_not_count_as_depth() -> None:
    assert strict_json.parse(b'["' + b"[" * 500 + b'\\""]') == ["[" * 500 + '"']
