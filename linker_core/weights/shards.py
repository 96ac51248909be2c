"""Which files hold a checkpoint's weights, and whether the index tells the truth about them."""

from __future__ import annotations

from pathlib import Path

from linker_core.errors import BadCheckpointError, UnsupportedFormatError
from linker_core.weights.safetensors_header import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_SHARDS = 512


def shard_names(names: list[str], index: dict[str, object] | None) -> list[str]:
    """Returns the weight files in order; a single file needs no index.

    Args:
        names: Everything in the directory.
        index: The content of the index, if there is one.

    Raises:
        UnsupportedFormatError: No safetensors at all.
        BadCheckpointError: Index and directory name other shards.
    """
    present = sorted(n for n in names if n.startswith("model") and n.endswith(".safetensors"))
    if not present:
        raise UnsupportedFormatError(
            "The directory holds no model*.safetensors file. Convert the weights to safetensors."
        )
    if index is None:
        if present != [SINGLE_FILE]:
            raise BadCheckpointError(
                f"{present[0]:.100}: shards without {INDEX_FILE}. Copy the index too."
            )
        return present
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpointError(f"{INDEX_FILE}: weight_map is not an object of file names.")
    named = sorted(set(weight_map.values()))
    for name in named:
        if name != Path(name).name:
            raise BadCheckpointError(f"{INDEX_FILE}: {name!r:.100} is not a plain file name.")
    if named != present or len(named) > _MAX_SHARDS:
        odd = sorted(set(named) ^ set(present))
        raise BadCheckpointError(
            f"{INDEX_FILE}: names {len(named)} shards, the directory has {len(present)}; "
            f"first difference {odd[0] if odd else named[0]!r:.100}. Copy all shards of one model."
        )
    return named


def check_index(index: dict[str, object], stored: dict[str, TensorInfo], files: list[str]) -> None:
    """Compares the index with what the shards hold.

    Raises:
        BadCheckpointError: They disagree on a tensor's place or on the total size.
    """
    weight_map = index["weight_map"]
    assert isinstance(weight_map, dict)
    actual = {name: files[tensor.shard] for name, tensor in stored.items()}
    if odd := sorted(
        k for k in weight_map.keys() | actual.keys() if weight_map.get(k) != actual.get(k)
    ):
        raise BadCheckpointError(
            f"{INDEX_FILE}: disagrees with the shards on {len(odd)} tensors, first {odd[0]!r:.100}."
        )
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in stored.values())
    if stated is not None and stated != total:
        raise BadCheckpointError(
            f"{INDEX_FILE}: total_size is {stated!r:.40}, the shards hold {total}."
        )
