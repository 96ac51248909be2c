"""BS tables 4 and 14 from shapes alone; no constant is fitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linker_core.errors import InvalidRequestError
from linker_core.sharing.footprint import Footprint, footprint
from linker_core.weights.architecture import parse_config

MIB = 2**20
# BS table 4: blocks shared, naive MiB, lazy MiB. Table 4's 3B figure is above its own tensor bytes.
TABLE_4 = {
    "Mistral-7B-v0.3": (32, 27648, 14336, 0.01),
    "Qwen2.5-3B": (36, 11988, 6588, 0.02),
    "Llama-3.2-3B": (28, 12256, 6880, 0.01),
    "Qwen2.5-7B": (28, 29136, 16648, 0.01),
    "Llama-3.1-8B": (32, 30634, 17322, 0.01),
    "Qwen2.5-0.5B": (24, 1900, 1210, 0.01),
    "Llama-3.2-1B": (13, 4716, 3208, 0.01),
    "Gemma-2-2B": (12, 9974, 8193, 0.01),
}
# BS table 14: MiB for N = 1, 2, …
TABLE_14 = {
    "Qwen2.5-3B": ((5994, 6588, 7182, 7776, 8370), 0.02),
    "Qwen2.5-7B": ((14568, 16648, 18728, 20808), 0.01),
    "Mistral-7B-v0.3": ((13824, 14336, 14848, 15360, 15872), 0.01),
}


def sized(
    shared: Path, name: str, num_variants: int, shared_blocks: int | None = None
) -> Footprint:
    config = parse_config(json.loads((shared / "architectures" / f"{name}.json").read_text()))
    return footprint(
        config, num_variants=num_variants, shared_blocks=shared_blocks, dtype="bfloat16"
    )


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLE_4)
def test_footprint_of_two_variants_is_bs_table_4(shared: Path, name: str) -> None:
    shared_blocks, naive, lazy, tolerance = TABLE_4[name]
    size = sized(shared, name, 2, shared_blocks)
    assert size.naive_bytes / MIB == pytest.approx(naive, rel=tolerance)
    assert size.linked_bytes / MIB == pytest.approx(lazy, rel=tolerance)


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLE_14)
def test_footprint_of_n_variants_is_bs_table_14(shared: Path, name: str) -> None:
    row, tolerance = TABLE_14[name]
    for number, mib in enumerate(row, start=1):
        assert sized(shared, name, number).linked_bytes / MIB == pytest.approx(mib, rel=tolerance)


@pytest.mark.shared
@pytest.mark.parametrize(("variants", "blocks"), [(0, 1), (2, 33), (2, -1)])
def test_footprint_out_of_range_is_refused(shared: Path, variants: int, blocks: int) -> None:
    with pytest.raises(InvalidRequestError):
        sized(shared, "Mistral-7B-v0.3", variants, blocks)
