"""`linker analyze eval BASE VARIANT …`: FM's tables 3 and 4, and answers along the kernel."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.evaluation.outputs import (
    MAX_TOKENS,
    PROMPTS,
    Output,
    check_max_tokens,
    encode_prompt,
    greedy_outputs,
    load_prompts,
)
from analysis.evaluation.outputs import SCALES as OUTPUT_SCALES
from analysis.evaluation.suite import EncodedSuite, Suite
from analysis.evaluation.sweep import (
    SCALES,
    Condition,
    changes,
    check_scales,
    measure_base,
    measure_models,
    sweep,
)
from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.kernel import Kernel, Weighting, build_kernel, check_several
from analysis.kernel.metropolis import TEMPERATURE
from analysis.model import StudyModel
from linker_core.text.tokenizer import Tokenizer
from server.cli.analyze.device_arguments import add_device_arguments
from server.cli.analyze.eval_tables import (
    NOTES,
    conditions_table,
    eval_drawings,
    outputs_table,
    uniform_table,
)
from server.cli.analyze.kernel import check_kernel_arguments
from server.cli.analyze.members import (
    add_member_arguments,
    add_tensor_arguments,
    find_members,
    selected,
)
from server.cli.analyze.output import add_output_arguments, show
from server.cli.analyze.suite_arguments import (
    add_suite_arguments,
    chosen_device,
    suite_files,
)

_LOG = logging.getLogger(__name__)
EXAMPLE = """\
linker analyze eval models/base models/chat models/math \\
    --wikitext text.txt --instruct alpaca.json --scales 0.5 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's arguments."""
    add_member_arguments(parser)
    add_suite_arguments(parser)
    group = parser.add_argument_group("which models")
    group.add_argument(
        "--of",
        choices=("kernel", "models", "both"),
        default="both",
        help="the base with the kernel at every scale, the fine-tunes as they are, or both "
        "(default both)",
    )
    add_tensor_arguments(parser)
    group.add_argument(
        "--scales",
        nargs="+",
        type=float,
        default=SCALES,
        metavar="ALPHA",
        help=f"of the kernel, alpha of FM Eq. 5 (default {_listed(SCALES)})",
    )
    group.add_argument(
        "--weightings",
        nargs="+",
        type=Weighting,
        choices=tuple(Weighting),
        default=tuple(Weighting),
        help="the sampled kernel, uniform weights of its norm, the raw mean (default all)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help=f"T of exp(score / T); colder tells tensors apart more (default {TEMPERATURE:g})",
    )
    group.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    group = parser.add_argument_group("greedy answers")
    group.add_argument(
        "--outputs", action="store_true", help="write answers along the kernel as well"
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines, "text" or {"prompt": "text"} each (default five that are built in)',
    )
    group.add_argument(
        "--output-scales",
        nargs="+",
        type=float,
        default=OUTPUT_SCALES,
        metavar="ALPHA",
        help=f"of the kernel while it answers (default {_listed(OUTPUT_SCALES)})",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help=f"of an answer (default {MAX_TOKENS})",
    )
    group.add_argument("--alpaca", action="store_true", help="put prompts into Alpaca's format")
    add_device_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; stdout holds one JSON document under --json."""
    check_scales(args.scales)
    check_scales(args.output_scales, option="output-scales")
    check_kernel_arguments(args)
    check_max_tokens(args.max_tokens)
    device, dtype = chosen_device(args)
    suite = Suite.load(suite_files(args))
    prompts = load_prompts(args.prompts) if args.prompts else PROMPTS
    members = find_members(args)
    if args.of != "models":
        check_several(tuple(members.variants))
    with members.open() as family:
        names = selected(args, family)
        encoded = EncodedSuite(suite, Tokenizer.load(family.base.path), family.base.config)
        for checkpoint in family.variants.values() if args.of != "kernel" else ():
            encoded.check_context(checkpoint)  # after the kernel, hours would be lost
        model = StudyModel.open(family.base, device=device, dtype=dtype)
        for prompt in prompts if args.outputs else ():
            encode_prompt(model, prompt, alpaca=args.alpaca)  # refuses it before hours of work
        kernel = None if args.of == "models" else _kernel(args, family, names)
        conditions, outputs = _along_kernel(args, family, model, kernel, encoded, prompts)
        if args.of != "kernel":
            conditions += measure_models(
                family, encoded, device=device, dtype=dtype, told=_LOG.info
            )
    against_uniform = _against_uniform(conditions)
    baseline = conditions[0].scores
    document: dict[str, Any] = {
        "kernel": kernel and kernel.to_json(),
        "conditions": [condition.to_json(baseline) for condition in conditions],
        "against_uniform": against_uniform,
        "outputs": [output.to_json() for output in outputs],
        "method": encoded.notes,
    }
    tables = [conditions_table(conditions)]
    if against_uniform:
        tables.append(uniform_table(against_uniform))
    if outputs:
        tables.append(outputs_table(outputs))
    notes = [*members.notes, *encoded.notes, *NOTES]
    drawings = eval_drawings(document["conditions"])
    show(args, document, tables, notes, members=members, drawings=drawings)
    return 0


def _listed(scales: Sequence[float]) -> str:
    return " ".join(f"{scale:g}" for scale in scales)


def _kernel(args: argparse.Namespace, family: StudiedFamily, names: Sequence[str]) -> Kernel:
    return build_kernel(
        gram_pass(family, names),
        names=family.names,
        seed=args.seed,
        temperature=args.temperature,
    )


def _along_kernel(
    args: argparse.Namespace,
    family: StudiedFamily,
    model: StudyModel,
    kernel: Kernel | None,
    encoded: EncodedSuite,
    prompts: Sequence[str],
) -> tuple[list[Condition], list[Output]]:
    """Returns the rows of the base, with and without a kernel, and the answers along it."""
    conditions = [measure_base(model, encoded, told=_LOG.info)]
    if kernel is None:
        return conditions, []
    conditions += sweep(
        model,
        family,
        kernel,
        encoded,
        scales=args.scales,
        weightings=args.weightings,
        told=_LOG.info,
    )
    if not args.outputs:
        return conditions, []
    outputs = greedy_outputs(
        model,
        family,
        kernel,
        prompts,
        scales=args.output_scales,
        max_tokens=args.max_tokens,
        alpaca=args.alpaca,
        told=_LOG.info,
    )
    return conditions, list(outputs)


def _against_uniform(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Returns what the sampled weights change against uniform ones, where both were measured."""
    by_key = {(condition.label, condition.scale): condition for condition in conditions}
    return [
        {"scale": scale, "changes": changes(one.scores, uniform.scores)}
        for (label, scale), one in by_key.items()
        if label == Weighting.SAMPLED
        and (uniform := by_key.get((Weighting.UNIFORM.value, scale))) is not None
    ]
