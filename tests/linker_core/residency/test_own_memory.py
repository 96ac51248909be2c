"""Small tensors of one model lie together, each with its storage, and go with the last of them."""

from __future__ import annotations

import errno
import gc
import mmap
import weakref

import pytest
import torch

from linker_core.errors import InsufficientCapacityError
from linker_core.residency import own_memory
from linker_core.residency.own_memory import OwnMemory
from linker_core.residency.reading import HUGE_PAGE_BYTES
from linker_core.weights.safetensors_header import TensorInfo

CPU = torch.device("cpu")


def info(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    nbytes = torch.Size(shape).numel() * {"BF16": 2, "U8": 1, "I64": 8}[dtype]
    return TensorInfo(name=name, dtype=dtype, shape=shape, nbytes=nbytes, shard=0, offset=0)


SMALL = [
    info("codes", 999, 1001, dtype="U8"),
    info("scales", 37, 3),
    info("positions", 5, dtype="I64"),
    info("more", 700, 1000),
]
EMPTY, LARGE = info("extra", 0, 64), info("whole", 1024, 1024)


def test_small_tensors_lie_in_one_mapping_and_do_not_touch_each_other() -> None:
    memory = OwnMemory([*SMALL, EMPTY, LARGE], device=CPU)
    tensors = {of.name: memory.allocate_like(of) for of in (*SMALL, EMPTY, LARGE)}
    for number, (name, tensor) in enumerate(tensors.items()):
        of = next(of for of in (*SMALL, EMPTY, LARGE) if of.name == name)
        assert tuple(tensor.shape) == of.shape
        assert tensor.untyped_storage().nbytes() == tensor.nbytes == of.nbytes
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors.values()):
        assert bool((tensor == number + 1).all())
    addresses = [tensors[of.name].data_ptr() for of in SMALL]
    assert max(addresses) - min(addresses) < sum(of.nbytes for of in SMALL) + 64 * len(SMALL)
    assert all(address % 64 == 0 for address in addresses)
    assert LARGE.nbytes == HUGE_PAGE_BYTES
    assert not min(addresses) <= tensors["whole"].data_ptr() <= max(addresses)


def test_mapping_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(mmap.mmap):
        """What can be referred to weakly."""

    made: list[weakref.ref[Watched]] = []

    def watched(nbytes: int) -> Watched:
        mapping = Watched(-1, nbytes)
        made.append(weakref.ref(mapping))
        return mapping

    monkeypatch.setattr(own_memory, "map_host_memory", watched)
    memory = OwnMemory(SMALL, device=CPU)
    first, *others = (memory.allocate_like(of) for of in SMALL)
    del memory, others
    gc.collect()
    assert made[0]() is not None
    first.fill_(7)
    del first
    gc.collect()
    assert made[0]() is None


def test_what_is_little_in_all_is_allocated_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_nbytes: int) -> mmap.mmap:
        raise AssertionError("a mapping for next to nothing")

    monkeypatch.setattr(own_memory, "map_host_memory", refuse)
    memory = OwnMemory(SMALL[:3], device=CPU)
    assert memory.allocate_like(SMALL[1]).nbytes == SMALL[1].nbytes


def test_mapping_that_the_host_has_not_is_insufficient_capacity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(_nbytes: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(own_memory, "map_host_memory", none_left)
    with pytest.raises(InsufficientCapacityError, match="small weights"):
        OwnMemory(SMALL, device=CPU)
