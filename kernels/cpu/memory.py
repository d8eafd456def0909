"""Words, numbers and atomics at addresses, for use in ordinary njit code."""

from __future__ import annotations

from typing import Any

from .emit import F16, F32, I8, I16, I32, I64, Emit, intrinsic, ir, micro, types


@micro(types.int64, 1)
def ld_i64(e, a):
    """Load an int64."""
    return e.load(I64, a)


@micro(types.int64, 1)
def ld_i32(e, a):
    """Load an int32."""
    return e.b.sext(e.load(I32, a), I64)


@micro(types.int64, 1)
def ld_u16(e, a):
    """Load an unsigned 16-bit integer."""
    return e.b.zext(e.load(I16, a), I64)


@micro(types.int64, 1)
def ld_u8(e, a):
    """Load an unsigned byte."""
    return e.b.zext(e.load(I8, a), I64)


@micro(types.int64, 1)
def ld_i8(e, a):
    """Load a signed byte."""
    return e.b.sext(e.load(I8, a), I64)


@micro(types.float32, 1)
def ld_f32(e, a):
    """Load a float."""
    return e.load(F32, a)


@micro(types.float32, 1)
def ld_f16(e, a):
    """Load a half as a float."""
    return e.to_f32(e.load(F16, a))


@micro(types.void, 2)
def st_i64(e, a, v):
    """Store an int64."""
    e.store(v, a)


@micro(types.void, 2)
def st_i32(e, a, v):
    """Store the low 32 bits."""
    e.store(e.b.trunc(v, I32), a)


@micro(types.void, 2)
def st_u16(e, a, v):
    """Store the low 16 bits."""
    e.store(e.b.trunc(v, I16), a)


@micro(types.void, 2)
def st_u8(e, a, v):
    """Store the low 8 bits."""
    e.store(e.b.trunc(v, I8), a)


def _with_float(result: Any, body: Any) -> Any:
    """Return an intrinsic of an address and a float."""

    def typer(typingctx, a, v):
        def codegen(context, builder, signature, args):
            value = body(Emit(context, builder), *args)
            return context.get_dummy_value() if value is None else value

        return result(types.int64, types.float32), codegen

    return intrinsic(typer)


st_f32 = _with_float(types.void, lambda e, a, v: e.store(v, a))
#: Store a float as a half.
st_f16 = _with_float(types.void, lambda e, a, v: e.store(e.b.extract_element(e.to_f16(e.splat(v, 4)), I32(0)), a))
#: Store a float as a bfloat.
st_bf16 = _with_float(types.void, lambda e, a, v: e.store(e.b.extract_element(e.to_bf16(e.splat(v, 4)), I32(0)), a))


@intrinsic
def floats(typingctx, a):
    """Return an address as a pointer to floats that njit code can index."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def f32_of_bits(typingctx, a):
    """Return the float whose bits are the low 32 of an integer."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic
def bits_of(typingctx, v):
    """Return the bits of a float, to be handed to a `micro` (see `Emit.float_of`)."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), codegen


@micro(types.void, 3)
def copy_bytes(e, dst, src, n):
    """Copy n bytes; the two may be the same or overlap."""
    pointer = I8.as_pointer()
    f = e.fn("llvm.memmove.p0.p0.i64", ir.VoidType(), pointer, pointer, I64, ir.IntType(1))
    e.b.call(f, [e.pointer(I8, dst), e.pointer(I8, src), n, ir.IntType(1)(0)])


# -- calls through addresses -------------------------------------------------------


def _call(n: int) -> Any:
    def body(e, function, *args):
        signature = ir.FunctionType(ir.VoidType(), [I64] * n)
        e.b.call(e.b.inttoptr(function, signature.as_pointer()), args)

    body.__name__ = f"call{n}"
    return micro(types.void, n + 1)(body)


#: ``call4(address, a, b, c, d)``: call the kernel at an address with int64 arguments.
call4, call6, call8 = _call(4), _call(6), _call(8)


@micro(types.int64, 6)
def ask5(e, function, *args):
    """Call the function at an address with five int64 arguments, and return its result."""
    return e.b.call(e.b.inttoptr(function, ir.FunctionType(I64, [I64] * 5).as_pointer()), args)


# -- atomics and waiting --------------------------------------------------------------


@micro(types.int64, 2)
def atomic_add(e, a, v):
    """Add to an int64 and return the previous value."""
    return e.b.atomic_rmw("add", e.pointer(I64, a), v, "acq_rel")


@micro(types.int64, 2)
def atomic_swap(e, a, v):
    """Store an int64 and return the previous value; a full barrier."""
    return e.b.atomic_rmw("xchg", e.pointer(I64, a), v, "seq_cst")


@micro(types.int64, 1)
def atomic_load(e, a):
    """Load an int64 after which later reads happen."""
    return e.b.load_atomic(e.pointer(I64, a), "acquire", 8)


@micro(types.void, 2)
def atomic_store(e, a, v):
    """Store an int64 before which earlier writes happen."""
    e.b.store_atomic(v, e.pointer(I64, a), "release", 8)


@micro(types.void, 1)
def pause(e, _):
    """Tell the CPU that this is a waiting loop."""
    if e.has("sse2"):
        e.b.call(e.fn("llvm.x86.sse2.pause", ir.VoidType()), [])
    elif e.triple.startswith(("aarch64", "arm64")):
        e.b.call(e.fn("llvm.aarch64.hint", ir.VoidType(), I32), [I32(1)])


@micro(types.int64, 1)
def cycles(e, _):
    """Return a counter that increases steadily: the processor's clock, if it has one."""
    return e.b.call(e.fn("llvm.readcyclecounter", I64), [])


@micro(types.void, 1)
def sched_yield(e, _):
    """Let another thread run on this core, if the system has the call."""
    if "windows" not in e.triple:
        e.b.call(e.fn("sched_yield", I32), [])


def has_futex(triple: str) -> bool:
    """Whether threads can sleep on a word: Linux on x86-64."""
    return "linux" in triple and triple.startswith("x86_64")


_FUTEX, _WAIT_PRIVATE, _WAKE_PRIVATE = 202, 128, 129  # x86-64's call number


def _futex(e: Emit, *args: ir.Value) -> None:
    e.b.call(e.fn("syscall", I64, *[I64] * 7), [I64(_FUTEX), *args, I64(0), I64(0), I64(0)])


@micro(types.int64, 2)
def futex_wait(e, a, value):
    """Sleep while the low 32 bits at an address equal a value; 0 if threads cannot sleep here."""
    if not has_futex(e.triple):
        return I64(0)
    _futex(e, a, I64(_WAIT_PRIVATE), value)
    return I64(1)


@micro(types.void, 1)
def futex_wake(e, a):
    """Wake all that sleep on an address."""
    if has_futex(e.triple):
        _futex(e, a, I64(_WAKE_PRIVATE), I64(1 << 30))
