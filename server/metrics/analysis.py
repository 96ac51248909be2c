"""What studies of families found, written once for as long as a study is the last one.

A study says nothing of models that came or went since: what is left of it is shown, and no more.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from linker_core.pace import Spent
from server.metrics.families import FAMILIES
from server.metrics.text import header, series
from server.metrics.view import View
from server.registry.records import Json, StudyRecord

logger = logging.getLogger(__name__)

KINDS = (
    "continued_pretraining",
    "degenerate",
    "monoculture",
    "near_unity",
    "outlier",
    "single_source",
)  # of diagnostics
_COMPONENTS = ("q", "k", "v", "o", "gate", "up", "down", "attention", "mlp", "all")
_FEWEST = (
    3  # fine-tunes that have principal components: centred, two lie on a line whatever they are
)
_AGE = FAMILIES["linker_analysis_age_seconds"]
_FAMILIES = (
    "linker_delta_norm",
    "linker_pc1_variance_ratio",
    "linker_pc1_null_ratio",
    "linker_pairwise_cosine",
    "linker_kernel_acceptance_ratio",
    "linker_kernel_snr",
    "linker_jackknife_cosine",
    "linker_diagnostic",
)


class _Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float | None  # None: it could not be told


class _Written(NamedTuple):
    """The lines of one family, by name, and what they were made of."""

    summary: Json | None
    members: frozenset[str]
    lines: dict[str, str]


class AnalysisSeries:
    """The series of every family that was studied. One thread at a time may render.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._written: dict[str, _Written] = {}  # by family

    def render(self, view: View) -> Iterable[str]:
        """Yields what was found, how old that is, and what it took."""
        members = _members(view)
        shown = {family: study for family, study in view.studies.items() if family in members}
        self._written = {
            family: self._write(study, members[family]) for family, study in shown.items()
        }
        for name in _FAMILIES:
            yield header(FAMILIES[name])
            for written in self._written.values():
                yield written.lines.get(name, "")
        yield header(_AGE)
        now = self._clock()
        for family, study in shown.items():
            age_s = max(0.0, now - (study.finished_at or now))
            yield f"{series(_AGE.name, {'family': family})} {age_s}\n"
        yield from _spent(view.study_time)

    def _write(self, study: StudyRecord, members: frozenset[str]) -> _Written:
        known, summary = self._written.get(study.family), study.summary or {}
        if known and known.summary is study.summary and known.members == members:
            return known
        lines: defaultdict[str, list[str]] = defaultdict(list)
        for name, labels, value in _samples(study.family, summary, members):
            if value is not None and math.isfinite(value):
                lines[name].append(f"{series(name, labels)} {value}\n")
        joined = {name: "".join(of_name) for name, of_name in lines.items()}
        return _Written(study.summary, members, joined)


def _spent(time_spent: Spent) -> Iterator[str]:
    spent = {
        "linker_analysis_seconds_total": (time_spent.busy_s, time_spent.idle_s),
        "linker_analysis_cpu_seconds_total": (time_spent.busy_cpu_s, time_spent.idle_cpu_s),
    }
    for name, values in spent.items():
        yield header(FAMILIES[name])
        for sequences, seconds in zip(("running", "none"), values, strict=True):
            yield f"{series(name, {'sequences': sequences})} {seconds}\n"


def _members(view: View) -> Mapping[str, frozenset[str]]:
    """Returns the known models by family."""
    members: defaultdict[str, set[str]] = defaultdict(set)
    for model in view.models:
        members[model.family or model.name].add(model.name)
    return {family: frozenset(names) for family, names in members.items()}


def _samples(family: str, summary: Json, members: frozenset[str]) -> list[_Sample]:
    """Returns what a study says, or nothing of one that is damaged: it must spoil no scrape."""
    try:
        samples = [*_of_family(family, summary, members), *_of_models(family, summary, members)]
        if all(isinstance(sample.value, (int, float, type(None))) for sample in samples):
            return samples
    except (AttributeError, KeyError, TypeError):
        pass
    logger.warning("a stored study is damaged; it has no series")
    return []


def _of_family(family: str, summary: Json, members: frozenset[str]) -> Iterator[_Sample]:
    of = {"family": family}
    has_pc1 = len(members & summary["variants"].keys()) >= _FEWEST
    for component in _COMPONENTS:
        found = summary["components"].get(component)
        if found is None:
            continue  # a study may be of some projections alone
        labels = {**of, "component": component}
        pc1, null = found["pc1_centred"], found["null95_centred"]
        if has_pc1 and pc1 is not None and null is not None:
            yield _Sample("linker_pc1_variance_ratio", labels, pc1)
            yield _Sample("linker_pc1_null_ratio", labels, null)
        yield _Sample("linker_kernel_snr", labels, found["snr"])
    yield _Sample("linker_pairwise_cosine", of, summary["pairwise_cosine"]["mean"])
    kernel = summary["kernel"]
    if kernel is not None:
        yield _Sample("linker_kernel_acceptance_ratio", of, kernel["acceptance_ratio"])


def _of_models(family: str, summary: Json, members: frozenset[str]) -> Iterator[_Sample]:
    variants: Mapping[str, Json] = summary["variants"]
    has_pc1 = len(members & variants.keys()) >= _FEWEST
    for model in sorted(members & variants.keys()):
        yield _Sample("linker_delta_norm", {"model": model}, variants[model]["delta_norm"])
        kinds = {found["kind"] for found in variants[model]["diagnostics"]}
        for kind in KINDS:
            labels = {"model": model, "kind": kind}
            yield _Sample("linker_diagnostic", labels, int(kind in kinds))
        if has_pc1:
            cosine = variants[model]["jackknife_cosine"]
            yield _Sample("linker_jackknife_cosine", {"family": family, "model": model}, cosine)
