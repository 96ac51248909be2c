"""Checkpoints that the page's servers serve."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from tests.tiny import make_checkpoint, make_variant

LAYERS = 4
# A whole chat without headers, so that a message's first token is the prompt's: the fake engine's
# `Fault` of the same name.
BARE_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FAULTS = ("die", "wait", "fail", "hang", "flood", "slow", "mute", "pause")
FIRST_FAULT_ID = 501


def make_family(root: Path) -> Path:
    """A donor `base` and variants: `near`, `mixed` (half its blocks moved) and `far`."""
    base = make_checkpoint(root / "base", tie=False, layers=LAYERS)
    make_variant(root / "near", base, scale=0.01)
    moved = {
        name: 0.002 if layer < LAYERS // 2 else 0.08
        for name in load_file(base / "model.safetensors")
        for layer in range(LAYERS)
        if f".layers.{layer}." in name
    }
    make_variant(root / "mixed", base, scale=moved, seed=3)
    make_variant(root / "far", base, scale=0.3, seed=2)
    return root


def make_faulty_family(root: Path) -> Path:
    """Like it, for the fake engine: a message that begins with `<|die|>` is that fault."""
    tokens = [f"<|{name}|>" for name in FAULTS]
    base = make_checkpoint(root / "base", vocab_size=FIRST_FAULT_ID, added_tokens=tokens)
    make_variant(root / "near", base, scale=0.01)
    (base / "chat_template.jinja").write_text(BARE_TEMPLATE)
    for name in ("chat_template.jinja", "tokenizer.json"):
        shutil.copy(base / name, root / "near")
    return root
