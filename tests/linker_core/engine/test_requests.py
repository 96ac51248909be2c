"""What is refused before it reaches the batch, and which parameter is named for it."""

from __future__ import annotations

from typing import Any

import pytest

from linker_core.engine.messages import SamplingParams, Submit
from linker_core.engine.requests import check_submit
from linker_core.engine.resident_model import ResidentModel
from linker_core.errors import (
    ContextLengthError,
    InvalidRequestError,
    LinkerError,
    ModelNotFoundError,
)
from tests.linker_core.engine.serving import Served

WIDTH = 514  # of "own", which has two tokens more than its donor


def submit(prompt: tuple[int, ...] = (1, 2), **params: Any) -> Submit:
    sampling = SamplingParams(**{"max_tokens": 4, **params})
    return Submit(request_id="r", model="own", prompt_ids=prompt, sampling=sampling)


def refused(served: Served, command: Submit) -> LinkerError:
    with pytest.raises(LinkerError) as caught:
        check_submit(command, served.driver.engine.residents.served["own"])
    return caught.value


def test_check_submit_bounds_every_list_of_ids_by_the_logits(served: Served) -> None:
    for wrong in (-1, WIDTH, 2**31, 2**63):
        lists: dict[str, Any] = {
            "logit_bias": {5: 1.0, wrong: 1.0},
            "stop_token_ids": frozenset({5, wrong}),
            "allowed_token_ids": frozenset({5, wrong}),
            "bad_words": ((5,), (6, wrong, 7)),
        }
        for param, ids in lists.items():
            error = refused(served, submit(**{param: ids}))
            assert isinstance(error, InvalidRequestError)
            assert error.param == param
            assert str(wrong) in error.message
        error = refused(served, submit((3, wrong)))
        assert error.param == "prompt"


def test_check_submit_takes_the_last_id_of_the_variants_own_width(served: Served) -> None:
    last = WIDTH - 1
    command = submit(
        (last,),
        logit_bias={last: 1.0},
        stop_token_ids=frozenset({last}),
        allowed_token_ids=frozenset({last}),
        bad_words=((last,),),
    )
    own = served.driver.engine.residents.served["own"]
    assert check_submit(command, own) is own


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": frozenset()}, "allowed_token_ids"),
        ({"bad_words": ((1,), ())}, "bad_words"),
        ({"grammar": "x" * (64 * 1024 + 1)}, "structured_outputs"),
        ({"grammar": "é" * (32 * 1024 + 1)}, "structured_outputs"),
    ],
)
def test_check_submit_refuses_constraints_that_cannot_be_met(
    served: Served, params: dict[str, Any], param: str
) -> None:
    error = refused(served, submit(**params))
    assert isinstance(error, InvalidRequestError)
    assert error.param == param


def test_check_submit_without_model_prompt_or_room_is_refused(served: Served) -> None:
    own = served.driver.engine.residents.served["own"]
    with pytest.raises(ModelNotFoundError):
        check_submit(submit(), None)
    assert refused(served, submit(())).param == "prompt"
    assert isinstance(refused(served, submit(max_tokens=255)), ContextLengthError)
    assert check_submit(submit(max_tokens=254), own) is own
    leaving: ResidentModel = own
    leaving.unloading = True
    with pytest.raises(ModelNotFoundError):
        check_submit(submit(), leaving)
