"""Made-up fine-tunes of one base that every engine loads, written once and kept for later runs.

The shape is Qwen2.5-0.5B's with a vocabulary of 16,000 tokens. Blocks and embedding lie in shards
of their own, so that variants with the same blocks share that file on disk by a hard link.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice, product
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from linker_core.weights.architecture import CONFIG_FILE, parse_config
from linker_core.weights.keys import EMBED_NAME
from linker_core.weights.shapes import expected_tensors
from linker_core.weights.shards import INDEX_FILE
from server.cli.bench.pair import QWEN2

# 745 MB in bfloat16.
SERVED: Final[Mapping[str, Any]] = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 16_000,
}  # fmt: skip
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_END_ID: Final = 2
_CONFIG: Final[Mapping[str, Any]] = {
    **QWEN2,
    "use_sliding_window": False,
    "eos_token_id": _END_ID,
}
_CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPREAD: Final = 0.02  # of weights, as trained ones have it
_OWN_PART: Final = 0.1  # of a near weight
_BLOCKS_SHARD: Final = "model-00001-of-00002.safetensors"
_TOKENS_SHARD: Final = "model-00002-of-00002.safetensors"
_BASE: Final = "base"


class Kinship(StrEnum):
    """What a variant has in common with its base."""

    OWN_HEAD = "own-head"  # every block; the tied embedding is its own
    EQUAL = "equal"  # every weight
    NEAR = "near"  # no weight, but most of each


def write_family(
    root: Path,
    *,
    kinship: Kinship,
    num_models: int,
    shape: Mapping[str, Any] = SERVED,
) -> list[Path]:
    """Returns the directories of a base and its variants, written where they are not there yet.

    Args:
        root: A directory for families of this shape alone.
        kinship: What the variants share with the base.
        num_models: The base included.
        shape: Sizes of a Qwen2, by the names of its config.json.
    """
    root.mkdir(parents=True, exist_ok=True)
    base = root / _BASE
    _write_once(base, shape, blocks_of=None, tokens_of=None, near_to=None, seed=0)
    family = [base]
    for number in range(1, num_models):
        path = root / f"{kinship}-{number}"
        tokens_of = base if kinship is Kinship.EQUAL else None
        blocks_of = None if kinship is Kinship.NEAR else base
        near_to = base if kinship is Kinship.NEAR else None
        _write_once(
            path, shape, blocks_of=blocks_of, tokens_of=tokens_of, near_to=near_to, seed=number
        )
        family.append(path)
    return family


def words(count: int, *, seed: int) -> str:
    """Returns a text of that many tokens for the tokenizer of these checkpoints."""
    known = list(islice(_words(), _num_words(SERVED["vocab_size"])))
    drawn = torch.randint(
        len(known), (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return "".join(f" {known[index]}" for index in drawn)


def _write_once(
    path: Path,
    shape: Mapping[str, Any],
    *,
    blocks_of: Path | None,
    tokens_of: Path | None,
    near_to: Path | None,
    seed: int,
) -> None:
    """Writes a checkpoint under another name first, so that a path that exists is complete."""
    if path.exists():
        return
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    folder.chmod(0o755)
    try:
        config = {**_CONFIG, **shape}
        _write_words(folder, config)
        tensors = expected_tensors(parse_config(config))
        generator = torch.Generator().manual_seed(seed)
        blocks = [name for name in tensors if name != EMBED_NAME]
        shards = ((_BLOCKS_SHARD, blocks, blocks_of), (_TOKENS_SHARD, [EMBED_NAME], tokens_of))
        for shard, names, source in shards:
            if source is not None:
                os.link(source / shard, folder / shard)
                continue
            state = {name: _random(name, tensors[name], generator) for name in names}
            if near_to is not None:
                for name, weight in load_file(near_to / shard).items():
                    state[name] = torch.lerp(weight, state[name], _OWN_PART)
            save_file(state, folder / shard, metadata={"format": "pt"})
        index = {name: shard for shard, names, _ in shards for name in names}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _random(name: str, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(size, generator=generator).mul_(_SPREAD)
    if "norm" in name:
        weight += 1
    if name == EMBED_NAME:
        # A logit of nothing is never the greatest: no greedy answer ends before its time.
        weight[: len(_SPECIAL)] = 0
    return weight.bfloat16()


def _write_words(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes all that is not a weight."""
    generation = {"bos_token_id": 0, "eos_token_id": _END_ID, "do_sample": False}
    tokens = {"eos_token": _SPECIAL[_END_ID], "pad_token": _SPECIAL[0], "unk_token": None}
    records: dict[str, Mapping[str, Any]] = {
        CONFIG_FILE: config,
        "generation_config.json": generation,
        "tokenizer_config.json": {
            **tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": _CHAT_TEMPLATE,
            "model_max_length": config["max_position_embeddings"],
        },
    }
    for name, record in records.items():
        (folder / name).write_text(json.dumps(record, indent=1))
    _tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE whose merges build made-up words, each with and without a space."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [(left, right) for left, right in map(tuple, _syllables())]
    known = list(islice(_words(), _num_words(vocab_size)))
    merges += [(word[:2], word[2:]) for word in known] + [("Ġ", word) for word in known]
    tokens += [left + right for left, right in merges]
    tokens += [f"<|reserved_{number}|>" for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return tokenizer


def _num_words(vocab_size: int) -> int:
    room = vocab_size - len(_SPECIAL) - 256 - len(list(_syllables()))
    assert room >= 2
    return room // 2


def _words() -> Iterator[str]:
    """Yields words of two syllables, their first syllables in turn."""
    return (first + second for second, first in product(_syllables(), repeat=2))


def _syllables() -> Iterator[str]:
    return map("".join, product("bcdfghjklmnpqrstvwxz", "aeiou"))
