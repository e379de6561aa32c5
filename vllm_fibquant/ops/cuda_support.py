# SPDX-License-Identifier: Apache-2.0
"""What a CUDA library has kernels for, as it says itself (csrc/cuda/supported.h)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fibquant.codec.codec import KVCodec

NARROW_COLUMNS = 8
"""Rows of a narrow row block."""


@dataclass(frozen=True)
class Support:
    """What a library has kernels for, as csrc/cuda/supported.h says.

    Attributes:
        wide_columns: by head_dim, the query rows that share a decoded token in a wide row block.
        codes: name by (subvec_dim, index_bits, folded).
        pairs: (key code, value code) with decode kernels of their own; any other pair of codes
            takes one that finds out at run time.
    """

    wide_columns: dict[int, int]
    codes: dict[tuple[int, int, bool], str]
    pairs: frozenset[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> Support:
        rows = [line.split() for line in text.splitlines()]
        codes = [row[1:] for row in rows if row[0] == "code"]
        name_of = {kind: name for kind, name, *_ in codes}
        return cls(
            {int(row[1]): int(row[2]) for row in rows if row[0] == "head_dim"},
            {(int(dim), int(bits), folded == "1"): name for _, name, dim, bits, folded in codes},
            frozenset((name_of[row[1]], name_of[row[2]]) for row in rows if row[0] == "pair"),
        )

    def unsupported(self, codec: KVCodec) -> str | None:
        """Why there is no kernel for this codec, or None when there is one."""
        if codec.head_dim not in self.wide_columns:
            known = ", ".join(map(str, self.wide_columns))
            return f"head_dim must be one of {known} for the CUDA library, got {codec.head_dim}"
        for side, code in (("key", codec.key), ("value", codec.value)):
            spec = code.spec
            if (spec.subvec_dim, spec.index_bits, spec.folded) not in self.codes:
                known = ", ".join(self.codes.values())
                return (
                    f"the {side} code must be one of {known} for the CUDA library, got {spec.name}"
                )
        return None
