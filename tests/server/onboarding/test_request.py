from __future__ import annotations

import math
from typing import Any

import pytest

from linker_core.errors import InvalidRequestError
from server.onboarding.request import OnboardRequest, check_sharing, resolve_sharing
from server.settings import SharingSettings


def resolved(said: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What a request comes to, without what it leaves open."""
    choice = resolve_sharing(said, SharingSettings.model_validate(settings))
    return {option: value for option, value in choice.items() if value is not None}


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        ({}, "budget"),
        ({"budget_kl": 0.5}, "budget"),
        ({"max_bytes": 0}, "bytes"),
        ({"tau_cos": 0.9, "tau_frob": 0.0}, "thresholds"),
        ({"tier": "Qwen2.5-3B", "budget_kl": 0.5}, "thresholds"),
        ({"policy": "exact"}, "exact"),
    ],
)
def test_options_without_a_policy_imply_the_one_that_takes_them(
    said: dict[str, Any], policy: str
) -> None:
    assert resolved(said)["policy"] == policy


def test_budget_that_nobody_states_is_a_hundredth_of_a_nat() -> None:
    assert resolved({}) == {"policy": "budget", "budget_kl": 0.01}
    assert resolved({"policy": "budget"}, policy="exact") == {"policy": "budget", "budget_kl": 0.01}


def test_settings_serve_where_their_policy_is_used_and_nowhere_else() -> None:
    settings = {"policy": "thresholds", "tau_cos": 0.9, "tau_frob": 0.1, "budget_kl": 0.2}
    assert resolved({}, **settings) == settings
    assert resolved({"policy": "thresholds"}, **settings) == settings
    assert resolved({"tau_cos": 0.5, "tau_frob": 0.5}, **settings) == {
        **settings, "tau_cos": 0.5, "tau_frob": 0.5,
    }  # fmt: skip
    assert resolved({"tier": "Qwen2.5-3B"}, **settings) == {
        "policy": "thresholds", "tier": "Qwen2.5-3B", "budget_kl": 0.2,
    }  # fmt: skip
    assert resolved({"policy": "exact"}, **settings) == {"policy": "exact"}
    assert resolved({}, policy="bytes", max_bytes="2K") == {"policy": "bytes", "max_bytes": 2048}


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"tau_cos": 0.9, "tau_frob": 0.1}, "thresholds"),
        ({"tier": "Qwen2.5-3B", "budget_kl": 0.2}, "thresholds"),
        ({"max_bytes": "2K"}, "bytes"),
        ({"budget_kl": 0.2}, "budget"),
        ({"policy": "thresholds", "budget_kl": 0.2}, "thresholds"),
        ({}, "budget"),
    ],
)
def test_options_of_the_settings_imply_a_policy_as_those_of_a_request(
    settings: dict[str, Any], policy: str
) -> None:
    assert resolved({}, **settings)["policy"] == policy
    assert settings.items() - {("max_bytes", "2K")} <= resolved({}, **settings).items()
    assert resolved({"policy": policy}, **settings) == resolved({}, **settings)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"policy": "budget", "budget_kl": math.nan}, "budget_kl"),
        ({"policy": "budget", "budget_kl": math.inf}, "budget_kl"),
        ({"policy": "budget", "budget_kl": -0.1}, "budget_kl"),
        ({"policy": "bytes", "max_bytes": -1}, "max_bytes"),
        ({"policy": "bytes", "max_bytes": 2**63}, "max_bytes"),
        ({"policy": "thresholds", "tau_cos": 1.1, "tau_frob": 0.1}, "tau_cos"),
        ({"policy": "thresholds", "tau_cos": math.nan, "tau_frob": 0.1}, "tau_cos"),
        ({"policy": "thresholds", "tau_cos": 0.9, "tau_frob": math.nan}, "tau_frob"),
        ({"policy": "thresholds", "tau_cos": 0.9, "tau_frob": -0.1}, "tau_frob"),
        ({"policy": "budget", "budget_kl": 0.1, "tier": "Qwen2.5-3B"}, "tier"),
        ({"policy": "budget", "max_bytes": 3}, "max_bytes"),
        ({"policy": "bytes"}, "max_bytes"),
        ({"policy": "bytes", "max_bytes": 3, "budget_kl": 0.1}, "budget_kl"),
        ({"policy": "exact", "budget_kl": 0.1}, "budget_kl"),
        ({"policy": "exact", "tau_cos": 0.9, "tau_frob": 0.1}, "tau_cos"),
        ({"policy": "thresholds", "tau_cos": 0.9}, "tau_frob"),
        ({"policy": "thresholds", "max_bytes": 3}, "max_bytes"),
        ({"policy": "thresholds", "tier": "nonsense"}, "tier"),
        ({"policy": "thresholds", "tier": "Qwen2.5-3B", "tau_cos": 0.9, "tau_frob": 0.1}, "tier"),
    ],
)
def test_contradiction_is_refused_by_the_name_of_an_option(
    options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_sharing(OnboardRequest(name="a", source="b", **options))
    assert caught.value.param == param


def test_refusal_names_the_policies_that_would_take_the_option() -> None:
    with pytest.raises(InvalidRequestError, match="budget and thresholds would"):
        check_sharing(OnboardRequest(name="a", source="b", policy="exact", budget_kl=0.1))


def test_request_comes_back_from_its_record() -> None:
    request = OnboardRequest(name="a", source="b", policy="bytes", max_bytes=3)
    assert OnboardRequest.from_json(request.to_json()) == request
