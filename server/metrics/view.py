"""What a scrape is about, at one moment: taken on the event loop, rendered anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from linker_core.engine.messages import Snapshot
from linker_core.pace import Spent
from linker_core.weights.architecture import ModelConfig
from server.registry.records import ModelRecord, StudyRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The known models and the engine. Taking it asks the engine nothing and wakes no model."""

    models: Sequence[ModelRecord]  # each with its state as shown to clients
    snapshot: Snapshot | None  # the engine's last report
    engine_up: bool  # it runs and progresses
    engine_restarts: int  # engines that replaced one that ended
    # The model of every twin, whose memory is its family's, and its load the model's.
    twins: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, ModelConfig] = field(default_factory=dict)  # of resident models
    # By family, the last that ended, where every model that it names is what it was.
    studies: Mapping[str, StudyRecord] = field(default_factory=dict)
    study_time: Spent = field(default_factory=Spent)  # by all studies since the start
