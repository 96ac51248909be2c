"""A small delta folder to spoil, and ways to spoil it that leave the rest honest."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors.torch import load_file

from linker_core.residency.delta_writer import write_delta
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.plan import Fingerprints, Policy
from linker_core.sharing.planner import plan_rungs
from linker_core.sharing.rungs import AnyRung, Rung, parse_rung
from linker_core.sharing.scan import scan
from linker_core.weights.checkpoint import Checkpoint
from tests.tiny import make_checkpoint, make_variant

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FACTORS = "model.layers.0.self_attn.k_proj.weight"  # rank3:16
CODES = "model.layers.0.mlp.up_proj.weight"  # rank4:8+signs:64
ALIAS = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
_RUNGS = {FACTORS: "rank3:16", CODES: "rank4:8+signs:64", HEAD: "rank3:8", ALIAS: "alias"}


def write_small(folder: Path, *, dtype: str = "bfloat16") -> Path:
    """Writes donor, variant and a delta with parts of every kind; returns the delta's folder."""
    donor_path = make_checkpoint(folder / "donor", tie=False, dtype=dtype)
    variant_path = make_variant(
        folder / "variant",
        donor_path,
        scale={name: 0.05 for name in load_file(donor_path / "model.safetensors") if name != EMBED},
        added_tokens=["<new>", "<newer>"],
    )
    with Checkpoint.open(donor_path) as donor, Checkpoint.open(variant_path) as variant:
        rungs: dict[str, AnyRung] = {}
        for name, info in variant.tensors.items():
            coded = parse_rung(_RUNGS.get(name, "int2:64"))
            rungs[name] = coded if len(info.shape) == 2 else Rung.OWN
        rungs[EMBED] = Rung.ROWS
        plan = plan_rungs(
            scan(donor, variant),
            donor,
            variant,
            rungs,
            policy=Policy.BUDGET,
            fingerprints=Fingerprints("a" * 64, "b" * 64),
        )
        write_delta(plan, donor, variant, folder / "delta")
    return folder / "delta"


def read_delta(path: Path) -> tuple[dict[str, Any], bytearray]:
    """Returns header and data of a folder's file."""
    content = (path / DELTA_FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Writes a folder's file anew."""
    text = json.dumps(header).encode()
    (path / DELTA_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = read_delta(path)
    change(header)
    write_header(path, header, bytes(data))


def edit_plan(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def edit(header: dict[str, Any]) -> None:
        plan = json.loads(header["__metadata__"]["plan"])
        change(plan)
        header["__metadata__"]["plan"] = json.dumps(plan)

    edit_header(path, edit)


def edit_entry(path: Path, name: str, words: bytes, *, offset: int = 0) -> None:
    """Overwrites bytes of an entry; the digest is of what is there then."""
    header, data = read_delta(path)
    begin = header[name]["data_offsets"][0] + offset
    data[begin : begin + len(words)] = words
    header["__metadata__"]["blake3"] = blake3(data).hexdigest()
    write_header(path, header, bytes(data))
