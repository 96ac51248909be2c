"""The operations of a block on a CPU: float32 rows over the checkpoint's words, compiled.

A row's result is the same bit for bit whatever the batch, its order, the chunks of a prompt and the
pages: each kernel sums a row in one order that depends on the row alone.

Legend: T rows of the batch, n rows of a group, X elements of a row.
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import numpy as np
import torch

from linker_core.engine.arithmetic import (
    Addend,
    AttentionShape,
    ByRow,
    Code,
    Demand,
    Norm,
    Product,
    Rotation,
    Span,
)
from linker_core.engine.cpu.attention_spec import TASK as ATTENTION_TASK
from linker_core.engine.cpu.gate_code import TASK as GATE_TASK
from linker_core.engine.cpu.jobs import NEVER
from linker_core.engine.cpu.kernels import (
    add_region,
    attention_region,
    coded_product_region,
    expand_region,
    gate_region,
    host_tiling,
    norm_region,
    product_region,
)
from linker_core.engine.cpu.paged_batch import PagedBatch
from linker_core.engine.cpu.product_code import PIECE_ROWS, packed_elements
from linker_core.engine.cpu.product_code import TASK as PRODUCT_TASK
from linker_core.engine.cpu.regions import Region, require_openmp
from linker_core.engine.cpu.residual_calls import ResidualCalls
from linker_core.engine.cpu.tape import Tape
from linker_core.engine.kv_cache import KVCache
from linker_core.engine.rows import RowGroup
from linker_core.sharing.rungs import FACTOR_BITS, FACTOR_GROUP

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Below so many multiplications, or elements, a second thread takes longer to wake than it saves.
_MIN_SHARED_PRODUCT, _MIN_SHARED_ELEMENTS = 1 << 16, 1 << 14
_MIN_SHARED_SEEN = 1 << 6  # positions that all rows see, together
_NO_WINDOW = 1 << 62
_MAX_TAPES = 64  # of the sets of rows that were computed last
_PRODUCT_COUNTER = PRODUCT_TASK.index("next_piece")
_GATE_COUNTER = GATE_TASK.index("next_piece")
_ATTENTION_COUNTER = ATTENTION_TASK.index("next_item")
# Of low-rank factors: only their rows are summed.
_FACTOR_CODES = {Code(bits, FACTOR_GROUP if bits == 4 else 0) for bits in FACTOR_BITS}
_END_OF_JOBS = (0, 0, 0, 0, NEVER, 0, 0)


class CompiledArithmetic:
    """Compiled loops on torch's threads. Used by one thread.

    Args:
        rounded: Whether products round their rows to bfloat16 over bfloat16 words, which halves
            their time on CPUs with units for it (AVX512_BF16); elsewhere it changes nothing.

    Raises:
        LinkerError: torch here runs on another OpenMP than GNU's, or the CPU lacks vectors.
    """

    def __init__(self, *, rounded: bool = False) -> None:
        require_openmp()
        host_tiling()
        self._rounded = rounded
        self._packed = torch.empty(0)
        self._buffers: dict[str, torch.Tensor] = {}
        self._residuals = ResidualCalls(rounded=rounded)
        self._batch = PagedBatch()
        self._tapes: OrderedDict[Hashable, Tape] = OrderedDict()
        self._recording: Tape | None = None

    def warm_up(self, demand: Demand) -> None:
        """See `Arithmetic.warm_up`."""
        add_region()
        gate_region(demand.activation)
        for dtype in demand.norm_weights:
            norm_region(_DTYPES[dtype], demand.norm.plus_one)
        for shape in demand.attention:
            attention_region(shape, demand.page_tokens)
        for dtype in demand.weights:
            product_region(_DTYPES[dtype], self._rounded)
        for code in demand.codes:
            coded_product_region(code, self._rounded)
            if code in _FACTOR_CODES:
                expand_region(code)

    def buffer(self, name: str, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """See `Arithmetic.buffer`."""
        found = self._buffers.get(name)
        if found is None or found.shape[0] < num_rows:
            rows = 1 << (num_rows - 1).bit_length()
            found = self._buffers[name] = like.new_empty(rows, width)
            self.forget()
        assert found.shape[1] == width, name
        return found[:num_rows]

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """See `Arithmetic.run`."""
        # Histories grow from step to step, so how many threads attend is not a matter of the key.
        place = (key, self._num_attending())
        tape = self._tapes.get(place)
        if tape is not None:
            self._tapes.move_to_end(place)
            tape.replay()
            return
        self._recording = None if key is None else Tape()
        try:
            body()
            if self._recording is not None:
                self._tapes[place] = self._recording
        finally:
            self._recording = None
        if len(self._tapes) > _MAX_TAPES:
            self._tapes.popitem(last=False)

    def forget(self) -> None:
        """See `Arithmetic.forget`."""
        self._tapes.clear()
        self._recording = None

    def _run(
        self,
        region: Region,
        record: Sequence[int],
        *,
        num_threads: int,
        counter: int | None = None,
        kept: Sequence[object] = (),
    ) -> None:
        """Runs a region, and notes it down if this is being recorded.

        Args:
            region: Which.
            record: Its words.
            num_threads: How many threads run it.
            counter: Which word the threads count up.
            kept: What lies behind the record's addresses, buffers and weights apart.
        """
        call = region.call(record, num_threads=num_threads, counter=counter)
        call.run()
        if self._recording is not None:
            self._recording.add(call, kept)

    def multiply(self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product]) -> None:
        """See `Arithmetic.multiply`."""
        assert x_TI.dtype is torch.float32, "the loops know no other rows"
        dtypes = {product.weight_OI.dtype for product in products}
        for dtype in dtypes:
            same = (
                [p for p in products if p.weight_OI.dtype is dtype] if len(dtypes) > 1 else products
            )
            self._multiply(x_TI, rows, same, _DTYPES[dtype])

    def _multiply(
        self, x_TI: torch.Tensor, rows: RowGroup, products: Sequence[Product], dtype: str
    ) -> None:
        num_rows, width = rows.indices_n.shape[0], x_TI.shape[1]
        records: list[int] = []
        kept: list[np.ndarray] = []  # addresses that the records point to
        num_out = num_pieces = 0
        apart: list[Product] = []  # those whose bias is not in the weight's type
        for product in products:
            weight_OI, y_TO, bias = product
            assert weight_OI.is_contiguous()
            lies_at, by_row = 0, 0
            if bias is not None and any(b.dtype is not weight_OI.dtype for b in bias.tensors):
                apart.append(product)
            elif bias is not None:
                lies_at, by_row = _addresses(bias, rows, kept)
            outs = weight_OI.shape[0]
            records += (weight_OI.data_ptr(), y_TO.data_ptr(), y_TO.stride(0), outs)
            records += (num_pieces, lies_at, by_row)
            num_out += outs
            num_pieces += -(-outs // PIECE_ROWS)
        jobs = array("q", (*records, *_END_OF_JOBS))
        num_threads = _threads(num_rows * num_out * width, _MIN_SHARED_PRODUCT)
        packed = self._room(num_rows, width, num_threads)
        task = (
            *(x_TI.data_ptr(), x_TI.stride(0), rows.indices_n.data_ptr(), num_rows, width),
            *(packed.data_ptr(), num_pieces, 0, jobs.buffer_info()[0]),
        )
        self._run(
            product_region(dtype, self._rounded),
            task,
            num_threads=num_threads,
            counter=_PRODUCT_COUNTER,
            kept=(jobs, *kept, packed, rows.indices_n),
        )
        if apart:
            self._recording = None  # what follows is torch's
        for product in apart:
            assert product.bias is not None
            y_nO = rows.take(product.y_TO) + product.bias.gathered(rows, product.y_TO.dtype)
            rows.put(product.y_TO, y_nO)

    def add_residuals(self, x_TI: torch.Tensor, addends: Sequence[Addend]) -> None:
        """See `Arithmetic.add_residuals`."""
        assert x_TI.dtype is torch.float32, "the loops know no other rows"
        for region, task, counter, work, kept in self._residuals.calls(x_TI, addends):
            num_threads = _threads(work, _MIN_SHARED_PRODUCT)
            self._run(region, task, num_threads=num_threads, counter=counter, kept=kept)

    def normalize(
        self, x_TX: torch.Tensor, weights: ByRow, norm: Norm, out_TX: torch.Tensor
    ) -> None:
        """See `Arithmetic.normalize`."""
        num_elements, width = x_TX.shape[1], weights.tensors[0].shape[0]
        every = RowGroup(_numbers(x_TX.shape[0]), None)
        for dtype, rows in _by_dtype(weights, every):
            kept: list[np.ndarray] = []
            lies_at, by_row = _addresses(weights, rows, kept)
            num_rows = rows.indices_n.shape[0]
            task = (
                *(x_TX.data_ptr(), x_TX.stride(0), out_TX.data_ptr(), out_TX.stride(0)),
                *(rows.indices_n.data_ptr(), num_rows, num_elements // width, width),
                *(lies_at, by_row, _float_bits(norm.eps)),
            )
            num_threads = _threads(num_rows * num_elements, _MIN_SHARED_ELEMENTS)
            region = norm_region(dtype, norm.plus_one)
            self._run(region, task, num_threads=num_threads, kept=(*kept, rows.indices_n))

    def gate(self, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str) -> None:
        """See `Arithmetic.gate`."""
        task = (
            *(gate_TI.data_ptr(), gate_TI.stride(0), up_TI.data_ptr(), up_TI.stride(0)),
            *(*gate_TI.shape, 0),
        )
        num_threads = _threads(gate_TI.numel(), _MIN_SHARED_ELEMENTS)
        region = gate_region(activation)
        self._run(region, task, num_threads=num_threads, counter=_GATE_COUNTER)

    def add(self, x_TH: torch.Tensor, y_TH: torch.Tensor) -> None:
        """See `Arithmetic.add`."""
        task = (x_TH.data_ptr(), x_TH.stride(0), y_TH.data_ptr(), y_TH.stride(0), *x_TH.shape)
        self._run(add_region(), task, num_threads=_threads(x_TH.numel(), _MIN_SHARED_ELEMENTS))

    def prepare(self, spans: Sequence[Span], cache: KVCache) -> PagedBatch:
        """See `Arithmetic.prepare`."""
        assert cache.shape.dtype is torch.float32, "the loops know no other pages"
        if not self._batch.fill(spans, cache):
            self.forget()
        return self._batch

    def attend(
        self,
        qkv_TX: torch.Tensor,
        rotation: Rotation,
        batch: PagedBatch,
        *,
        layer: int,
        shape: AttentionShape,
    ) -> torch.Tensor:
        """See `Arithmetic.attend`."""
        cache = batch.cache
        width = shape.num_heads * shape.head_dim
        out_TX = self.buffer("attended", qkv_TX.shape[0], width, qkv_TX)
        task = (
            *(qkv_TX.data_ptr(), qkv_TX.stride(0)),
            *(rotation.cos_TD.data_ptr(), rotation.sin_TD.data_ptr()),
            *(cache.keys_LNKDP[layer].data_ptr(), cache.values_LNKPD[layer].data_ptr()),
            *(shape.num_kv_heads, *batch.records, 0),
            *(out_TX.data_ptr(), out_TX.stride(0), _float_bits(shape.scaling)),
            _NO_WINDOW if shape.window is None else shape.window,
        )
        region = attention_region(shape, cache.shape.page_tokens)
        self._run(region, task, num_threads=self._num_attending(), counter=_ATTENTION_COUNTER)
        return out_TX

    def _num_attending(self) -> int:
        """Returns how many threads attend what was prepared last."""
        return _threads(self._batch.num_seen, _MIN_SHARED_SEEN)

    def _room(self, num_rows: int, width: int, num_threads: int) -> torch.Tensor:
        """Returns room for packed rows."""
        needed = packed_elements(
            host_tiling(), num_rows=num_rows, width=width, num_threads=num_threads
        )
        if self._packed.numel() < needed:
            self._packed = torch.empty(needed)
        return self._packed


def _threads(work: int, least: int) -> int:
    return torch.get_num_threads() if work >= least else 1


def _addresses(tensors: ByRow, rows: RowGroup, kept: list[np.ndarray]) -> tuple[int, int]:
    """Returns where the one tensor of all rows lies and 0, or where their addresses lie and 1.

    Args:
        tensors: By row.
        rows: Whose.
        kept: Takes the list of addresses, which has to live until they are used.
    """
    if tensors.labels_T is None:
        return tensors.tensors[0].data_ptr(), 0
    addresses = np.array([tensor.data_ptr() for tensor in tensors.tensors], np.int64)
    by_row = addresses[rows.take(tensors.labels_T).numpy()]
    kept.append(by_row)
    return by_row.ctypes.data, 1


def _by_dtype(tensors: ByRow, every: RowGroup) -> list[tuple[str, RowGroup]]:
    """Returns the rows whose tensors are of one type, for each type."""
    if tensors.labels_T is None:
        return [(_DTYPES[tensors.tensors[0].dtype], every)]
    dtypes = [_DTYPES[tensor.dtype] for tensor in tensors.tensors]
    if len(set(dtypes)) == 1:
        return [(dtypes[0], every)]
    of_row = np.array(dtypes)[tensors.labels_T.numpy()]
    return [
        (dtype, RowGroup(torch.from_numpy(np.flatnonzero(of_row == dtype)), None))
        for dtype in dict.fromkeys(dtypes)
    ]


def _numbers(count: int) -> torch.Tensor:
    """Returns 0, 1, … as a tensor that is made once."""
    return _all_numbers(1 << max(0, count - 1).bit_length())[:count]


@cache
def _all_numbers(count: int) -> torch.Tensor:
    return torch.arange(count)


@cache
def _float_bits(value: float) -> int:
    """Returns the word whose first four bytes are a float32."""
    return int(struct.unpack("<q", struct.pack("<fI", value, 0))[0])
