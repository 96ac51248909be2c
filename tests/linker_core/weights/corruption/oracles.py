"""What must hold of a spoilt folder: refused with a typed error, or read as it stands.

The judge of what a file of weights says is safetensors' own reader.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize

from linker_core.errors import LinkerError
from linker_core.residency.loader import load_tensors
from linker_core.residency.skeleton import build_skeleton
from linker_core.residency.stored import Stored, StoredTensor
from linker_core.sharing.delta import DeltaFile
from linker_core.sharing.delta_data import check_data, check_donor
from linker_core.sharing.delta_layout import DELTA_FILE
from linker_core.sharing.planner import plan_donor
from linker_core.sharing.scan import check_finite
from linker_core.weights.checkpoint import Checkpoint
from linker_core.weights.fingerprint import fingerprint
from linker_core.weights.lora import ADAPTER_FILE, LoraAdapter
from linker_core.weights.safetensors_header import TensorInfo

CPU = torch.device("cpu")
_MAX_MESSAGE = 2000
Words = tuple[str, tuple[int, ...], bytes]  # type, shape, data


class OracleError(Exception):
    """A folder was read in a way that it must not be."""


def judge_files(files: list[Path]) -> dict[str, Words]:
    """Returns what safetensors' own reader finds in files that we accepted."""
    found: dict[str, Words] = {}
    for file in files:
        try:
            entries = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise OracleError(f"{file.name} was accepted, and safetensors refuses it") from error
        for name, entry in entries:
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def check_checkpoint(folder: Path, original: Path, *, differs: bool) -> None:
    """Opens a checkpoint, reads it in every way there is, and compares.

    Raises:
        LinkerError: It was refused.
        OracleError: It was accepted and is not what it was, or not what its files say.
    """
    with Checkpoint.open(folder) as checkpoint:
        said = judge_files([folder / name for name in checkpoint.shard_names])
        _compare(checkpoint.tensors, checkpoint.read_into, said)
        with Checkpoint.open(original) as good:
            if not differs:
                if good.tensors.keys() != checkpoint.tensors.keys():
                    raise OracleError("it was accepted with other tensors")
                true = judge_files([original / name for name in good.shard_names])
                _compare(checkpoint.tensors, checkpoint.read_into, true)
            if checkpoint.config != good.config:
                build_skeleton(checkpoint.config, device=CPU, dtype=torch.float32)
        digest = fingerprint(checkpoint)
        check_finite(checkpoint, mapped=True)
        moving = load_tensors(
            checkpoint, plan_donor(checkpoint, fingerprint=digest), {}, device=CPU
        )
        stored = _finish(moving)
        for name in checkpoint.tensors:
            entry = stored[name]
            assert isinstance(entry, StoredTensor)
            if _bytes(entry.tensor) != said[name][2]:
                raise OracleError(f"{name} was loaded as something else")


def check_adapter(folder: Path, base: Path) -> None:
    """Opens an adapter for its base and reads every factor; see `check_checkpoint`."""
    with Checkpoint.open(base) as checkpoint, LoraAdapter.open(folder, checkpoint.config) as found:
        said = judge_files([folder / ADAPTER_FILE])
        for pair in found.pairs.values():
            for factor in (pair.a, pair.b):
                if (factor.dtype, factor.shape, bytes(found.read(factor))) != said[factor.name]:
                    raise OracleError(f"{factor.name} was read as something else")


def check_delta(folder: Path, base: Path) -> None:
    """Opens a delta, checks its data and loads it over its donor; see `check_checkpoint`."""
    with DeltaFile.open(folder) as delta, Checkpoint.open(base) as donor:
        check_data(delta)
        check_donor(delta, donor)
        _compare(delta.tensors, delta.read_into, judge_files([folder / DELTA_FILE]))
        lent = _finish(load_tensors(donor, plan_donor(donor, fingerprint=""), {}, device=CPU))
        _finish(load_tensors(delta, delta.plan, lent, device=CPU))
        if delta.config != donor.config:
            build_skeleton(delta.config, device=CPU, dtype=torch.float32)


def check_refusal(error: LinkerError, folder: Path) -> None:
    """A refusal goes to a client and into a log: short, one line, printable, and no path."""
    text = error.message
    if not 0 < len(text) <= _MAX_MESSAGE:
        raise OracleError(f"the message has {len(text)} characters")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise OracleError(f"the message holds what no log can take: {text!a}")
    if str(folder) in text or str(folder.parent) in text:
        raise OracleError(f"the message says where the folder is: {text!a}")


def _compare(
    tensors: Mapping[str, TensorInfo],
    read_into: Callable[[str, memoryview], None],
    said: Mapping[str, Words],
) -> None:
    for name, tensor in tensors.items():
        words = bytearray(tensor.nbytes)
        read_into(name, memoryview(words))
        if name not in said or (tensor.dtype, tensor.shape, bytes(words)) != said[name]:
            raise OracleError(f"{name} was read as something else")


def _finish(moving: Generator[int, None, dict[str, Stored]]) -> dict[str, Stored]:
    while True:
        try:
            next(moving)
        except StopIteration as end:
            stored: dict[str, Stored] = end.value
            return stored


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
