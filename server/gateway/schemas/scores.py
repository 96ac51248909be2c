"""The body of scores. No unknown field is taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.gateway.schemas.generation import VariantMode
from server.gateway.schemas.parsing import Closed, few

_MAX_NUMBERS = 32
_MAX_TASKS = 128

# As harnesses write them: "pass@1,create_test", "High School Biology".
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][ -~]{0,95}$")]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Numbers = Annotated[dict[_Name, _Number], Field(max_length=_MAX_NUMBERS), few(_MAX_NUMBERS)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]


class TaskBody(Closed):
    """What came of one task."""

    metrics: _Numbers = Field(min_length=1)
    stderr: _Numbers = Field(default_factory=dict)
    num_samples: _Count | None = None
    num_fewshot: _Count | None = None
    is_partial: bool = False


class ScoresBody(Closed):
    """POST /models/scores."""

    model: str
    variant_mode: VariantMode  # whose weights answered
    harness: str = Field(min_length=1, max_length=64, pattern=r"^[ -~]+$")
    plan: str | None = Field(default=None, max_length=64)  # `plan.digest`; null: the model's
    tasks: Annotated[
        dict[_Name, TaskBody], Field(min_length=1, max_length=_MAX_TASKS), few(_MAX_TASKS)
    ]
