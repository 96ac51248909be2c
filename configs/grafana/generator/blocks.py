"""Where fine-tuning moved the weights, and how each block is stored."""

from __future__ import annotations

from grafana_foundation_sdk.builders import barchart, table, trend

from configs.grafana.generator.layout import Band, Section
from configs.grafana.generator.queries import MODEL, Query, in_words
from configs.grafana.generator.style import RUNGS, SEQUENCE, blank, colored, thresholds
from configs.grafana.generator.style import in_words as words
from configs.grafana.generator.tables import bars, cells, profile


def blocks() -> Section:
    """Returns the section."""
    return Section(
        title="Blocks",
        bands=(
            Band(height=9, widths=(24,), panels=(_epsilon(),)),
            Band(height=9, widths=(24,), panels=(_rungs(),)),
            Band(height=10, widths=(12, 12), panels=(_profile(), _cosine())),
            Band(height=10, widths=(12, 12), panels=(_bytes(), _blocks_by_rung())),
            Band(height=10, widths=(12, 12), panels=(_sections(), _bytes_by_rung())),
        ),
    )


def _epsilon() -> table.Panel:
    steps = zip((0.005, 0.01, 0.02, 0.05, 0.1, 0.25), SEQUENCE[1:], strict=True)
    what = (
        "ε of each block: how far fine-tuning moved it from the donor's, relative to its norm, the "
        "mean over the block's tensors; as figure 1 of the paper. Light is near. From 0.1 on "
        "(orange) the paper speaks of the boundary, from 0.25 on (dark red) of another region of "
        "weights."
    )
    query = Query(f"max by (model, block) (linker_block_epsilon{{{MODEL}}})")
    panel = cells("ε by block", what, "none", query).decimals(3)
    return panel.thresholds(thresholds(SEQUENCE[0], *steps))


def _rungs() -> table.Panel:
    what = (
        "How each block is stored, the dearest of its matrices: not at all (alias), as a "
        "compressed difference from the donor's (residual), or whole (own)."
    )
    expr = in_words("linker_block_rung", MODEL, "rung", tuple(RUNGS), by="model, block")
    panel = cells("Rung by block", what, "none", Query(expr))
    return panel.mappings([words(list(RUNGS.items())), blank()])


def _profile() -> trend.Panel:
    what = "ε of each block along the depth of the model, as figure 1 of the paper."
    query = Query(f"max by (model, block) (linker_block_epsilon{{{MODEL}}})")
    return profile("ε along the depth", what, "none", query).min(0).decimals(3)


def _cosine() -> trend.Panel:
    what = (
        "How much each block turned away from the donor's: 1 less the mean cosine of its tensors. "
        "0.001 is the paper's usual limit for sharing."
    )
    query = Query(f"1 - min by (model, block) (linker_block_cosine{{{MODEL}}})")
    return profile("1 - cosine along the depth", what, "none", query).min(0).decimals(5)


def _bytes() -> trend.Panel:
    what = "What each block of a model takes that only it holds, when it is resident."
    query = Query(f"max by (model, block) (linker_block_unique_bytes{{{MODEL}}})")
    return profile("Unique bytes along the depth", what, "bytes", query).min(0)


def _sections() -> barchart.Panel:
    what = (
        "What only a model holds, by part: its blocks, and its embedding, final norm and head, "
        "which are all that is left of a variant whose blocks are aliases."
    )
    query = Query(f"max by (model, section) (linker_section_unique_bytes{{{MODEL}}})")
    return bars("Unique bytes by section", what, "bytes", query, label="section")


def _blocks_by_rung() -> barchart.Panel:
    what = "How many blocks of each model are stored at which rung."
    query = Query(f"max by (model, rung) (linker_model_blocks{{{MODEL}}})")
    panel = bars("Blocks by rung", what, "none", query, label="rung").decimals(0)
    for rung, color in RUNGS.items():
        panel = panel.override_by_name(rung, [colored(color)])
    return panel


def _bytes_by_rung() -> barchart.Panel:
    what = (
        "What only a model holds, by how it is stored: whole (own), in rows, as signs or groups of "
        "2 to 8 bits, or as factors of low rank. Aliases take nothing."
    )
    query = Query(f"max by (model, rung) (linker_model_rung_bytes{{{MODEL}}}) > 0")
    return bars("Unique bytes by rung", what, "bytes", query, label="rung")
