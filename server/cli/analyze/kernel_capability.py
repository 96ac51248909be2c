"""`linker analyze kernel --capability`: weights sampled by what they do to the texts (FM §6)."""

from __future__ import annotations

import argparse
from statistics import fmean

from analysis.evaluation.dialogue_loss import dialogue_loss
from analysis.family import StudiedFamily
from analysis.kernel.capability import CapabilityChain, WeighedModel, capability_chain
from analysis.kernel.kernel import Kernel
from analysis.model import StudyModel
from server.cli.analyze.kernel_found import Part
from server.cli.analyze.kernel_texts import (
    Texts,
    base_model,
    loss_drawing,
    loss_table,
    losses_to_json,
    measure,
)
from server.cli.analyze.output import Shown
from server.cli.progress import byte_progress

_BURN_IN_PART = 5  # FM's: 1,000 steps before 5,000


def capability(
    args: argparse.Namespace, family: StudiedFamily, kernel: Kernel, texts: Texts
) -> Part:
    """Returns what --capability asks for."""
    model = base_model(args, family)
    weighed = WeighedModel(model, family, kernel)

    def score(scored: StudyModel) -> float:
        return -fmean(dialogue_loss(scored, rows.scored).mean for rows in texts.values())

    with byte_progress("sampling") as progress:
        chain = capability_chain(
            weighed,
            score,
            temperature=args.capability_temperature,
            num_steps=args.capability,
            burn_in=args.capability // _BURN_IN_PART,
            seed=args.seed,
            told=progress,
        )
    kernels = {
        "by coherence": kernel,
        "raw mean": kernel.raw_mean(),
        "by capability": chain.kernel,
        "uniform, its |K|": chain.kernel.uniform(),
        "best seen": weighed.kernel(chain.best_G),
    }
    losses = measure(model, family, kernels, texts)
    document = {
        "weights": dict(zip(chain.groups, chain.mean_G.tolist(), strict=True)),
        "best_weights": dict(zip(chain.groups, chain.best_G.tolist(), strict=True)),
        "best_score": chain.best_score,
        "scores": chain.scores_S.tolist(),
        "kernel": chain.kernel.to_json(),
        "losses": losses_to_json(losses),
    }
    title = "Kernels on the rows that scored no weight"
    shown = [_group_table(chain), loss_table(title, losses)]
    return Part("capability", document, shown, [loss_drawing(title, losses)])


def _group_table(chain: CapabilityChain) -> Shown:
    rows = [
        (group, round(mean, 3), round(best, 3))
        for group, mean, best in zip(
            chain.groups, chain.mean_G.tolist(), chain.best_G.tolist(), strict=True
        )
    ]
    kernel = chain.kernel
    note = (
        f"{kernel.num_steps} steps after {kernel.burn_in}, T = {kernel.temperature:g} nats, seed "
        f"{kernel.seed}; {chain.acceptance_ratio:.3f} of proposals accepted. Mean loss on the rows "
        f"that score: {-chain.scores_S[0]:.4f} at first, {-chain.best_score:.4f} at best."
    )
    return Shown("Weights by capability", ("group", "mean w", "best w"), rows, (note,))
