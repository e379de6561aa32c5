# SPDX-License-Identifier: Apache-2.0
"""A small paged cache full of traps: shuffled blocks, ragged requests, poison in free slots."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import (
    Attend,
    Batch,
    Fresh,
    Pages,
    choice,
    cpu_library,
    cpu_tables,
    reference,
)

POISON = 0xFF  # as a norm: NaN
MAX_TIES = 0.02


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Pages made within this context have the oracle in the place of a CPU's kernels."""
    with patch.object(choice, "CPU", ops.REFERENCE):
        yield


def record_layout(codec: KVCodec) -> list[int]:
    """The CPU library's own idea of a record: offsets of K and V indices, of both norms, its
    size."""
    struct, out = cpu_tables.codec_struct(codec), (ctypes.c_int32 * 5)()
    key, value = ctypes.byref(struct.key), ctypes.byref(struct.value)
    cpu_library.library().fq_record_layout(codec.head_dim, key, value, out)
    return list(out)


@dataclass
class Paged:
    """Requests with `seq_lens` tokens of which the last `query_lens` are new."""

    codec: KVCodec
    cache: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    new_key: torch.Tensor
    new_value: torch.Tensor
    positions: torch.Tensor
    key_map: KeyMap | None = None

    def attend(self, **options: Any) -> torch.Tensor:
        out = torch.full_like(self.query, torch.nan)
        ops.paged_attention(self.query, out, self.pages, *self.split(options))
        return out

    def oracle(self, dtype: torch.dtype = torch.float64, **options: Any) -> torch.Tensor:
        """The oracle's answer computed in `dtype`, as float64."""
        out = torch.zeros_like(self.query, dtype=torch.float64)
        pages = Pages(self.cache, self.codec, self.key_map, ops.REFERENCE)
        reference.paged_attention(self.query, out, pages, *self.split(options), dtype)
        return out

    @property
    def pages(self) -> Pages:
        return ops.pages_of(self.cache, self.codec, self.key_map)

    def split(
        self, options: dict[str, Any], device: torch.device | None = None
    ) -> tuple[Batch, Attend, Fresh | None]:
        """What ops.paged_attention takes, of options by the names of its classes' fields and
        `copies`, Copies and then Batch's fields from copy_table on."""
        on = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
        fresh = [on.pop(name, None) for name in Fresh._fields]
        copies, *of_step = on.pop("copies", (None,))
        if device is not None and copies is not None:
            copies = copies._replace(key=copies.key.to(device), value=copies.value.to(device))
            of_step = [x.to(device) for x in of_step]
        batch = (x.to(device) for x in (self.query_start_loc, self.seq_lens, self.block_table))
        attend = Attend(**{"scale": self.scale, "copies": copies, **on})
        given = any(x is not None for x in fresh)
        return Batch(*batch, *of_step), attend, Fresh(*fresh) if given else None

    @property
    def scale(self) -> float:
        return 1.5 * self.codec.head_dim**-0.5  # sharper than a model's, so that errors show

    @property
    def fresh(self) -> Fresh:
        return Fresh(self.new_key, self.new_value)

    def given(self, options: dict[str, Any]) -> dict[str, Any]:
        """A case's options as `oracle` takes them: "sinks": True asks for one of each query head,
        "raw": True for the new tokens as they are."""
        given = {name: x for name, x in options.items() if name not in ("sinks", "raw")}
        if options.get("sinks"):
            seeded = torch.Generator().manual_seed(1)
            given["sinks"] = torch.randn(self.query.shape[1], generator=seeded) * 3
        return given | (self.raw if options.get("raw") else {})

    @property
    def raw(self) -> dict[str, torch.Tensor]:
        return {"raw_key": self.new_key, "raw_value": self.new_value}


def make_paged(
    codec: KVCodec,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    group_size: int = 2,
    num_kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    key_map: KeyMap | None = None,
) -> Paged:
    generator = torch.Generator().manual_seed(seed)

    def random(num_tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, num_heads, codec.head_dim, generator=generator).to(dtype)

    blocks_of = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(blocks_of) + 3
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    # Unused entries point at a block nobody owns.
    block_table = torch.full((len(seq_lens), max(blocks_of) + 1), int(order[-1]), dtype=torch.int32)
    slots, begin = [], 0
    for req, (seq_len, count) in enumerate(zip(seq_lens, blocks_of, strict=True)):
        block_table[req, :count] = order[begin : begin + count]
        begin += count
        positions = torch.arange(seq_len)
        blocks = block_table[req].long()[positions // block_size]
        slots.append(blocks * block_size + positions % block_size)
    num_tokens = sum(seq_lens)
    key, value = random(num_tokens, num_kv_heads), random(num_tokens, num_kv_heads)
    positions = torch.cat([torch.arange(n) for n in seq_lens])
    if key_map is not None:
        key = (key + key_map.mean_at(positions, torch.float32)).to(dtype)
    shape = (num_blocks, num_kv_heads, block_size, codec.layout.record_bytes)
    cache = torch.full(shape, POISON, dtype=torch.uint8)
    slot_mapping = torch.cat(slots)
    ops.encode_kv(key, value, slot_mapping, ops.pages_of(cache, codec, key_map), positions)
    ends = torch.tensor(seq_lens).cumsum(0).tolist()
    new = torch.cat([torch.arange(e - q, e) for e, q in zip(ends, query_lens, strict=True)])
    return Paged(
        codec, cache, random(sum(query_lens), num_kv_heads * group_size), key, value, slot_mapping,
        torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32), block_table, key[new], value[new],
        positions, key_map,
    )  # fmt: skip


def check_records(codec, got, expected) -> None:
    """Equal but for ties of the two nearest codewords, which are counted and capped."""
    different = (got != expected).any(-1)
    assert float(different.float().mean()) <= MAX_TIES
    for a, b in zip(
        codec.decode_records_rotated(got[different]),
        codec.decode_records_rotated(expected[different]),
        strict=True,
    ):
        assert ((a.norm(dim=-1) / b.norm(dim=-1)) - 1).abs().le(1e-2).all()
