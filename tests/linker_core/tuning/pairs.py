"""Small pairs to price, and transformers as the judge of what a plan makes of a variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from linker_core.config import MatmulPrecision
from linker_core.pace import Pace
from linker_core.sharing.planner import identical_rungs
from linker_core.sharing.report import ScanReport
from linker_core.sharing.rungs import Rung
from linker_core.sharing.scan import scan
from linker_core.tuning.calibration import CalibrationSequence, CalibrationText
from linker_core.tuning.pricing import Pricer
from linker_core.tuning.storages import Rungs, SectionReader
from linker_core.tuning.walk import Walk
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.keys import EMBED_NAME, LM_HEAD_NAME
from tests.linker_core.engine.families import CPU, reference_logits, reference_model
from tests.tiny import make_checkpoint, make_variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A donor and a variant on disk, opened."""

    donor: Checkpoint
    variant: Checkpoint
    report: ScanReport

    @property
    def base(self) -> dict[str, Rung]:
        """The rungs that change no bit."""
        return identical_rungs(self.report, self.donor, self.variant)

    def aliasing(self, *parts: str) -> dict[str, Rung]:
        """The base with every tensor aliased whose name contains one of `parts`."""
        chosen = [name for name in self.variant.tensors if any(part in name for part in parts)]
        assert chosen
        return {**self.base, **dict.fromkeys(chosen, Rung.ALIAS)}

    def reader(self, on_read: Callable[[int], None] = lambda _nbytes: None) -> SectionReader:
        identical = frozenset(name for name, rung in self.base.items() if rung is Rung.ALIAS)
        return SectionReader(
            self.donor, self.variant, identical=identical, device=CPU, on_read=on_read
        )

    def walk(self, lengths: Sequence[int], *, precision: MatmulPrecision = "highest") -> Walk:
        return Walk(self.variant.config, lengths, device=CPU, pace=Pace(), precision=precision)

    def pricer(self, text: CalibrationText, *, precision: MatmulPrecision = "highest") -> Pricer:
        lengths = [len(sequence.token_ids) for sequence in text.sequences]
        walk = self.walk(lengths, precision=precision)
        return Pricer(walk, self.reader(), self.base, text)

    def oracle(self, rungs: Rungs) -> PreTrainedModel:
        """Transformers' own model over the variant's tensors, the aliased ones the donor's."""
        model = reference_model(self.variant.path)
        lent = load_file(self.donor.path / "model.safetensors")
        state = load_file(self.variant.path / "model.safetensors")
        state |= {name: lent[name] for name, rung in rungs.items() if rung is Rung.ALIAS}
        state.setdefault(LM_HEAD_NAME, state[EMBED_NAME])
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        model.tie_weights()
        return model


def make_pair(
    folder: Path,
    *,
    architecture: str = "qwen2",
    layers: int = 3,
    tie: bool = True,
    scale: float | Mapping[str, float] = 0.05,
    added_tokens: Sequence[str] = (),
    rows: Mapping[str, Iterable[int]] | None = None,
) -> Pair:
    donor = make_checkpoint(folder / "donor", architecture=architecture, layers=layers, tie=tie)
    make_variant(folder / "variant", donor, scale=scale, added_tokens=added_tokens, rows=rows)
    return open_pair(folder)


def open_pair(folder: Path) -> Pair:
    donor = Checkpoint.open(folder / "donor")
    variant = Checkpoint.open(folder / "variant")
    return Pair(donor=donor, variant=variant, report=scan(donor, variant))


def random_text(
    lengths: Sequence[int],
    *,
    kinds: Sequence[str] = ("talk",),
    low: int = 3,
    high: int = 512,
    seed: int = 0,
) -> CalibrationText:
    """Sequences of random ids, most of each a response; kinds take turns."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for number, length in enumerate(lengths):
        ids = torch.randint(low, high, (length,), generator=generator).tolist()
        kind = kinds[number % len(kinds)]
        span = range(max(1, length // 4), length)
        sequences.append(
            CalibrationSequence(
                token_ids=tuple(ids), responses=(span,), kind=kind, text_digest=str(number)
            )
        )
    return assembled(sequences)


def assembled(sequences: Sequence[CalibrationSequence]) -> CalibrationText:
    tokens = sum(len(span) for sequence in sequences for span in sequence.responses)
    return CalibrationText(sequences=tuple(sequences), digest="text", num_response_tokens=tokens)


def response_log_probs(model: PreTrainedModel, text: CalibrationText) -> torch.Tensor:
    """Log-probabilities [R, V] in float64 of what follows where a response token does."""
    rows = []
    for sequence in text.sequences:
        logits = reference_logits(model, list(sequence.token_ids))
        rows += [logits[p - 1] for span in sequence.responses for p in span]
    return torch.log_softmax(torch.stack(rows).double(), dim=-1)
