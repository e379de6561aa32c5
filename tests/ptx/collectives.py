# SPDX-License-Identifier: Apache-2.0
"""Products and transposes of a warp, with the fragment layouts of the PTX ISA.

Transcribed from its tables for m16n8k16 and movmatrix: lane = 4 * group + place; element i of a
fragment is half i % 2 of its register i / 2.
"""

from __future__ import annotations

import numpy as np

_LANE = np.arange(32)[:, None]
_GROUP, _PLACE = _LANE // 4, _LANE % 4
_I8, _I4 = np.arange(8)[None], np.arange(4)[None]
# Of A [16, 16]: elements 0, 1, 4 and 5 are in row `group`, the others 8 below.
_A = (_GROUP + np.where(_I8 % 4 < 2, 0, 8), _PLACE * 2 + _I8 % 2 + np.where(_I8 < 4, 0, 8))
_B = (_PLACE * 2 + _I4 % 2 + np.where(_I4 < 2, 0, 8), _GROUP + 0 * _I4)  # of B [16, 8]
_C = (_GROUP + np.where(_I4 < 2, 0, 8), _PLACE * 2 + _I4 % 2)  # of C and D [16, 8]


def _by_warp(registers) -> np.ndarray:
    """[warps, 32, registers]"""
    return np.stack(np.broadcast_arrays(*registers), -1).reshape(-1, 32, len(registers))


def multiply(a, b, c) -> list[np.ndarray]:
    """D = A B + C of every warp: registers [threads] of two float16 (A, B), one float32 (C, D)."""
    a_regs, b_regs, c_regs = _by_warp(a), _by_warp(b), _by_warp(c)
    warps = len(a_regs)
    full_a, full_b = np.empty((warps, 16, 16), np.float32), np.empty((warps, 16, 8), np.float32)
    full_c = np.empty((warps, 16, 8), np.float32)
    full_a[:, _A[0], _A[1]] = a_regs.view(np.float16)
    full_b[:, _B[0], _B[1]] = b_regs.view(np.float16)
    full_c[:, _C[0], _C[1]] = c_regs
    out = (full_c + full_a @ full_b)[:, _C[0], _C[1]]
    return [np.ascontiguousarray(out[:, :, i]).reshape(-1) for i in range(4)]


def transpose(x: np.ndarray) -> np.ndarray:
    """movmatrix .trans: lane 4 r + i holds columns 2 i and 2 i + 1 of row r of an 8 x 8 matrix."""
    matrices = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(-1).view(np.uint32)
