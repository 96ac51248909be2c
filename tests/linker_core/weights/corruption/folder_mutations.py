"""Spoils what lies in a folder: links, FIFOs, strays, names (RELIABILITY A10, A13)."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.linker_core.weights.corruption.files import SAME, Mutation, json_files, weight_files
from tests.linker_core.weights.corruption.json_mutations import INDEX


def exchange(folder: Path, rng: random.Random) -> bool:
    """Files take each other's content or names."""
    a, b = rng.sample([*weight_files(folder), *json_files(folder)], 2)
    choice = rng.randrange(3)
    if choice == 0:
        left, right = a.read_bytes(), b.read_bytes()
        a.write_bytes(right)
        b.write_bytes(left)
    elif choice == 1:
        a.write_bytes(b.read_bytes())
    else:
        a.replace(b)
    return SAME


def irregular(folder: Path, rng: random.Random) -> bool:
    """A file becomes a link, a FIFO, a socket's like, a directory or nothing (A10)."""
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    kept = folder.with_name(f"{folder.name}-kept")
    file.rename(kept)
    choice = rng.randrange(8)
    if choice == 0:
        file.symlink_to(kept)
    elif choice == 1:
        file.symlink_to(rng.choice([file.name, "/dev/zero", "/nowhere", "..", "/proc/self/mem"]))
    elif choice == 2:
        os.mkfifo(file)
    elif choice == 3:
        file.mkdir()
    elif choice == 4:
        file.touch()
    elif choice == 5:
        os.link(kept, file)  # two names of one regular file: nothing is wrong with that
    elif choice == 6:
        os.mkfifo(file)
        os.link(kept, folder / f"copy-of-{file.name}")
    return SAME


def stray(folder: Path, rng: random.Random) -> bool:
    """A file that does not belong there (A13, A14)."""
    new = folder / rng.choice(
        ["pytorch_model.bin", "model.pt", "x.pkl", "modeling_evil.py", "m.gguf", "evil.so", "a.NPZ",
         "model-00009-of-00002.safetensors", "model_extra.safetensors", "other.safetensors",
         "training_args.bin", "README.md", "adapter_config.json", "delta.safetensors", INDEX,
         "name\nbreak", "model.safetensors", "generation_config.json", ".hidden", "x" * 255]
    )  # fmt: skip
    if new.exists():
        return SAME
    kind = rng.randrange(3)
    if kind == 0:
        new.write_bytes(rng.randbytes(rng.choice([0, 8, 100])))
    elif kind == 1:
        new.write_bytes(rng.choice(weight_files(folder)).read_bytes())
    else:
        os.mkfifo(new)
    return SAME


def renamed(folder: Path, rng: random.Random) -> bool:
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if rng.random() < 0.3:
        file.unlink()
    else:
        file.rename(folder / rng.choice([file.name.upper(), f"{file.name}.bak", "x.safetensors"]))
    return SAME


FOLDER: tuple[Mutation, ...] = (irregular, stray, renamed, exchange)
