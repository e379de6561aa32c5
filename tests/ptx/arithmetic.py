# SPDX-License-Identifier: Apache-2.0
"""What instructions without memory compute, on arrays with one element a thread.

Written from the PTX ISA. Unsigned and signed integers wrap, shifts beyond the width give 0 (or the
sign), minimum and maximum give the other operand where one is NaN. Two things are not as exact as
on a GPU: fma rounds twice in rare cases, and approximations are better than they need to be.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TYPES: dict[str, type] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip
WIDE = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}
_LEAST_NORMAL = np.float32(1.17549435e-38)


def wide(x):
    return x.astype(WIDE[x.dtype.type])


def _bits(x) -> int:
    return x.dtype.itemsize * 8


def _divide(a, b):
    """Towards zero; by zero, all bits."""
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = a // safe
    if a.dtype.kind == "i":  # NumPy rounds down
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(
        b == 0, np.full_like(b, -1 if a.dtype.kind == "i" else ~b.dtype.type(0)), quotient
    )


def _shift_left(a, count):
    return np.where(count < _bits(a), a << (count % _bits(a)).astype(a.dtype), a.dtype.type(0))


def _shift_right(a, count):
    return (
        a >> np.minimum(count, _bits(a) - 1).astype(a.dtype)
        if a.dtype.kind == "i"
        else (np.where(count < _bits(a), a >> (count % _bits(a)).astype(a.dtype), a.dtype.type(0)))
    )


def _funnel(low, high, count, left: bool):
    both = wide(high) << np.uint64(32) | wide(low)
    count = wide(count & np.uint32(31))
    return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)


def _insert_bits(a, b, begin, count):
    kind, size, one = b.dtype.type, _bits(b), np.uint64(1)
    begin, count = (np.minimum(wide(x & np.uint32(255)), np.uint64(size)) for x in (begin, count))

    def moved(x, by):  # by as many bits as there are: nothing is left
        return np.where(by < 64, x << np.minimum(by, np.uint64(63)), np.uint64(0))

    mask = moved(moved(one, count) - one, begin).astype(kind)
    return moved(a.astype(np.uint64), begin).astype(kind) & mask | b & ~mask


def _permute_bytes(a, b, selector):
    both, out = wide(b) << np.uint64(32) | wide(a), np.uint64(0)
    for i in range(4):
        nibble = wide(selector) >> np.uint64(4 * i)
        byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        out = out | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def _dot_two(a, b, c):
    """dp2a.lo: both 16-bit halves of a times the two lower bytes of b, plus c."""
    low, high = (a & np.uint32(0xFFFF)) * (b & np.uint32(255)), a >> 16
    return low + high * (b >> np.uint32(8) & np.uint32(255)) + c


def _flushed(function: Callable):
    """With .ftz: subnormal numbers count as zeros of their sign, in and out."""

    def flush(x):
        return np.where(np.abs(x) < _LEAST_NORMAL, np.copysign(np.float32(0), x), x)

    return lambda x: flush(function(flush(x)).astype(np.float32))


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


# By opcode without its type: (result, sources, function). t: the type, w: of twice its width,
# u: 32 bits unsigned, p: a predicate.
FUNCTIONS: dict[str, tuple[str, str, Callable]] = {
    "mov": ("t", "t", lambda a: a),
    "add": ("t", "tt", np.add),
    "sub": ("t", "tt", np.subtract),
    "mul": ("t", "tt", np.multiply),
    "mul.lo": ("t", "tt", np.multiply),
    "mul.wide": ("w", "tt", lambda a, b: wide(a) * wide(b)),
    "mul.hi": ("t", "tt", lambda a, b: (wide(a) * wide(b) >> _bits(a)).astype(a.dtype)),
    "mad.lo": ("t", "ttt", lambda a, b, c: a * b + c),
    "fma.rn": ("t", "ttt", _fma),
    "div": ("t", "tt", _divide),
    "div.rn": ("t", "tt", np.divide),
    "rem": ("t", "tt", lambda a, b: a - _divide(a, b) * b),
    "neg": ("t", "t", np.negative),
    "abs": ("t", "t", np.abs),
    "min": ("t", "tt", np.fmin),
    "max": ("t", "tt", np.fmax),
    "and": ("t", "tt", np.bitwise_and),
    "or": ("t", "tt", np.bitwise_or),
    "xor": ("t", "tt", np.bitwise_xor),
    "not": ("t", "t", np.invert),
    "shl": ("t", "tu", _shift_left),
    "shr": ("t", "tu", _shift_right),
    "shf.l.wrap": ("t", "ttu", lambda a, b, c: _funnel(a, b, c, True)),
    "shf.r.wrap": ("t", "ttu", lambda a, b, c: _funnel(a, b, c, False)),
    "bfi": ("t", "ttuu", _insert_bits),
    "prmt": ("t", "ttu", _permute_bytes),
    "dp2a.lo.u32": ("t", "ttt", _dot_two),
    "selp": ("t", "ttp", lambda a, b, p: np.where(p, a, b)),
    "rcp.rn": ("t", "t", lambda a: np.float32(1) / a),
    "sqrt.rn": ("t", "t", np.sqrt),
    "ex2.approx.ftz": ("t", "t", _flushed(np.exp2)),
    "rcp.approx.ftz": ("t", "t", _flushed(lambda a: np.float32(1) / a)),
}

_ORDERED: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(name: str, is_float: bool) -> Callable | None:
    """The function of setp's comparison; None if there is none of this name."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if is_float and name.endswith("u") and name[:-1] in _ORDERED:
        compare = _ORDERED[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _ORDERED.get(name)


def halves(high, low):
    """cvt.rn.f16x2.f32: two float16 in one register."""
    with np.errstate(all="ignore"):
        bits = [x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (high, low)]
    return bits[0] << np.uint32(16) | bits[1]
