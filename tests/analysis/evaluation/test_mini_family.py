"""The evaluation on models that were trained on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.evaluation.perplexity import Protocol
from analysis.evaluation.suite import Suite, SuiteFiles
from analysis.evaluation.sweep import measure_base, measure_models
from analysis.family import StudiedFamily
from analysis.model import StudyModel


@pytest.mark.shared
def test_instruction_tuning_shows_in_instructions_and_costs_other_text(shared: Path) -> None:
    folder, data = shared / "families" / "mini-qwen2", shared / "data"
    suite = Suite.load(
        SuiteFiles(
            wikitext=data / "wikitext2" / "test.txt",
            instruct=data / "alpaca" / "alpaca_5000.json",
            protocols=tuple(Protocol),
            num_tokens=2048,
            window=512,
            full_length=512,
            num_instructions=12,
        )
    )
    with StudiedFamily.open(folder / "base", {"instruct": folder / "instruct"}) as family:
        model = StudyModel.open(family.base)
        encoded = suite.encode(model)
        base = measure_base(model, encoded).scores
        (tuned,) = measure_models(family, encoded, device="cpu", dtype=torch.float32)
    assert base.instruct is not None
    assert tuned.scores.instruct is not None
    change = tuned.scores.instruct.response.change_from(base.instruct.response)
    assert change.high is not None
    assert change.high < 0
    for protocol in Protocol:
        assert tuned.scores.text[protocol].change_from(base.text[protocol]).percent > 0
