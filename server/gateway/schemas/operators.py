"""The bodies of operators' routes. Unlike generation, these take no unknown field."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from server.gateway.schemas.parsing import Closed
from server.settings import Seconds, SharingPolicy, parse_duration

FOR_EVER_S = 1e9  # the longest that a model may be told to stay
_MAX_FITTED = 16  # variants of one joint plan; each is scanned and priced


def _stay(value: object) -> object:
    found = parse_duration(value)
    return FOR_EVER_S if found is None and value is not None else found


# How long a model stays unused: seconds, or a text such as "5m"; negative: for ever.
Stay = Annotated[Seconds | None, BeforeValidator(_stay)]


class ReplanBody(Closed):
    """PATCH /models/{name}, and how every plan is asked for."""

    policy: SharingPolicy | None = None
    budget_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_bytes: int | None = Field(default=None, ge=0, lt=2**63)
    tau_cos: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    tau_frob: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    tier: str | None = None


class ChangeBody(ReplanBody):
    """PATCH /models/{name}. What is left out stays as it is."""

    pin: bool | None = None
    alias: str | None = None  # null takes it away
    keep_alive: Stay = None  # null: the settings'


class SharingBody(ReplanBody):
    """What onboarding and its dry run share."""

    source: str
    revision: str | None = None  # of a source on the hub
    donor: str | None = None  # None: auto


class OnboardBody(SharingBody):
    """POST /models."""

    name: str
    pin: bool | None = None
    keep_alive: Stay = None  # null: the settings'


class PlanBody(SharingBody):
    """POST /models/plan. Name and options decide nothing; they may come along."""

    name: str | None = None
    pin: bool | None = None
    keep_alive: Stay = None


class LoadBody(Closed):
    """POST /models/load."""

    model: str
    wait: bool | None = None  # null: true


class UnloadBody(Closed):
    """POST /models/unload."""

    model: str
    rehome: bool | None = None  # null: false


class FittedModel(Closed):
    """One of the variants of a joint plan."""

    source: str
    name: str | None = Field(default=None, min_length=1, max_length=256)  # None: the source


class FitBody(Closed):
    """POST /models/plan of several variants that are to fit into one memory."""

    models: Annotated[
        list[FittedModel], Field(fail_fast=True, min_length=1, max_length=_MAX_FITTED)
    ]
    donor: str | None = None  # None: auto
    budget_bytes: int = Field(ge=0, lt=2**63)
