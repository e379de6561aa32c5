# SPDX-License-Identifier: Apache-2.0
"""Vector to code and back, in plain PyTorch: the oracle every kernel must equal.

encode   x -> n = |x|, y = rotation x / n -> nearest codeword per subvector -> stored norm
decode   indices -> codewords -> times norm -> rotated back
"""

from __future__ import annotations

import functools

import torch

from vllm_fibquant.codec.codebook import Codebook, load_codebook
from vllm_fibquant.codec.config import MAX_INDEX_BITS, CodeSpec, Preset, get_preset
from vllm_fibquant.codec.layout import NORM_BYTES, RecordLayout
from vllm_fibquant.codec.rotation import Rotation, make_rotation
from vllm_fibquant.codec.search import (
    CodewordLists,
    codeword_lists,
    nearest_listed_rows,
    nearest_rows,
)

MAX_NORM = 65504.0
"""Largest finite float16: stored norms saturate here."""

MIN_COSINE = 0.25
"""Least <y,v> the unbiased gain divides by: below one bit it would explode."""

_MIN_NORMAL = torch.finfo(torch.float32).tiny


def pack_indices(indices: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Pack indices into bytes, least significant bit first.

    Index i occupies bits [i*b, (i+1)*b) of the field, b = index_bits, where bit 0 is the least
    significant bit of byte 0. Unused bits of the last byte are 0.

    Args:
        indices: any integer dtype `[..., n]`, each below 2**index_bits.
        index_bits: 1 to 16.

    Returns:
        uint8 `[..., ceil(n * index_bits / 8)]`.

    Raises:
        ValueError: index_bits out of range.
    """
    _check_index_bits("pack_indices", index_bits)
    shifts = torch.arange(index_bits, device=indices.device)
    bits = (indices.to(torch.int64).unsqueeze(-1) >> shifts) & 1  # [..., n, index_bits]
    bits = bits.flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)


def unpack_indices(packed: torch.Tensor, n: int, index_bits: int) -> torch.Tensor:
    """Inverse of `pack_indices`.

    Args:
        packed: uint8 `[..., ceil(n * index_bits / 8)]`.
        n: number of indices.
        index_bits: 1 to 16.

    Returns:
        int32 `[..., n]`.

    Raises:
        ValueError: index_bits out of range, or the last axis of `packed` has another size.
    """
    _check_index_bits("unpack_indices", index_bits)
    expected = -(-n * index_bits // 8)
    if packed.shape[-1] != expected:
        raise ValueError(
            f"unpack_indices: the last axis of packed must be {expected} bytes for {n} indices "
            f"of {index_bits} bits, got {packed.shape[-1]}; slice the index field first"
        )
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device).to(torch.uint8)) & 1
    bits = bits.flatten(-2)[..., : n * index_bits].unflatten(-1, (n, index_bits))
    return (bits.to(torch.int32) << torch.arange(index_bits, device=packed.device)).sum(
        -1, dtype=torch.int32
    )


def _check_index_bits(function: str, index_bits: int) -> None:
    if not 1 <= index_bits <= MAX_INDEX_BITS:
        raise ValueError(
            f"{function}: index_bits must be from 1 to {MAX_INDEX_BITS}, got {index_bits}; "
            "use CodeSpec.index_bits"
        )


def pack_norms(norms: torch.Tensor) -> torch.Tensor:
    """Norms float16 `[...]` to their bytes: uint8 `[..., NORM_BYTES]`."""
    return norms.unsqueeze(-1).contiguous().view(torch.uint8)


def unpack_norms(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_norms`; a copy, as norms in a record may not be aligned for their dtype."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(-1)


class VectorCodec:
    """One code: a spec, its codebook and the rotation.

    Attributes:
        spec, head_dim, codebook, rotation: as given.
        codewords: float32 `[num_codewords, subvec_dim]`, signs expanded for a folded code.
        num_lists: coarse cells that encode searches, 0 when it compares with every row.
        lists: the cells and their lists, or None.
    """

    def __init__(
        self, spec: CodeSpec, head_dim: int, codebook: Codebook, rotation: Rotation
    ) -> None:
        if codebook.head_dim != head_dim or rotation.head_dim != head_dim:
            raise ValueError(
                f"VectorCodec: codebook and rotation must be for head_dim {head_dim}, got "
                f"{codebook.head_dim} and {rotation.head_dim}; load them for this head_dim"
            )
        if not codebook.serves(spec):
            raise ValueError(
                f"VectorCodec: codebook must be of code {spec.name} in {spec.storage}, got "
                f"{codebook.spec.name} in {codebook.spec.storage}; load it with load_codebook"
            )
        self.spec = spec
        self.head_dim = head_dim
        self.num_subvecs = spec.num_subvecs(head_dim)
        self.codebook = codebook
        self.rotation = rotation
        self.codewords = codebook.codewords()
        self.num_lists = spec.lists_searched
        self.lists: CodewordLists | None = codeword_lists(codebook) if self.num_lists else None

    @classmethod
    def from_spec(cls, spec: CodeSpec, head_dim: int, rotation_seed: int = 0) -> VectorCodec:
        """The codec of a code for any vectors of head_dim coordinates, its codebook loaded.

        Raises:
            ValueError: head_dim not divisible, or a missing or damaged codebook.
        """
        return cls(
            spec, head_dim, load_codebook(spec, head_dim), make_rotation(head_dim, rotation_seed)
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode vectors.

        A zero vector, and a vector holding a NaN or an infinity, has norm 0 and indices 0: it
        decodes to exact zeros. So does one whose
        largest coordinate is below the least normal float32.

        Args:
            x: any float dtype `[..., d]`.

        Returns:
            indices int32 `[..., num_subvecs]` and norms float16 `[...]`, at most 65504.
        """
        x = x.float()
        peak = x.abs().amax(-1, keepdim=True)  # [..., 1]; NaN if x holds one
        usable = (peak >= _MIN_NORMAL) & (peak < torch.inf)
        # Dividing by the peak first keeps every square inside float32, whatever the input.
        scaled = torch.where(usable, x / peak, 0.0)
        length = scaled.square().sum(-1, keepdim=True).sqrt()  # 1 to sqrt(d), or 0
        unit = scaled / torch.where(usable, length, 1.0)
        y = self.rotation.apply(unit)

        indices = self._nearest(y)
        norm = torch.where(usable, (peak * length).clamp(max=1e30), 0.0).squeeze(-1)
        norms = (norm * self._gain(y, indices)).clamp(max=MAX_NORM).to(torch.float16)
        return torch.where(usable, indices, 0), norms

    def decode(self, indices: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Decode to vectors.

        Args:
            indices: int32 `[..., num_subvecs]`.
            norms: float16 `[...]`.

        Returns:
            float32 `[..., d]`.
        """
        return self.rotation.inverse(self.decode_rotated(indices, norms))

    def decode_rotated(self, indices: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Decode to vectors that are still rotated: what attention reads. As `decode`."""
        return norms.float().unsqueeze(-1) * self._directions(indices)

    def _directions(self, indices: torch.Tensor) -> torch.Tensor:
        """Codewords side by side: `[..., num_subvecs]` -> float32 `[..., d]`."""
        return self.codewords.to(indices.device)[indices.long()].flatten(-2)

    def _nearest(self, y: torch.Tensor) -> torch.Tensor:
        """Rotated unit vectors float32 `[..., d]` -> indices int32 `[..., num_subvecs]`."""
        spec = self.spec
        subvecs = y.reshape(-1, spec.subvec_dim)
        if spec.folded:
            # Magnitudes are positive, so the nearest codeword always has the signs of y.
            bits = (subvecs < 0).to(torch.int64) << torch.arange(spec.subvec_dim, device=y.device)
            index = bits.sum(-1) * spec.num_rows + self._nearest_rows(subvecs.abs())
        else:
            index = self._nearest_rows(subvecs)
        return index.to(torch.int32).reshape(*y.shape[:-1], self.num_subvecs)

    def _nearest_rows(self, subvecs: torch.Tensor) -> torch.Tensor:
        """Subvectors float32 `[n, subvec_dim]` -> rows int64 `[n]`."""
        rows = self.codebook.rows.to(subvecs.device)
        if self.lists is None:
            return nearest_rows(subvecs, rows)
        lists = CodewordLists(*(t.to(rows.device) for t in (self.lists.cells, self.lists.members)))
        return nearest_listed_rows(subvecs, rows, lists, self.num_lists)

    def _gain(self, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Stored norm over true norm (see config.GainRule), float32 `[...]`."""
        v = self._directions(indices)
        dot = (y * v).sum(-1)
        sq = v.square().sum(-1).clamp(min=1e-12)  # v = 0 only if every codeword is 0
        if self.spec.gain == "preserve":
            return sq.rsqrt()
        if self.spec.gain == "mse":
            return dot.clamp(min=0) / sq
        if self.spec.gain == "unbiased":
            return 1 / dot.clamp(min=MIN_COSINE)
        return torch.ones_like(dot)


class KVCodec:
    """The key code and the value code of one token, and their record.

    Attributes:
        key, value: the two codes.
        preset: the preset they came from, or None.
        head_dim: d.
        layout: where each byte of a record is.
    """

    def __init__(self, key: VectorCodec, value: VectorCodec, preset: Preset | None = None) -> None:
        if key.head_dim != value.head_dim:
            raise ValueError(
                f"KVCodec: key and value must have one head_dim, got {key.head_dim} and "
                f"{value.head_dim}; models whose keys and values differ are not supported"
            )
        self.key = key
        self.value = value
        self.preset = preset
        self.head_dim = key.head_dim
        sizes = (spec.index_bytes(key.head_dim) for spec in (key.spec, value.spec))
        self.layout = RecordLayout(key.head_dim, *sizes)

    @classmethod
    def from_preset(cls, preset: Preset | str, head_dim: int) -> KVCodec:
        """The codec of a preset (or its name) at this head_dim (cached).

        Raises:
            ValueError: unknown preset, head_dim not divisible, or a missing or damaged codebook.
        """
        return _kv_codec(get_preset(preset) if isinstance(preset, str) else preset, head_dim)

    @property
    def codes(self) -> tuple[tuple[str, VectorCodec], ...]:
        """Every code, after whose vectors it is."""
        return (("keys'", self.key), ("values'", self.value))

    def encode_records(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Encode tokens to their records.

        Args:
            key, value: any float dtype `[..., d]`.

        Returns:
            uint8 `[..., record_bytes]`, contiguous.
        """
        layout = self.layout
        records = torch.zeros(
            *key.shape[:-1], layout.record_bytes, dtype=torch.uint8, device=key.device
        )
        for codec, x, index_offset, norm_offset in self._fields(key, value):
            indices, norms = codec.encode(x)
            packed = pack_indices(indices, codec.spec.index_bits)
            records[..., index_offset : index_offset + packed.shape[-1]] = packed
            records[..., norm_offset : norm_offset + NORM_BYTES] = pack_norms(norms)
        return records

    def decode_records(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode records uint8 `[..., record_bytes]` to key and value, float32 `[..., d]` each."""
        key, value = self.decode_records_rotated(records)
        return self.key.rotation.inverse(key), self.value.rotation.inverse(value)

    def decode_records_rotated(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `decode_records`, both still rotated."""
        if records.shape[-1] != self.layout.record_bytes:
            raise ValueError(
                f"decode_records: the last axis of records must be {self.layout.record_bytes} "
                f"bytes, got {records.shape[-1]}; use the codec that wrote them"
            )
        decoded = []
        for codec, _, index_offset, norm_offset in self._fields(None, None):
            index_bytes = codec.spec.index_bytes(self.head_dim)
            packed = records[..., index_offset : index_offset + index_bytes]
            indices = unpack_indices(packed, codec.num_subvecs, codec.spec.index_bits)
            norms = unpack_norms(records[..., norm_offset : norm_offset + NORM_BYTES])
            decoded.append(codec.decode_rotated(indices, norms))
        return decoded[0], decoded[1]

    def _fields(self, key, value):
        """(codec, vectors, index offset, norm offset) of the two halves of a record."""
        at = self.layout
        return (
            (self.key, key, at.key_index_offset, at.key_norm_offset),
            (self.value, value, at.value_index_offset, at.value_norm_offset),
        )


@functools.lru_cache(maxsize=64)
def _kv_codec(preset: Preset, head_dim: int) -> KVCodec:
    key, value = (
        VectorCodec.from_spec(spec, head_dim, preset.rotation_seed)
        for spec in (preset.key, preset.value)
    )
    return KVCodec(key, value, preset)
