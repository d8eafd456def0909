"""Decodes quantised weight types: source text for one unit of a row, shared by both matrix products.

A *unit* is what one lane decodes at a time: 16 bytes of quants, which are 16 values (Q8_0) or 32. Its text reads
``wrow`` (address of the row) and ``u`` (index of the unit), and makes words of four signed bytes each, in the order of
the activations. Types whose blocks are not a multiple of 4 bytes are read as aligned words and shifted together: one
load more than words, and half as many as with 16-bit loads.
"""

from __future__ import annotations

from dataclasses import dataclass

Text = list[str]

NIBBLES = "u32(0x0F0F0F0F)"
#: the sixteen values of MXFP4, twice what they stand for, as four words of bytes: positive, then negative
FP4_POSITIVE = ("u32(0x03020100)", "u32(0x0C080604)")
FP4_NEGATIVE = ("u32(0xFDFEFF00)", "u32(0xF4F8FAFC)")


def aim(name: str, address: str, n: int) -> Text:
    """Find the ``n + 1`` aligned words that hold ``n`` words at any address, and how many bits they are off."""
    return [
        f"{name}_at = {address}",
        f"{name}_bits = u32(u32({name}_at) << u32(3))",
        f"{name}_low = {name}_at & u64(0xFFFFFFFFFFFFFFFC)",
        # the aligned word that holds the last byte: memory is handed out in multiples of it
        f"{name}_last = ({name}_at + u64({4 * n - 1})) & u64(0xFFFFFFFFFFFFFFFC)",
    ]


def fetch(name: str, n: int, off: str) -> Text:
    """Load the words that `aim` found, ``off`` bytes (a multiple of 4) further on."""
    return [
        *(f"{name}r{k} = ld_u32({name}_low + {off} + u64({4 * k}))" for k in range(n)),
        f"{name}r{n} = ld_u32({name}_last + {off})",
    ]


def shift_together(name: str, n: int) -> Text:
    """Make ``name0 .. name{n-1}`` of what `fetch` loaded."""
    return [f"{name}{k} = funnel({name}r{k}, {name}r{k + 1}, {name}_bits)" for k in range(n)]


@dataclass(frozen=True)
class Group:
    """Words of one unit that meet the same block of 32 activations.

    Attributes
    ----------
    words : tuple of str
        Names of 4 words (half a block) or 8.
    block, half : str
        Index of the block in the row, and which half of it; empty if all of it.
    scale : str
        Name of the factor.
    """

    words: tuple[str, ...]
    block: str
    half: str
    scale: str


@dataclass(frozen=True)
class Unit:
    """Source text that decodes one unit.

    Attributes
    ----------
    aim, load : list of str
        Addresses, and the loads from them; neither waits for a load. The loads add ``off`` bytes.
    decode : list of str
        Makes words and scales of what was loaded.
    groups : list of Group
    offset : int
        Offset of every quant.
    minimum : str
        Name of what is added for each activation (of one of the blocks, where a unit meets two); empty if there is
        none.
    """

    aim: Text
    load: Text
    decode: Text
    groups: list[Group]
    offset: int = 0
    minimum: str = ""


@dataclass(frozen=True)
class Format:
    """A weight type.

    Attributes
    ----------
    block_values, block_bytes : int
    unit_values : int
        Values of a unit.
    tile : str
        How a tile's stage of two blocks is shared out: ``block`` (one a lane), ``half`` (half a block a lane),
        ``pair`` (half of both blocks a lane), ``q6`` (the same of two blocks that are two apart, with a factor for each
        half).
    """

    name: str
    block_values: int
    block_bytes: int
    unit_values: int
    tile: str

    def is_steady(self, n_block: int) -> bool:
        """Whether ``n_block`` blocks further on the addresses are off a multiple of 4 by as much."""
        return self.block_values == 32 and n_block * self.block_bytes % 4 == 0

    def unit(self, p: str = "") -> Unit:
        """Return the text of one unit; ``p`` makes its names unique."""
        return _UNITS[self.name](p)


def _names(p: str, base: str, n: int) -> tuple[str, ...]:
    return tuple(f"{p}{base}{k}" for k in range(n))


def _nibbles(p: str) -> Text:
    low = [f"{p}l{k} = u32({p}q{k} & {NIBBLES})" for k in range(4)]
    return low + [f"{p}h{k} = u32(u32({p}q{k} >> u32(4)) & {NIBBLES})" for k in range(4)]


def _block_group(p: str) -> list[Group]:
    return [Group(_names(p, "l", 4) + _names(p, "h", 4), f"{p}u", "", f"{p}d")]


def _q8_0(p: str) -> Unit:
    aims = [
        f"{p}at = {p}wrow + u64({p}u >> u32(1)) * u64(34)",
        *aim(f"{p}q", f"{p}at + u64(2) + u64(u32({p}u & u32(1)) * u32(16))", 4),
    ]
    load = [f"{p}dr = u32(ld_u16({p}at + off))", *fetch(f"{p}q", 4, "off")]
    decode = [f"{p}d = f16_to_f32({p}dr)", *shift_together(f"{p}q", 4)]
    group = Group(_names(p, "q", 4), f"u32({p}u >> u32(1))", f"u32({p}u & u32(1))", f"{p}d")
    return Unit(aims, load, decode, [group])


def _q4_0(p: str) -> Unit:
    aims = [f"{p}at = {p}wrow + u64({p}u) * u64(18)", *aim(f"{p}q", f"{p}at + u64(2)", 4)]
    load = [f"{p}dr = u32(ld_u16({p}at + off))", *fetch(f"{p}q", 4, "off")]
    decode = [f"{p}d = f16_to_f32({p}dr)", *shift_together(f"{p}q", 4), *_nibbles(p)]
    return Unit(aims, load, decode, _block_group(p), offset=8)


def _q4_1(p: str) -> Unit:
    load = [
        f"{p}dr = ld_u32({p}at + off)",
        *(f"{p}q{k} = ld_u32({p}at + off + u64({4 + 4 * k}))" for k in range(4)),
    ]
    decode = [f"{p}d = f16_to_f32({p}dr)", f"{p}m = f16_to_f32(u32({p}dr >> u32(16)))", *_nibbles(p)]
    return Unit([f"{p}at = {p}wrow + u64({p}u) * u64(20)"], load, decode, _block_group(p), minimum=f"{p}m")


def _q5_0(p: str) -> Unit:
    aims = [f"{p}at = {p}wrow + u64({p}u) * u64(22)", *aim(f"{p}f", f"{p}at + u64(2)", 5)]
    load = [f"{p}dr = u32(ld_u16({p}at + off))", *fetch(f"{p}f", 5, "off")]
    # the fifth bits lie together in the first word: a product puts bit j of four into bit 4 of byte j
    decode = [f"{p}d = f16_to_f32({p}dr)", *shift_together(f"{p}f", 5)]
    for k in range(4):
        for half, shift in (("l", 4 * k), ("h", 16 + 4 * k)):
            nibble = f"{p}f{k + 1}" if half == "l" else f"u32({p}f{k + 1} >> u32(4))"
            bits = f"u32(u32(u32({p}f0 >> u32({shift})) & u32(15)) * u32(0x02040810))"
            decode.append(f"{p}{half}{k} = u32(u32({nibble} & {NIBBLES}) | u32({bits} & u32(0x10101010)))")
    return Unit(aims, load, decode, _block_group(p), offset=16)


def _mxfp4(p: str) -> Unit:
    aims = [f"{p}at = {p}wrow + u64({p}u) * u64(17)", *aim(f"{p}q", f"{p}at + u64(1)", 4)]
    load = [f"{p}dr = u32(ld_u8({p}at + off))", *fetch(f"{p}q", 4, "off")]
    decode = [
        # half of 2 ** (e - 127): the table holds doubled values; below 2 it is a subnormal
        f"{p}d = as_f32(u32(u32({p}dr - u32(1)) << u32(23)) if {p}dr >= u32(2) else u32(u32(0x00200000) << {p}dr))",
        *shift_together(f"{p}q", 4),
    ]
    for k in range(4):
        q, m, s = f"{p}q{k}", f"{p}m{k}", f"{p}s{k}"
        decode += [f"{m} = u32({q} & u32(0x77777777))", f"{s} = u32(u32({q} & u32(0x88888888)) >> u32(1))"]
        # a selector of the positive (0 .. 3) or the negative byte (4 .. 7) of each pair
        decode += [f"{s} = u32({s} | u32(0x32103210))"]
        for i, shift in ((0, ""), (1, " >> u32(16)")):
            plus = f"prmt({', '.join(FP4_POSITIVE)}, u32({m}{shift}))"
            minus = f"prmt({', '.join(FP4_NEGATIVE)}, u32({m}{shift}))"
            decode += [f"{p}r{i} = prmt({plus}, {minus}, u32({s}{shift}))"]
        decode += [
            f"{p}l{k} = prmt({p}r0, {p}r1, u32(0x6420))",
            f"{p}h{k} = prmt({p}r0, {p}r1, u32(0x7531))",
        ]
    return Unit(aims, load, decode, _block_group(p))


def _k_scales(p: str) -> Text:
    """Scales and minima of sub-blocks 2j and 2j + 1, packed in 6 bits each, as pairs of bytes."""
    return [
        f"{p}j = u32(u32({p}u >> u32(1)) & u32(3))",
        f"{p}sh = u32(u32({p}j & u32(1)) << u32(4))",
        f"{p}sa = u32({p}w1 >> {p}sh)",
        f"{p}sb = u32({p}w2 >> {p}sh)",
        f"{p}sc = u32({p}w3 >> {p}sh)",
        f"{p}hs = u32(u32({p}sc & u32(0x0F0F)) | u32(u32({p}sa >> u32(2)) & u32(0x3030)))",
        f"{p}hm = u32(u32(u32({p}sc >> u32(4)) & u32(0x0F0F)) | u32(u32({p}sb >> u32(2)) & u32(0x3030)))",
        f"{p}scales = u32({p}sa & u32(0x3F3F)) if {p}j < u32(2) else {p}hs",
        f"{p}minima = u32({p}sb & u32(0x3F3F)) if {p}j < u32(2) else {p}hm",
        f"{p}dd = f16_to_f32({p}w0)",
        f"{p}d0 = {p}dd * f32(u32({p}scales & u32(0xFF)))",
        f"{p}d1 = {p}dd * f32(u32({p}scales >> u32(8)))",
        # each half of a pair of blocks takes care of one of its two minima
        f"{p}mn = u32(u32({p}minima >> u32({p}half << u32(3))) & u32(0xFF))",
        f"{p}m = -f16_to_f32(u32({p}w0 >> u32(16))) * f32({p}mn)",
    ]


def _k_groups(p: str) -> list[Group]:
    first = f"u32({p}u & u32(0xFFFFFFFE))"
    return [
        Group(_names(p, "l", 4), first, f"{p}half", f"{p}d0"),
        Group(_names(p, "h", 4), f"u32({first} + u32(1))", f"{p}half", f"{p}d1"),
    ]


def _q4_k(p: str) -> Unit:
    aims = [f"{p}half = u32({p}u & u32(1))", f"{p}at = {p}wrow + u64({p}u >> u32(3)) * u64(144)"]
    load = [
        f"{', '.join(_names(p, 'w', 4))} = ld4_u32({p}at)",
        f"{', '.join(_names(p, 'q', 4))} = ld4_u32({p}at + u64(16) + u64(u32({p}u & u32(7)) * u32(16)))",
    ]
    return Unit(aims, load, [*_k_scales(p), *_nibbles(p)], _k_groups(p), minimum=f"{p}m")


def _q5_k(p: str) -> Unit:
    aims = [f"{p}half = u32({p}u & u32(1))", f"{p}at = {p}wrow + u64({p}u >> u32(3)) * u64(176)"]
    load = [
        f"{', '.join(_names(p, 'w', 4))} = ld4_u32({p}at)",
        f"{', '.join(_names(p, 'b', 4))} = ld4_u32({p}at + u64(16) + u64(u32({p}u & u32(1)) * u32(16)))",
        f"{', '.join(_names(p, 'q', 4))} = ld4_u32({p}at + u64(48) + u64(u32({p}u & u32(7)) * u32(16)))",
    ]
    decode = [*_k_scales(p), f"{p}bs = u32({p}j << u32(1))"]
    for k in range(4):
        decode += [
            f"{p}c{k} = u32({p}b{k} >> {p}bs)",
            f"{p}l{k} = u32(u32({p}q{k} & {NIBBLES}) | u32(u32({p}c{k} << u32(4)) & u32(0x10101010)))",
            f"{p}h{k} = u32(u32(u32({p}q{k} >> u32(4)) & {NIBBLES}) | u32(u32({p}c{k} << u32(3)) & u32(0x10101010)))",
        ]
    return Unit(aims, load, decode, _k_groups(p), minimum=f"{p}m")


def _q6_k(p: str) -> Unit:
    """Return a unit of 16 bytes of low bits: half of block ``4n + t`` in the lower nibbles, of the next but one above.

    Everything in a block of 210 bytes lies a multiple of 16 from its start, so that one shift serves all; the aligned
    word behind either run of quants is in the block still.
    """
    aims = [
        f"{p}at = {p}wrow + u64({p}u >> u32(3)) * u64(210)",
        f"{p}c = u32({p}u & u32(7))",
        f"{p}n = u32({p}c >> u32(2))",
        f"{p}t = u32(u32({p}c >> u32(1)) & u32(1))",
        f"{p}half = u32({p}u & u32(1))",
        f"{p}sat = {p}at + u64(u32(192) + u32({p}n * u32(8)) + u32({p}t * u32(2)) + {p}half)",
        f"{p}bits = u32(u32({p}at) << u32(3))",
        f"{p}low = {p}at & u64(0xFFFFFFFFFFFFFFFC)",
        f"{p}qat = {p}low + u64({p}c * u32(16))",
        f"{p}bat = {p}low + u64(u32(128) + u32({p}n * u32(32)) + u32({p}half * u32(16)))",
    ]
    load = [
        f"{p}dr = u32(ld_u16({p}at + u64(208)))",
        f"{p}s0 = ld_u8({p}sat)",
        f"{p}s1 = ld_u8({p}sat + u64(4))",
        *(f"{p}{x}r{k} = ld_u32({p}{x}at + u64({4 * k}))" for x in "qb" for k in range(5)),
    ]
    decode = [
        f"{p}dd = f16_to_f32({p}dr)",
        f"{p}d0 = {p}dd * f32(i8({p}s0))",
        f"{p}d1 = {p}dd * f32(i8({p}s1))",
        f"{p}bs = u32({p}t << u32(1))",
    ]
    for k in range(4):
        decode += [
            f"{p}q{k} = funnel({p}qr{k}, {p}qr{k + 1}, {p}bits)",
            f"{p}c{k} = u32(funnel({p}br{k}, {p}br{k + 1}, {p}bits) >> {p}bs)",
            f"{p}l{k} = u32(u32({p}q{k} & {NIBBLES}) | u32(u32({p}c{k} << u32(4)) & u32(0x30303030)))",
            f"{p}h{k} = u32(u32(u32({p}q{k} >> u32(4)) & {NIBBLES}) | u32({p}c{k} & u32(0x30303030)))",
        ]
    block = f"u32(u32(u32({p}u >> u32(3)) << u32(3)) + u32(u32({p}n << u32(2)) + {p}t))"
    return Unit(
        aims,
        load,
        decode,
        [
            Group(_names(p, "l", 4), block, f"{p}half", f"{p}d0"),
            Group(_names(p, "h", 4), f"u32({block} + u32(2))", f"{p}half", f"{p}d1"),
        ],
        offset=32,
    )


_UNITS = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q4_K": _q4_k,
    "q5_K": _q5_k,
    "q6_K": _q6_k,
    "mxfp4": _mxfp4,
}

FORMATS = {
    f.name: f
    for f in (
        Format("q8_0", 32, 34, 16, "half"),
        Format("q4_0", 32, 18, 32, "block"),
        Format("q4_1", 32, 20, 32, "block"),
        Format("q5_0", 32, 22, 32, "block"),
        Format("mxfp4", 32, 17, 32, "block"),
        Format("q4_K", 256, 144, 32, "pair"),
        Format("q5_K", 256, 176, 32, "pair"),
        Format("q6_K", 256, 210, 32, "q6"),
    )
}
