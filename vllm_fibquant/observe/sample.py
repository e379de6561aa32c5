# SPDX-License-Identifier: Apache-2.0
"""What the fidelity monitor keeps of a few tokens, and how they are attended from codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.observe.ledger import exact_attention
from vllm_fibquant.ops import Attend, Batch, Pages


class Layer(Protocol):
    """What the monitor needs to know of an attention layer."""

    codec: KVCodec
    attend: Attend
    num_heads: int
    num_kv_heads: int

    def pages(self, kv_cache: torch.Tensor) -> Pages: ...


def _empty() -> torch.Tensor:
    return torch.empty(0)


@dataclass(eq=False)
class Sample:
    """Exact keys and values of a run of tokens of one request, in one layer and KV head.

    Attributes:
        layer: index into the monitor's layers.
        head: the KV head.
        length: tokens.
        place: row of the monitor's tables of slots and of samples that are as they were written.
        end: int32 [1], position in the request behind the sample's last token.
        table: int32 [1, blocks], the request's line of the block table.
        written: monotonic time.
        key, value: 16-bit [tokens, head_dim]; all four are empty until the layer has run.
        query: [1, num_q_heads, head_dim], the query the sample was taken with.
        output: as query, what the pages gave for it.
    """

    layer: int
    head: int
    length: int
    place: int
    end: torch.Tensor
    table: torch.Tensor
    written: float
    key: torch.Tensor = field(init=False, default_factory=_empty)
    value: torch.Tensor = field(init=False, default_factory=_empty)
    query: torch.Tensor = field(init=False, default_factory=_empty)
    output: torch.Tensor = field(init=False, default_factory=_empty)

    def keep(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copies of all three, keys and values in 16 bits."""
        dtype = torch.bfloat16 if key.dtype == torch.float32 else key.dtype
        self.key, self.value = key.to(dtype, copy=True), value.to(dtype, copy=True)
        self.query = query.clone()

    def outputs(
        self, layer: Layer, query: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the query heads that read the KV head, float32 [group_size, head_dim]: what the pages
        gave, and attention over the exact keys and values."""
        group_size = layer.num_heads // layer.num_kv_heads
        heads = slice(self.head * group_size, (self.head + 1) * group_size)
        scale, soft_cap = layer.attend.scale, layer.attend.soft_cap
        exact = exact_attention(query[0, heads], self.key, self.value, scale, soft_cap)
        return output[0, heads].float(), exact


def attend_codes(
    layer: Layer, query: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, length: int
) -> torch.Tensor:
    """What the served kernel makes of a sample's codes: as query.

    The query stands at the sample's last token, the batch's last one, in a window of the sample's
    length: it sees the sample's tokens, at their own positions, and nothing else.
    """
    out = torch.empty_like(query)
    attend = Attend(layer.attend.scale, window=length, soft_cap=layer.attend.soft_cap)
    ops.paged_attention(query, out, layer.pages(kv_cache), batch, attend)
    return out
