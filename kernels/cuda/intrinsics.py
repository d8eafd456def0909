"""Instructions that numba-cuda does not offer: wide loads and stores by address, byte dot products, bit tricks.

Addresses are plain ``uint64``, so that strides in bytes need no casts; loads by ``ld_*`` go through the read-only path
(``ld.global.nc``) and must not see what the kernel itself writes.
"""

from __future__ import annotations

import inspect

from llvmlite import ir
from numba import types as T
from numba.cuda.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
#: Address spaces.
GLOBAL, SHARED = 1, 3


def instruction(result, *kinds, name=""):
    """Return a decorator that makes an instruction of ``emit(builder, *values)``.

    Parameters
    ----------
    result : numba type
        Of what ``emit`` returns: a value, a list of values for a tuple, or None for void.
    kinds : numba types
        Of the arguments.
    """

    def wrap(emit):
        def codegen(context, builder, sig, args):
            made = emit(builder, *args)
            if made is None:
                return context.get_dummy_value()
            return context.make_tuple(builder, sig.return_type, made) if isinstance(made, list) else made

        def typed(typingctx, *arguments):
            return result(*kinds), codegen

        typed.__name__, typed.__doc__ = name or emit.__name__, emit.__doc__
        # Numba counts an intrinsic's arguments by its signature
        names = ["typingctx", *list(inspect.signature(emit).parameters)[1 : 1 + len(kinds)]]
        typed.__signature__ = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
        )
        return intrinsic(typed)

    return wrap


# -- loads and stores ----------------------------------------------------------------------


def _load(builder, address, element, align, space=GLOBAL):
    value = builder.load(builder.inttoptr(address, ir.PointerType(element, space)))
    value.align = align
    return value


def _read(builder, address, element, align):
    """Load through the read-only path."""
    value = _load(builder, address, element, align)
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _elements(builder, vector):
    return [builder.extract_element(vector, I32(i)) for i in range(vector.type.count)]


def _store(builder, address, values, space=GLOBAL):
    """Store one value, or several as a vector, at a multiple of their size."""
    value = values[0]
    if len(values) > 1:
        value = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
        for i, element in enumerate(values):
            value = builder.insert_element(value, element, I32(i))
    stored = builder.store(value, builder.inttoptr(address, ir.PointerType(value.type, space)))
    stored.align = 2 if value.type == I16 else 4 * len(values)


def _scalar_load(name, element, align, numba_type):
    return instruction(numba_type, T.uint64, name=name)(
        lambda builder, address: _read(builder, address, element, align)
    )


def _vector_load(name, element, n, numba_type):
    def load(builder, address):
        return _elements(builder, _read(builder, address, ir.VectorType(element, n), 4 * n))

    return instruction(T.UniTuple(numba_type, n), T.uint64, name=name)(load)


ld_u8 = _scalar_load("ld_u8", I8, 1, T.uint8)
ld_u16 = _scalar_load("ld_u16", I16, 2, T.uint16)
ld_u32 = _scalar_load("ld_u32", I32, 4, T.uint32)
ld_f32 = _scalar_load("ld_f32", F32, 4, T.float32)
ld2_f32 = _vector_load("ld2_f32", F32, 2, T.float32)
ld4_f32 = _vector_load("ld4_f32", F32, 4, T.float32)
ld4_u32 = _vector_load("ld4_u32", I32, 4, T.uint32)


@instruction(T.float32, T.uint64)
def own_f32(builder, address):
    """Load a float32 that this thread itself may have written."""
    return _load(builder, address, F32, 4)


@instruction(T.void, T.uint64, T.float32)
def st_f32(builder, address, value):
    """Store a float32 to global memory."""
    _store(builder, address, [value])


@instruction(T.void, T.uint64, T.uint32)
def st_u32(builder, address, value):
    """Store a word to global memory."""
    _store(builder, address, [value])


@instruction(T.void, T.uint64, T.uint32)
def st_u16(builder, address, value):
    """Store the lower 16 bits of a word to global memory."""
    _store(builder, address, [builder.trunc(value, I16)])


@instruction(T.void, T.uint64, *[T.float32] * 4)
def st4_f32(builder, address, a, b, c, d):
    """Store four float32 to global memory, at a multiple of 16 bytes."""
    _store(builder, address, [a, b, c, d])


@instruction(T.void, T.uint64, *[T.float32] * 2)
def st2_f32(builder, address, a, b):
    """Store two float32 to global memory, at a multiple of 8 bytes."""
    _store(builder, address, [a, b])


# -- shared memory -------------------------------------------------------------------------


@intrinsic
def shared_address(typingctx, array):
    """Return the address of a shared array in shared memory's own space."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(I32, SHARED)), I64)

    return T.uint64(array), codegen


def shared_load(builder, address, offset, element, n):
    """Emit one load of ``n`` values of 4 bytes from shared memory, at a multiple of its size."""
    at = builder.add(address, I64(offset))
    return _elements(builder, _load(builder, at, ir.VectorType(element, n), 4 * n, SHARED))


@instruction(T.UniTuple(T.uint32, 4), T.uint64)
def lds4_u32(builder, address):
    """Load four words from shared memory, at a multiple of 16 bytes."""
    return shared_load(builder, address, 0, I32, 4)


@instruction(T.void, T.uint64, *[T.uint32] * 4)
def sts4_u32(builder, address, a, b, c, d):
    """Store four words to shared memory, at a multiple of 16 bytes."""
    _store(builder, address, [a, b, c, d], SHARED)


@instruction(T.void, T.uint64, *[T.float32] * 2)
def sts2_f32(builder, address, a, b):
    """Store two float32 to shared memory, at a multiple of 8 bytes."""
    _store(builder, address, [a, b], SHARED)


@instruction(T.void, T.uint64, T.float32)
def sts_f32(builder, address, value):
    """Store a float32 to shared memory."""
    _store(builder, address, [value], SHARED)


# -- arithmetic ----------------------------------------------------------------------------


def _assembly(builder, text, constraints, result, *values, side_effect=False):
    function = ir.FunctionType(result, [value.type for value in values])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=side_effect), values)


@instruction(T.uint64, T.uint64)
def keep(builder, value):
    """Return the value as something that must not be computed again: NVVM likes to do so in every turn of a loop."""
    return _assembly(builder, "mov.b64 $0, $1;", "=l,l", I64, value, side_effect=True)


def emit_dp4a(builder, a, b, c):
    """Emit c plus the dot product of four signed bytes."""
    return _assembly(builder, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", I32, a, b, c)


def emit_dp4a_fma(builder, a, b, c, factor, addend):
    """Emit ``dp4a(a, b, c)``, its bits taken as a float32, times ``factor`` plus ``addend``."""
    text = "{ .reg .b32 t; dp4a.s32.s32 t, $1, $2, $3; fma.rn.f32 $0, t, $4, $5; }"
    return _assembly(builder, text, "=f,r,r,r,f,f", F32, a, b, c, factor, addend)


@instruction(T.int32, T.uint32, T.uint32, T.int32)
def dp4a(builder, a, b, c):
    """Return c plus the dot product of four signed bytes."""
    return emit_dp4a(builder, a, b, c)


@instruction(T.uint32, *[T.uint32] * 3)
def prmt(builder, a, b, selector):
    """Return the four bytes of the pair (a, b) that the selector's nibbles name."""
    return _assembly(builder, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", I32, a, b, selector)


@instruction(T.uint32, *[T.uint32] * 3)
def funnel(builder, low, high, bits):
    """Return the word that starts ``bits`` into the pair (low, high)."""
    return _assembly(builder, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", I32, low, high, bits)


@instruction(T.float32, T.uint32)
def f16_to_f32(builder, bits):
    """Return the value of the lower 16 bits as an IEEE half."""
    return builder.fpext(builder.bitcast(builder.trunc(bits, I16), F16), F32)


@instruction(T.uint32, T.float32)
def f32_to_f16(builder, value):
    """Return the bits of the nearest IEEE half."""
    return builder.zext(builder.bitcast(builder.fptrunc(value, F16), I16), I32)


@instruction(T.float32, T.uint32)
def as_f32(builder, bits):
    """Return the float32 of the same bits."""
    return builder.bitcast(bits, F32)


@instruction(T.uint32, T.float32)
def as_u32(builder, value):
    """Return the bits of a float32."""
    return builder.bitcast(value, I32)


@instruction(T.uint32, T.uint32, T.uint32)
def udiv(builder, a, b):
    """Return a // b of unsigned words; b is not 0."""
    return builder.udiv(a, b)


@instruction(T.uint32, T.uint32, T.uint32)
def urem(builder, a, b):
    """Return a % b of unsigned words; b is not 0."""
    return builder.urem(a, b)
