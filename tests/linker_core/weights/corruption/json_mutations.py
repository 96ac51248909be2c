"""Spoils config, index and what else is JSON beside the weights (RELIABILITY A9, A14, A15)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.linker_core.weights.corruption.files import SAME, Mutation, json_files
from tests.linker_core.weights.corruption.nasty import INTEGERS, NAMES, dump, near, scalar

INDEX = "model.safetensors.index.json"


def _objects(record: Any) -> list[dict[str, Any]]:
    """Every object within a JSON value, the outermost first."""
    if isinstance(record, list):
        return [found for item in record for found in _objects(item)]
    if not isinstance(record, dict):
        return []
    return [record, *(found for item in record.values() for found in _objects(item))]


def json_value(folder: Path, rng: random.Random) -> bool:
    """One value of config, index or generation defaults becomes another."""
    file = rng.choice(json_files(folder))
    record = json.loads(file.read_text())
    target = rng.choice([found for found in _objects(record) if found] or [record])
    key = rng.choice(list(target) or ["a"])
    choice = rng.randrange(5)
    if choice == 0:
        target.pop(key, None)
    elif choice == 1:
        target[rng.choice(NAMES)] = scalar(rng)
    elif choice == 2:
        target[key] = near(target.get(key), rng)
    else:
        target[key] = scalar(rng)
    file.write_text(dump(record), errors="surrogatepass")
    return SAME


def config_bomb(folder: Path, rng: random.Random) -> bool:
    """One number that sizes the model becomes another (RELIABILITY A15)."""
    file = folder / "config.json"
    record = json.loads(file.read_text())
    sizes = [key for key, value in record.items() if type(value) is int]
    key = rng.choice([*sizes, "head_dim", "sliding_window", "max_window_layers"])
    record[key] = rng.choice([rng.choice(INTEGERS), near(record.get(key, 4), rng)])
    file.write_text(dump(record))
    return SAME


def config_trick(folder: Path, rng: random.Random) -> bool:
    """Custom code, quantisation, other architectures and other ropes (A13, A14)."""
    file = folder / "config.json"
    record = json.loads(file.read_text())
    record |= rng.choice(
        [
            {"auto_map": {"AutoModel": "evil.Model"}},
            {"trust_remote_code": True},
            {"quantization_config": rng.choice([{"quant_method": "gptq"}, [1], "x"])},
            {"architectures": rng.choice([["PhiForCausalLM"], [], "LlamaForCausalLM", [1], None])},
            {"model_type": scalar(rng)},
            {"rope_scaling": rng.choice([{"type": "yarn", "factor": 4.0}, [], 1, {"factor": 2}])},
            {"rope_scaling": {"rope_type": "linear", "factor": scalar(rng)}},
            {"rope_parameters": {"rope_type": scalar(rng), "rope_theta": scalar(rng)}},
            {"rope_theta": scalar(rng)},
            {"partial_rotary_factor": scalar(rng)},
            {"layer_types": [scalar(rng)] * 2},
            {"use_sliding_window": True, "sliding_window": scalar(rng)},
            {"tie_word_embeddings": not record.get("tie_word_embeddings", False)},
            {"dtype": scalar(rng), "torch_dtype": scalar(rng)},
            {"eos_token_id": [scalar(rng)] * rng.choice([1, 65])},
        ]
    )
    file.write_text(dump(record), errors="surrogatepass")
    return SAME


def json_bytes(folder: Path, rng: random.Random) -> bool:
    """The text of a small file is spoilt."""
    file = rng.choice(json_files(folder))
    data = file.read_bytes()
    at = rng.randrange(len(data))
    file.write_bytes(
        rng.choice(
            [
                data[:at],
                data[:at] + rng.randbytes(1) + data[at + 1 :],
                b"\xef\xbb\xbf" + data,
                data.decode().encode("utf-16"),
                data + data,
                data[:-1] + b"," + data[1:],
                b"[" * 200_000,
                b"{" + b'"a":{' * 3000,
                data + b" " * (1 << 21),
                b"",
                b"null",
            ]
        )
    )
    return SAME


def index_entry(folder: Path, rng: random.Random) -> bool:
    """The index says another file, path, name or size (A9, A10)."""
    file = folder / INDEX
    if not file.is_file():
        return json_value(folder, rng)
    record = json.loads(file.read_text())
    places = record["weight_map"]
    key = rng.choice(list(places))
    shard = places[key]
    choice = rng.randrange(6)
    if choice == 0:
        places[key] = rng.choice(
            [f"../{folder.name}/{shard}", f"./{shard}", f"/models/{shard}", "/dev/zero",
             "/etc/passwd", "..", "", shard.upper(), "config.json", f"{shard}\0", scalar(rng)]
        )  # fmt: skip
    elif choice == 1:
        places[key] = rng.choice(sorted(set(places.values())))
    elif choice == 2:
        del places[key]
    elif choice == 3:
        places[rng.choice(NAMES)] = shard
    elif choice == 4:
        record["metadata"] = rng.choice(
            [{"total_size": scalar(rng)}, {"total_size": near(1000, rng)}, scalar(rng)]
        )
    else:
        record["weight_map"] = scalar(rng)
    file.write_text(dump(record), errors="surrogatepass")
    return SAME


VALUES: tuple[Mutation, ...] = (json_value, json_value, json_bytes)
CONFIG: tuple[Mutation, ...] = (config_bomb, config_trick)
