"""Instructions that numba-cuda does not offer: wide loads and stores by address, byte dot products, bit tricks.

Addresses are plain ``uint64``, so that strides in bytes need no casts; loads by ``ld_*`` go through the read-only path
(``ld.global.nc``) and must not see what the kernel itself writes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types as T
from numba.cuda.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def _pointer(builder, address, element):
    return builder.inttoptr(address, ir.PointerType(element, 1))


def _read(builder, address, element, align):
    value = builder.load(_pointer(builder, address, element))
    value.align = align
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _scalar_load(name, element, align, numba_type):
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            return _read(builder, args[0], element, align)

        return numba_type(T.uint64), codegen

    load.__name__ = name
    return intrinsic(load)


def _vector_load(name, element, n, numba_type):
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = _read(builder, args[0], ir.VectorType(element, n), 4 * n)
            return context.make_tuple(
                builder, sig.return_type, [builder.extract_element(value, I32(i)) for i in range(n)]
            )

        return T.UniTuple(numba_type, n)(T.uint64), codegen

    load.__name__ = name
    return intrinsic(load)


ld_u8 = _scalar_load("ld_u8", I8, 1, T.uint8)
ld_u16 = _scalar_load("ld_u16", I16, 2, T.uint16)
ld_u32 = _scalar_load("ld_u32", I32, 4, T.uint32)
ld_f32 = _scalar_load("ld_f32", F32, 4, T.float32)
ld2_f32 = _vector_load("ld2_f32", F32, 2, T.float32)
ld4_f32 = _vector_load("ld4_f32", F32, 4, T.float32)
ld4_u32 = _vector_load("ld4_u32", I32, 4, T.uint32)


@intrinsic
def own_f32(typingctx, address):
    """Load a float32 that this thread itself may have written."""

    def codegen(context, builder, sig, args):
        value = builder.load(_pointer(builder, args[0], F32))
        value.align = 4
        return value

    return T.float32(T.uint64), codegen


@intrinsic
def st_f32(typingctx, address, value):
    """Store a float32 to global memory."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], F32)).align = 4
        return context.get_dummy_value()

    return T.void(T.uint64, T.float32), codegen


@intrinsic
def st_u32(typingctx, address, value):
    """Store a word to global memory."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], I32)).align = 4
        return context.get_dummy_value()

    return T.void(T.uint64, T.uint32), codegen


def _store_vector(builder, pointer, values, element, align):
    vector = ir.Constant(ir.VectorType(element, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, I32(i))
    builder.store(vector, pointer).align = align


@intrinsic
def st4_f32(typingctx, address, a, b, c, d):
    """Store four float32 to global memory, at a multiple of 16 bytes."""

    def codegen(context, builder, sig, args):
        _store_vector(builder, _pointer(builder, args[0], ir.VectorType(F32, 4)), args[1:], F32, 16)
        return context.get_dummy_value()

    return T.void(T.uint64, T.float32, T.float32, T.float32, T.float32), codegen


@intrinsic
def st2_f32(typingctx, address, a, b):
    """Store two float32 to global memory, at a multiple of 8 bytes."""

    def codegen(context, builder, sig, args):
        _store_vector(builder, _pointer(builder, args[0], ir.VectorType(F32, 2)), args[1:], F32, 8)
        return context.get_dummy_value()

    return T.void(T.uint64, T.float32, T.float32), codegen


@intrinsic
def shared_address(typingctx, array):
    """Return the address of a shared array in shared memory's own space."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(I32, 3)), I64)

    return T.uint64(array), codegen


@intrinsic
def keep(typingctx, value):
    """Return the value as something that must not be computed again: NVVM likes to do so in every turn of a loop."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(I64, [I64])
        return builder.call(ir.InlineAsm(function, "mov.b64 $0, $1;", "=l,l", side_effect=True), args)

    return T.uint64(T.uint64), codegen


def shared_load(builder, address, offset, element, n):
    """Emit one load of ``n`` values of 4 bytes from shared memory, at a multiple of its size."""
    at = builder.inttoptr(builder.add(address, I64(offset)), ir.PointerType(ir.VectorType(element, n), 3))
    value = builder.load(at)
    value.align = 4 * n
    return [builder.extract_element(value, I32(i)) for i in range(n)]


@intrinsic
def lds4_u32(typingctx, address):
    """Load four words from shared memory, at a multiple of 16 bytes."""

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, shared_load(builder, args[0], 0, I32, 4))

    return T.UniTuple(T.uint32, 4)(T.uint64), codegen


@intrinsic
def sts4_u32(typingctx, address, a, b, c, d):
    """Store four words to shared memory, at a multiple of 16 bytes."""

    def codegen(context, builder, sig, args):
        at = builder.inttoptr(args[0], ir.PointerType(ir.VectorType(I32, 4), 3))
        _store_vector(builder, at, args[1:], I32, 16)
        return context.get_dummy_value()

    return T.void(T.uint64, T.uint32, T.uint32, T.uint32, T.uint32), codegen


@intrinsic
def sts2_f32(typingctx, address, a, b):
    """Store two float32 to shared memory, at a multiple of 8 bytes."""

    def codegen(context, builder, sig, args):
        at = builder.inttoptr(args[0], ir.PointerType(ir.VectorType(F32, 2), 3))
        _store_vector(builder, at, args[1:], F32, 8)
        return context.get_dummy_value()

    return T.void(T.uint64, T.float32, T.float32), codegen


@intrinsic
def sts_f32(typingctx, address, value):
    """Store a float32 to shared memory."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(F32, 3))).align = 4
        return context.get_dummy_value()

    return T.void(T.uint64, T.float32), codegen


def emit_dp4a(builder, a, b, c):
    """Emit c plus the dot product of four signed bytes."""
    function = ir.FunctionType(I32, [I32] * 3)
    return builder.call(ir.InlineAsm(function, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"), [a, b, c])


def emit_dp4a_fma(builder, a, b, c, factor, addend):
    """Emit ``dp4a(a, b, c)``, its bits taken as a float32, times ``factor`` plus ``addend``."""
    function = ir.FunctionType(F32, [I32] * 3 + [F32] * 2)
    text = "{ .reg .b32 t; dp4a.s32.s32 t, $1, $2, $3; fma.rn.f32 $0, t, $4, $5; }"
    return builder.call(ir.InlineAsm(function, text, "=f,r,r,r,f,f"), [a, b, c, factor, addend])


@intrinsic
def dp4a(typingctx, a, b, c):
    """Return c plus the dot product of four signed bytes."""
    return T.int32(T.uint32, T.uint32, T.int32), lambda context, builder, sig, args: emit_dp4a(builder, *args)


@intrinsic
def prmt(typingctx, a, b, selector):
    """Return the four bytes of the pair (a, b) that the selector's nibbles name."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(I32, [I32] * 3)
        return builder.call(ir.InlineAsm(function, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"), args)

    return T.uint32(T.uint32, T.uint32, T.uint32), codegen


@intrinsic
def funnel(typingctx, low, high, bits):
    """Return the word that starts ``bits`` into the pair (low, high)."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(I32, [I32] * 3)
        return builder.call(ir.InlineAsm(function, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r"), args)

    return T.uint32(T.uint32, T.uint32, T.uint32), codegen


@intrinsic
def f16_to_f32(typingctx, bits):
    """Return the value of the lower 16 bits as an IEEE half."""

    def codegen(context, builder, sig, args):
        half = builder.bitcast(builder.trunc(args[0], I16), F16)
        return builder.fpext(half, F32)

    return T.float32(T.uint32), codegen


@intrinsic
def f32_to_f16(typingctx, value):
    """Return the bits of the nearest IEEE half."""

    def codegen(context, builder, sig, args):
        half = builder.fptrunc(args[0], F16)
        return builder.zext(builder.bitcast(half, I16), I32)

    return T.uint32(T.float32), codegen


@intrinsic
def st_u16(typingctx, address, value):
    """Store the lower 16 bits of a word to global memory."""

    def codegen(context, builder, sig, args):
        builder.store(builder.trunc(args[1], I16), _pointer(builder, args[0], I16)).align = 2
        return context.get_dummy_value()

    return T.void(T.uint64, T.uint32), codegen


@intrinsic
def as_f32(typingctx, bits):
    """Return the float32 of the same bits."""
    return T.float32(T.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], F32)


@intrinsic
def as_u32(typingctx, value):
    """Return the bits of a float32."""
    return T.uint32(T.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@intrinsic
def udiv(typingctx, a, b):
    """Return a // b of unsigned words; b is not 0."""
    return T.uint32(T.uint32, T.uint32), lambda context, builder, sig, args: builder.udiv(args[0], args[1])


@intrinsic
def urem(typingctx, a, b):
    """Return a % b of unsigned words; b is not 0."""
    return T.uint32(T.uint32, T.uint32), lambda context, builder, sig, args: builder.urem(args[0], args[1])
