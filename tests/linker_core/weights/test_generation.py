"""What a checkpoint's generation_config.json makes of requests that say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from linker_core.errors import BadCheckpointError
from linker_core.weights.fields import Fields
from linker_core.weights.generation import GENERATION_FILE, sampling_defaults


def defaults(record: dict[str, Any]) -> dict[str, float | int]:
    return sampling_defaults(Fields(record, GENERATION_FILE))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": None, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
    ],
)
def test_file_that_does_not_sample_is_temperature_0(
    record: dict[str, Any], expected: dict[str, float]
) -> None:
    assert defaults(record) == expected


def test_do_sample_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(BadCheckpointError, match="do_sample"):
        defaults({"do_sample": "no"})
