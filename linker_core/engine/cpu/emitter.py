"""A thin layer over llvmlite's IR builder: loops, vectors and what the kernels compute with.

Vectors are as wide as the kernel says; LLVM splits them into what the CPU has. No operation may be
reordered: there are no fast-math flags, so a sum is taken in the order in which it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

Index: TypeAlias = int | ir.Value


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Returns the type of `lanes` elements."""
    return ir.VectorType(element, lanes)


def i64(value: int) -> ir.Constant:
    """Returns an integer constant."""
    return ir.Constant(I64, value)


def f32(value: float) -> ir.Constant:
    """Returns a float32 constant."""
    return ir.Constant(F32, value)


class Variable:
    """A place on the stack, which the compiler keeps in a register."""

    def __init__(self, builder: ir.IRBuilder, place: ir.Value, kind: ir.Type) -> None:
        self._builder, self._place, self._kind = builder, place, kind

    def get(self) -> ir.Value:
        """Reads it."""
        return self._builder.load(self._place, typ=self._kind)

    def set(self, value: ir.Value) -> None:
        """Writes it."""
        self._builder.store(value, self._place)


class Emitter:
    """Builds one function.

    Args:
        module: Where it goes.
        name: Its symbol.
        arguments: Types of its arguments; it returns nothing.
        exported: Whether it is called from outside the module; inlined away otherwise.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        arguments: Sequence[ir.Type],
        *,
        exported: bool = True,
    ) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        if not exported:
            self.function.linkage = "internal"
        self.arguments: Sequence[ir.Value] = self.function.args
        self._entry = self.function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self._entry)

    def finish(self) -> ir.Function:
        """Ends the function."""
        self.builder.ret_void()
        return self.function

    # --- control ------------------------------------------------------------------------------

    def variable(self, initial: ir.Value) -> Variable:
        """Declares a variable; it takes its initial value here, each time this is reached."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(initial.type)
        self.builder.store(initial, place)
        return Variable(self.builder, place, initial.type)

    @contextmanager
    def loop(self, start: Index, stop: Index, step: Index = 1) -> Iterator[ir.Value]:
        """Counts from `start` to below `stop`."""
        first, last, stride = (self.index(value) for value in (start, stop, step))
        b = self.builder
        before = b.block
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        counter = b.phi(I64)
        counter.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<", counter, last), body, end)
        b.position_at_end(body)
        yield counter
        following = b.add(counter, stride)
        counter.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(end)

    @contextmanager
    def taken(self, counter: ir.Value, stop: ir.Value) -> Iterator[ir.Value]:
        """Runs once for each number below `stop` that this thread is the first to take.

        Args:
            counter: Address of a 64-bit word that the threads share, 0 at first.
            stop: How many numbers there are.
        """
        b = self.builder
        head, body, end = (b.append_basic_block(name) for name in ("take", "taken", "none_left"))
        b.branch(head)
        b.position_at_end(head)
        number = b.atomic_rmw("add", counter, i64(1), "monotonic")
        b.cbranch(b.icmp_signed("<", number, stop), body, end)
        b.position_at_end(body)
        yield number
        b.branch(head)
        b.position_at_end(end)

    def cases(self, value: ir.Value, last: int) -> Iterator[int]:
        """Yields 1 to `last`; what is emitted meanwhile runs if `value` is that number."""
        b = self.builder
        end = b.append_basic_block("other")
        switch = b.switch(value, end)
        for number in range(1, last + 1):
            block = b.append_basic_block(f"case_{number}")
            switch.add_case(i64(number), block)
            b.position_at_end(block)
            yield number
            b.branch(end)
        b.position_at_end(end)

    def thread_number(self) -> ir.Value:
        """Returns this thread's number in its region."""
        return self.builder.sext(self._external("omp_get_thread_num", I32), I64)

    def num_threads(self) -> ir.Value:
        """Returns how many threads are in the region."""
        return self.builder.sext(self._external("omp_get_num_threads", I32), I64)

    def barrier(self) -> None:
        """Waits until every thread of the region is here."""
        self._external("GOMP_barrier", VOID)

    def round_down(self, value: ir.Value, step: int) -> ir.Value:
        """Returns the largest multiple of `step` that is not above a non-negative number."""
        return self.builder.sub(value, self.builder.urem(value, i64(step)))

    def round_up(self, value: ir.Value, step: int) -> ir.Value:
        """Returns the smallest multiple of `step` that is not below a non-negative number."""
        return self.round_down(self.builder.add(value, i64(step - 1)), step)

    def minimum(self, a: Index, b: Index) -> ir.Value:
        """Returns the smaller of two integers."""
        x, y = self.index(a), self.index(b)
        return self.builder.select(self.builder.icmp_signed("<", x, y), x, y)

    def larger(self, a: Index, b: Index) -> ir.Value:
        """Returns the larger of two integers."""
        x, y = self.index(a), self.index(b)
        return self.builder.select(self.builder.icmp_signed(">", x, y), x, y)

    def index(self, value: Index) -> ir.Value:
        """Returns an integer as a value."""
        return i64(value) if isinstance(value, int) else value

    def call(self, function: ir.Function, *arguments: Index) -> ir.Value:
        """Calls a function with integers and pointers."""
        values = [i64(value) if isinstance(value, int) else value for value in arguments]
        return self.builder.call(function, values)

    # --- memory -------------------------------------------------------------------------------

    def at(self, base: ir.Value, offset: Index, element: ir.Type) -> ir.Value:
        """Returns the address `offset` elements behind `base`."""
        return self.builder.gep(base, [self.index(offset)], source_etype=element)

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """Reads a scalar, or a vector of whose address only the element's alignment is known."""
        value = self.builder.load(address, typ=kind)
        value.align = _element_bytes(kind)
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Writes a scalar or a vector."""
        self.builder.store(value, address).align = _element_bytes(value.type)

    def field(self, record: ir.Value, number: Index, kind: ir.Type = I64) -> ir.Value:
        """Reads a field of a record of 64-bit words."""
        return self.load(self.at(record, number, I64), kind)

    def room(self, element: ir.Type, count: int) -> ir.Value:
        """Returns the address of room on the stack, which the whole function shares."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(ir.ArrayType(element, count))
        place.align = 64
        place.type = POINTER  # llvmlite's own says what it points to, which LLVM no longer does
        return place

    def own_address(self, address: ir.Value, by_row: ir.Value, row: ir.Value) -> ir.Value:
        """Returns `address`, or where it is a list of them (`by_row`) that of a row."""
        found = self.variable(address)
        with self.builder.if_then(by_row):
            found.set(self.field(address, row, POINTER))
        return found.get()

    def prefetch(self, address: ir.Value) -> None:
        """Asks for a cache line that will be read; any address will do."""
        kind = ir.FunctionType(VOID, [POINTER, I32, I32, I32])
        read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
        self.builder.call(
            self._declared("llvm.prefetch.p0", kind), [address, read, second_level, data]
        )

    def load_part(
        self, address: ir.Value, element: ir.Type, count: ir.Value, lanes: int
    ) -> ir.Value:
        """Reads `count` elements, fewer than `lanes`, and no more; the other lanes are zero."""
        words = self.variable(ir.Constant(vector(element, lanes), [0] * lanes))
        with self.loop(0, count) as lane:
            word = self.load(self.at(address, lane, element), element)
            words.set(self.builder.insert_element(words.get(), word, lane))
        return words.get()

    # --- vectors ------------------------------------------------------------------------------

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        """Returns a vector whose lanes are all `value`."""
        kind = vector(value.type, lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        single = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(
            single, single, ir.Constant(vector(I32, lanes), [0] * lanes)
        )

    def constant(self, value: float, like: ir.Value) -> ir.Value:
        """Returns a float32 constant, as a vector where `like` is one."""
        if isinstance(like.type, ir.VectorType):
            return ir.Constant(like.type, [value] * like.type.count)
        return f32(value)

    def zeros(self, lanes: int) -> ir.Value:
        """Returns float32 zeros."""
        return ir.Constant(vector(F32, lanes), [0.0] * lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Returns a · b + c, rounded once."""
        return self.intrinsic("fma", a, b, c)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Returns the larger; a NaN in `b` is kept, one in `a` is not."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def lane(self, value: ir.Value, number: int) -> ir.Value:
        """Returns one lane of a vector."""
        return self.builder.extract_element(value, ir.Constant(I32, number))

    def minimum_float(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Returns the smaller; a NaN in `a` is kept."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), b, a)

    def intrinsic(self, name: str, *operands: ir.Value) -> ir.Value:
        """Calls one of LLVM's functions over float32, scalars or vectors."""
        kind = operands[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        function_type = ir.FunctionType(kind, [kind] * len(operands))
        return self.builder.call(self._declared(f"llvm.{name}.{suffix}", function_type), operands)

    def call_named(self, symbol: str, *operands: ir.Value) -> ir.Value:
        """Calls one of LLVM's functions whose result is of its first operand's type."""
        kind = ir.FunctionType(operands[0].type, [operand.type for operand in operands])
        return self.builder.call(self._declared(symbol, kind), operands)

    def _external(self, symbol: str, result: ir.Type) -> ir.Value:
        return self.builder.call(self._declared(symbol, ir.FunctionType(result, [])), [])

    def _declared(self, symbol: str, kind: ir.FunctionType) -> ir.Function:
        found = self.module.globals.get(symbol)
        return ir.Function(self.module, kind, symbol) if found is None else found


def _element_bytes(kind: ir.Type) -> int:
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    if isinstance(element, ir.IntType):
        return max(1, int(element.width) // 8)
    return {F16: 2, F32: 4}.get(element, 8)
