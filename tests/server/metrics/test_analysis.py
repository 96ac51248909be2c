"""What is written of studies of families."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from analysis.diagnostics import Kind
from linker_core.pace import Spent
from server.metrics.analysis import KINDS, AnalysisSeries
from server.metrics.view import View
from server.registry.records import ModelRecord, ModelState
from tests.server.summaries import COMPONENTS, study_of, summary_of

THREE = ("a", "b", "c")


class Shown:
    """The series of one family, whose study and members tests change."""

    def __init__(self, *members: str, summary: dict[str, Any] | None = None) -> None:
        self.members = list(members)
        self.summary = summary or summary_of("base", *members)
        self.family = "base"
        self.now = 23.5
        self._series = AnalysisSeries(lambda: self.now)

    def text(self) -> str:
        view = View(
            models=[_record("base", None), *(_record(name, "base") for name in self.members)],
            snapshot=None,
            engine_up=True,
            engine_restarts=0,
            studies={self.family: study_of(self.family, summary=self.summary)},
            study_time=Spent(busy_s=10.0, busy_cpu_s=0.25, idle_s=2.0, idle_cpu_s=1.5),
        )
        return "".join(self._series.render(view))

    def lines(self) -> dict[str, float]:
        found = (line for line in self.text().splitlines() if not line.startswith("#"))
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in found}

    def named(self, name: str) -> dict[str, float]:
        return {line: value for line, value in self.lines().items() if line.startswith(name)}


def _record(name: str, donor: str | None) -> ModelRecord:
    return ModelRecord(
        name=name, source="", request={}, state=ModelState.READY, position=0, created_at=0.0,
        donor=donor, family=donor,
    )  # fmt: skip


def test_kinds_are_those_that_a_study_tells_apart() -> None:
    assert sorted(KINDS) == sorted(Kind)


def test_family_shows_its_pc1_its_null_and_its_kernel() -> None:
    lines = Shown(*THREE).lines()
    for place, component in enumerate(COMPONENTS):
        of = f'{{component="{component}",family="base"}}'
        assert lines[f"linker_pc1_variance_ratio{of}"] == pytest.approx(0.5 + 0.02 * place)
        assert lines[f"linker_pc1_null_ratio{of}"] == pytest.approx(0.35 + 0.01 * place)
        assert lines[f"linker_kernel_snr{of}"] == pytest.approx(0.7 + 0.1 * place)
    assert lines['linker_pairwise_cosine{family="base"}'] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert lines['linker_kernel_acceptance_ratio{family="base"}'] == 0.44
    assert lines['linker_analysis_age_seconds{family="base"}'] == 3.5


def test_time_of_studies_is_told_apart_by_whether_sequences_ran() -> None:
    assert Shown(*THREE).named("linker_analysis_cpu") == {
        'linker_analysis_cpu_seconds_total{sequences="running"}': 0.25,
        'linker_analysis_cpu_seconds_total{sequences="none"}': 1.5,
    }
    assert Shown(*THREE).named("linker_analysis_seconds") == {
        'linker_analysis_seconds_total{sequences="running"}': 10,
        'linker_analysis_seconds_total{sequences="none"}': 2,
    }


def test_every_member_shows_its_delta_and_how_the_direction_hangs_on_it() -> None:
    shown = Shown(*THREE)
    assert shown.named("linker_delta_norm") == {
        'linker_delta_norm{model="a"}': 1.5,
        'linker_delta_norm{model="b"}': 2.5,
        'linker_delta_norm{model="c"}': 3.5,
    }
    assert shown.named("linker_jackknife_cosine") == {
        'linker_jackknife_cosine{family="base",model="a"}': 0.99,
        'linker_jackknife_cosine{family="base",model="b"}': pytest.approx(0.94),
        'linker_jackknife_cosine{family="base",model="c"}': pytest.approx(0.89),
    }


def test_every_diagnostic_of_every_member_is_there() -> None:
    found = Shown(*THREE).named("linker_diagnostic")
    assert len(found) == 3 * len(KINDS)
    assert {line for line, value in found.items() if value == 1} == {
        'linker_diagnostic{kind="near_unity",model="a"}',
        'linker_diagnostic{kind="monoculture",model="c"}',
    }


def test_two_fine_tunes_have_no_principal_components() -> None:
    shown = Shown("a", "b")
    assert shown.named("linker_pc1") == shown.named("linker_jackknife") == {}
    assert len(shown.named("linker_delta_norm")) == 2


def test_principal_components_need_three_of_those_studied_to_be_there_still() -> None:
    shown = Shown(*THREE)
    assert shown.named("linker_pc1")
    shown.members.remove("b")
    shown.members.append("new")
    assert shown.named("linker_pc1") == shown.named("linker_jackknife") == {}
    assert set(shown.named("linker_delta_norm")) == {
        'linker_delta_norm{model="a"}', 'linker_delta_norm{model="c"}',
    }  # fmt: skip
    assert '"b"' not in shown.text()


@pytest.mark.parametrize("missing", ["pc1_centred", "null95_centred"])
def test_share_is_not_shown_without_its_null(missing: str) -> None:
    summary = summary_of("base", *THREE)
    summary["components"]["q"][missing] = None
    found = Shown(*THREE, summary=summary).named("linker_pc1")
    assert len(found) == 2 * (len(COMPONENTS) - 1)
    assert not any('component="q"' in line for line in found)


def test_component_that_was_not_studied_has_no_series() -> None:
    summary = summary_of("base", *THREE)
    del summary["components"]["gate"]
    summary["components"]["<script>"] = summary["components"]["q"]
    components = Shown(*THREE, summary=summary).named("linker_kernel_snr")
    assert len(components) == len(COMPONENTS) - 1
    assert not any("script" in line for line in components)


def test_family_that_is_gone_shows_nothing() -> None:
    shown = Shown(*THREE)
    shown.family = "gone"
    assert all("seconds_total" in line for line in shown.lines())


def test_numbers_that_could_not_be_told_are_left_out() -> None:
    summary = summary_of("base", *THREE)
    summary["pairwise_cosine"]["mean"] = None
    summary["kernel"] = None
    summary["variants"]["a"]["delta_norm"] = float("nan")
    lines = Shown(*THREE, summary=summary).lines()
    assert not {line for line in lines if "pairwise" in line or "acceptance" in line}
    assert 'linker_delta_norm{model="a"}' not in lines
    assert 'linker_delta_norm{model="b"}' in lines


@pytest.mark.parametrize(
    "damage",
    [
        {"components": {"q": {}}},
        {"variants": None},
        {"variants": {"a": {"delta_norm": 1.0}}},
        {"pairwise_cosine": {"mean": "0.5"}},
    ],
    ids=["components", "variants", "variant", "mean"],
)
def test_damaged_study_spoils_no_scrape(
    damage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    shown = Shown(*THREE, summary=summary_of("base", *THREE, **damage))
    with caplog.at_level(logging.WARNING):
        assert {line for line in shown.lines() if "seconds_total" not in line} == {
            'linker_analysis_age_seconds{family="base"}'
        }
        shown.now = 99.0
        shown.text()
    assert len(caplog.records) == 1  # not with every scrape


def test_text_is_made_again_only_for_another_study_or_other_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Shown(*THREE)
    shown.text()
    monkeypatch.setattr("server.metrics.analysis._samples", lambda *_: [])
    assert shown.named("linker_delta_norm")
    shown.now = 119.0
    assert shown.lines()['linker_analysis_age_seconds{family="base"}'] == 99
    assert shown.named("linker_delta_norm")
    shown.summary = dict(shown.summary)
    assert shown.named("linker_delta_norm") == {}
