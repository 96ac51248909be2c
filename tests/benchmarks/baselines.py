"""Our rungs beside the forms in which others keep a fine-tune, on text that nothing has seen.

`python -m tests.benchmarks.baselines FAMILY --tasks DIR` prints the tables of docs/fidelity.md and
draws their picture. FAMILY is a folder of checkpoints with `base` and `heldout/*.jsonl`. Ours is
priced through the kernels that serve it, the others' forms as rebuilt weights in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from linker_core.pace import Pace
from linker_core.sharing.rungs import parse_rung
from linker_core.tuning.storages import Rungs
from linker_core.tuning.tasks import Task, load_tasks
from linker_core.tuning.texts import calibration_text
from tests.benchmarks import rivals
from tests.benchmarks.baseline_tables import Line, tables
from tests.benchmarks.distillation import distilled_scales
from tests.benchmarks.frontier_picture import Point, draw
from tests.benchmarks.held_out import held_out_text, opened
from tests.benchmarks.ours import BUDGETS_KL, Ours, keep_argument, uniform
from tests.benchmarks.rewritten import Judge, is_matrix
from tests.benchmarks.surgeon import calibrated_sparse, second_moments
from tests.linker_core.engine.families import reference_model
from tests.linker_core.tuning.pairs import Pair

_RANKS = (16, 32, 64, 128)
_UNIFORM = (
    *("signs:64", "int2:64", "int3:64", "int4:64"),
    *("rank12:16", "rank4:16+signs:64", "rank8:16+signs:64"),
)
_SIZES_BITS = (0.6, 1.2, 1.8, 2.6, 3.6, 4.6, 8.0)  # per weight, all in
_QUESTIONS = 10  # of a task
_SIDES = ("others", "ours")
_PICTURE = Path("docs/baselines.svg")
_WHOLE = ", embedding whole"


class Rival(NamedTuple):
    """A form of others, made when it is measured."""

    family: str
    label: str
    embedding: bool  # takes the form too; else it is kept whole, as most authors do
    make: Callable[[], rivals.Form]


class Bench:
    """Everything that is measured of one variant."""

    def __init__(self, pair: Pair, tasks: Sequence[Task], kept: Path | None) -> None:
        self._pair = pair
        self._kept = kept
        self._tasks = tasks
        self._text = held_out_text(pair.variant)
        self._shipped = calibration_text(
            pair.variant, None, device="cpu", pace=Pace(), precision="highest"
        )
        self._name = pair.variant.path.name

    def others(self, known: set[str]) -> Iterator[Line]:
        """Yields a line for every form of others that is not known."""
        judge = Judge(self._pair.variant, self._text, self._tasks)
        for embedding in (False, True):
            for rival in self._rivals(embedding):
                where = "" if embedding else _WHOLE
                if (label := f"{rival.label}{where}") not in known:
                    measured = judge.measure(self._pair.donor, rival.make(), embedding=embedding)
                    yield Line.of(self._name, f"{rival.family}{where}", label, measured)

    def ours(self, known: set[str]) -> Iterator[Line]:
        """Yields a line for every plan of ours that is not known."""
        side = Ours(self._pair, self._text, tasks=self._tasks, kept=self._kept)
        missing = [each for each in self._plans(side) if each[1] not in known]
        measured_plans = side.measure([choose() for *_, choose in missing])
        for (family, label, _), measured in zip(missing, measured_plans, strict=True):
            yield Line.of(self._name, family, label, measured)

    def _rivals(self, embedding: bool) -> Iterator[Rival]:
        if not embedding:
            yield Rival("alias-only", "alias every block (BS)", False, lambda: rivals.alias)
        for rank in _RANKS:
            label = f"LoRA extraction, rank {rank}"
            yield Rival("LoRA extraction", label, embedding, partial(rivals.low_rank, rank))
        yield Rival("BitDelta", "BitDelta, mean scales", embedding, rivals.one_scale)
        distilled = partial(self._distilled, embedding)
        yield Rival("BitDelta", "BitDelta, distilled scales", embedding, distilled)
        for bits in (4, 2):
            label = f"DeltaZip's form, 2:4 in {bits} bits"
            yield Rival("DeltaZip", label, embedding, partial(self._calibrated, bits))
        if not embedding:
            label = "DeltaZip's form, 2:4 in 4 bits, data-free"
            yield Rival("DeltaZip, data-free", label, embedding, partial(rivals.sparse, 4))
        label = "int4 of the variant's own weights"
        yield Rival("own int4", label, embedding, partial(rivals.own_codes, 4))

    def _distilled(self, embedding: bool) -> rivals.Form:
        donor, variant = self._pair.donor, self._pair.variant
        matrices = [
            name
            for name, tensor in variant.tensors.items()
            if is_matrix(name, tensor.shape, embedding=embedding)
        ]
        return rivals.one_scale(distilled_scales(donor, variant, matrices, self._shipped))

    def _calibrated(self, bits: int) -> rivals.Form:
        moments = second_moments(reference_model(self._pair.variant.path), self._shipped)
        return calibrated_sparse(moments, bits)

    def _plans(self, side: Ours) -> Iterator[tuple[str, str, Callable[[], Rungs]]]:
        """Yields our rungs on every matrix, and what the tuner chooses."""
        for text in _UNIFORM:
            yield "ours, uniform", text, partial(uniform, self._pair, parse_rung(text))
        for bits in _SIZES_BITS:
            label = f"policy bytes, ≤ {bits} bits"
            yield "ours, policy bytes", label, partial(side.within_bits, bits)
        for budget_kl in BUDGETS_KL:
            label = f"policy budget, {budget_kl} nats"
            yield "ours, policy budget", label, partial(side.within_budget, budget_kl)


def main() -> None:
    """Measures every variant beside `base`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("family", type=Path)
    parser.add_argument("variants", nargs="*", help="default: all with held-out text")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of *.jsonl questions")
    parser.add_argument(
        "--lines", type=Path, help="a file to keep lines in; what it has is not measured again"
    )
    parser.add_argument("--sides", nargs="+", choices=_SIDES, default=_SIDES)
    keep_argument(parser)
    args = parser.parse_args()
    tasks = load_tasks(args.tasks, limit=_QUESTIONS)
    held_out = sorted(path.stem for path in (args.family / "heldout").glob("*.jsonl"))
    kept = args.lines.read_text().splitlines() if args.lines and args.lines.exists() else []
    lines = [Line(**json.loads(line)) for line in kept]
    for variant in args.variants or held_out:
        known = {line.form for line in lines if line.variant == variant}
        with opened(args.family, variant) as pair:
            bench = Bench(pair, tasks, args.keep)
            sides = {"others": bench.others, "ours": bench.ours}
            for line in chain.from_iterable(sides[side](known) for side in args.sides):
                lines.append(line)
                if args.lines is not None:
                    with args.lines.open("a") as file:
                        file.write(json.dumps(asdict(line)) + "\n")
    print("\n".join(tables(lines)))
    draw([Point(x.variant, x.family, x.bits_per_weight, x.kl) for x in lines], _PICTURE)


if __name__ == "__main__":
    main()
