# SPDX-License-Identifier: Apache-2.0
"""What a code is: the parameters of one vector code, and the presets built from two of them.

This table is the only place where a preset's code is written down. Page sizes, codebook files,
dispatch, the answers given to vLLM and the README's tables all derive from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

GainRule = Literal["norm", "preserve", "mse", "unbiased"]
"""How the stored norm is chosen from the norm n of x, the unit vector y and its decoded form v.

``norm``      n                      as published
``preserve``  n / |v|                the decoded vector has the norm of x
``mse``       n <y,v> / |v|^2        least squared error
``unbiased``  n / <y,v>              <x, decoded x> = |x|^2
"""

GAIN_NUMBERS: dict[GainRule, int] = {"norm": 0, "preserve": 1, "mse": 2, "unbiased": 3}
"""How kernels are told the rule; csrc/abi.h has the same numbers."""

StorageDtype = Literal["int8", "float16"]
PrefillMode = Literal["codes", "raw"]

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head dims whose codebooks ship with the package and whose kernels are tested."""

MAX_INDEX_BITS = 16

# (subvec_dim, num_codewords): fewest lists that lose less than 0.5 % of MSE and pay
# (benchmarks/bench_list.py). Codes that are not here compare with every row.
DEFAULT_NUM_LISTS = {(4, 1024): 1, (4, 4096): 1, (8, 4096): 1, (8, 65536): 4, (16, 4096): 1}


@dataclass(frozen=True)
class CodeSpec:
    """Parameters of one fixed-rate vector code.

    Attributes:
        subvec_dim: coordinates quantised at once; divides head_dim.
        num_codewords: N, a power of two from 2 to 65536.
        folded: the codebook is 2**subvec_dim sign patterns times N / 2**subvec_dim magnitudes.
        gain: rule for the stored norm.
        storage: precision the codebook is rounded to; encoder, oracle and kernels all read
            the rounded book.
        num_lists: coarse cells that encode searches (search.py), 0 to compare with every
            row; None for DEFAULT_NUM_LISTS. No part of the codebook, nor of what decodes.
    """

    subvec_dim: int
    num_codewords: int
    folded: bool = False
    gain: GainRule = "norm"
    storage: StorageDtype = "int8"
    num_lists: int | None = None

    def __post_init__(self) -> None:
        n, k = self.num_codewords, self.subvec_dim
        if not 1 <= k <= 64:
            raise ValueError(
                f"CodeSpec: subvec_dim must be from 1 to 64, got {k}; "
                "use 2, 4 or 8, for which kernels are tuned"
            )
        if n < 2 or n & (n - 1) or n > 1 << MAX_INDEX_BITS:
            raise ValueError(
                f"CodeSpec: num_codewords must be a power of two from 2 to 65536, got {n}; "
                "use 16, 64, 256, 1024, 4096 or 65536"
            )
        if self.folded and n >> k < 2:
            raise ValueError(
                f"CodeSpec: a sign-folded code needs num_codewords of at least 2**(subvec_dim+1) "
                f"= {2 << k}, got {n}; set folded to false"
            )
        if self.gain not in get_args(GainRule):
            raise ValueError(
                f"CodeSpec: gain must be one of {', '.join(get_args(GainRule))}, got {self.gain!r}"
            )
        if self.storage not in get_args(StorageDtype):
            raise ValueError(
                f"CodeSpec: storage must be one of {', '.join(get_args(StorageDtype))}, "
                f"got {self.storage!r}"
            )
        if self.num_lists is not None and not 0 <= self.num_lists <= self.num_cells:
            raise ValueError(
                f"CodeSpec: num_lists must be from 0 to {self.num_cells} for {self.num_rows} rows, "
                f"got {self.num_lists}; leave it out for the default"
            )

    @property
    def index_bits(self) -> int:
        return self.num_codewords.bit_length() - 1

    @property
    def num_rows(self) -> int:
        """Rows of the stored table: codewords, or magnitudes of a folded code."""
        return self.num_codewords >> self.subvec_dim if self.folded else self.num_codewords

    @property
    def num_cells(self) -> int:
        """Coarse cells of a list search: about the square root of the number of rows."""
        return 1 << (self.num_rows.bit_length() - 1) // 2

    @property
    def lists_searched(self) -> int:
        """`num_lists` with the default filled in."""
        if self.num_lists is not None:
            return self.num_lists
        shape = self.subvec_dim, self.num_codewords
        return 0 if self.folded else DEFAULT_NUM_LISTS.get(shape, 0)

    @property
    def rate(self) -> float:
        """Index bits per coordinate."""
        return self.index_bits / self.subvec_dim

    def num_subvecs(self, head_dim: int) -> int:
        if head_dim % self.subvec_dim:
            raise ValueError(
                f"CodeSpec: subvec_dim must divide head_dim, got subvec_dim {self.subvec_dim} "
                f"and head_dim {head_dim}; choose another preset"
            )
        return head_dim // self.subvec_dim

    def index_bytes(self, head_dim: int) -> int:
        """Bytes of the packed indices of one vector, without the norm."""
        return math.ceil(self.num_subvecs(head_dim) * self.index_bits / 8)

    @property
    def name(self) -> str:
        """Short name used in file names and tables, e.g. ``k4n4096f``."""
        return f"k{self.subvec_dim}n{self.num_codewords}{'f' if self.folded else ''}"


@dataclass(frozen=True)
class Preset:
    """A key code, a value code and the seed of the rotation they share."""

    name: str
    key: CodeSpec
    value: CodeSpec
    rotation_seed: int = 0

    def with_overrides(self, options: dict[str, Any]) -> Preset:
        """A copy with ``key``, ``value`` (fields of CodeSpec) and ``rotation_seed`` replaced.

        Raises:
            ValueError: a bad value, naming it.
        """
        changes: dict[str, Any] = {}
        for side in ("key", "value"):
            if side in options:
                try:
                    changes[side] = replace(getattr(self, side), **options[side])
                except TypeError as error:
                    raise ValueError(
                        f"fibquant options: {side} must be an object with fields of a code "
                        f"(subvec_dim, num_codewords, folded, gain, storage, num_lists), "
                        f"got {options[side]!r}"
                    ) from error
        if "rotation_seed" in options:
            seed = options["rotation_seed"]
            if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
                raise ValueError(
                    f"fibquant options: rotation_seed must be an integer of at least 0, "
                    f"got {seed!r}"
                )
            changes["rotation_seed"] = seed
        return replace(self, **changes)


def _key(k: int, n: int, folded: bool = False, storage: StorageDtype = "int8") -> CodeSpec:
    return CodeSpec(k, n, folded, "mse", storage)


def _value(k: int, n: int, folded: bool = False, storage: StorageDtype = "int8") -> CodeSpec:
    return CodeSpec(k, n, folded, "unbiased", storage)


# k = 2 is stored as float16: its int8 rounding costs 0.3 % of MSE, the others' below 0.1 %.
_K5 = _key(2, 1024, folded=True, storage="float16")
_K4, _V4 = _key(2, 256, storage="float16"), _value(2, 256, storage="float16")
_K3, _V3 = _key(4, 4096, folded=True), _value(4, 4096, folded=True)
_K2, _V2 = _key(4, 256), _value(4, 256)
_K1, _V1 = _key(8, 256), _value(8, 256)

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("fibquant_4bit", _K4, _V4),
        Preset("fibquant_3bit", _K3, _V3),
        Preset("fibquant_2bit", _K2, _V2),
        Preset("fibquant_1bit", _K1, _V1),
        # Errors of keys cost far more than errors of values: at equal bytes k5v3 is better than
        # 4bit, k4v2 than 3bit and k3v1 than 2bit (`make eval`).
        Preset("fibquant_k5v4", _K5, _V4),
        Preset("fibquant_k5v3", _K5, _V3),
        Preset("fibquant_k4v3", _K4, _V3),
        Preset("fibquant_k4v2", _K4, _V2),
        Preset("fibquant_k3v2", _K3, _V2),
        Preset("fibquant_k3v1", _K3, _V1),
        Preset("fibquant_k2v3", _K2, _V3),
    )
}

DEFAULT_PRESET = "fibquant_3bit"
PRESETS["fibquant"] = replace(PRESETS[DEFAULT_PRESET], name="fibquant")


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none; lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(
            f"kv_cache_dtype must be one of {', '.join(PRESETS)}, got {name!r}"
        ) from None


def is_fibquant(name: str | None) -> bool:
    """Whether a --kv-cache-dtype value is one of ours."""
    return isinstance(name, str) and name in PRESETS
