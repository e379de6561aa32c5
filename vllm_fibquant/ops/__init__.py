# SPDX-License-Identifier: Apache-2.0
"""The one door to the kernels: checks every argument, then calls the implementation that was chosen
for the layer's pages (`pages_of`).
"""

from __future__ import annotations

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import checks
from vllm_fibquant.ops.call import Attend, Batch, Copied, Copies, Fresh, Pages
from vllm_fibquant.ops.choice import (
    CPU,
    REFERENCE,
    choose,
    kernel_name,
    reserve,
    unsupported_codec,
)
from vllm_fibquant.ops.kernels import Kernels


def pages_of(cache: torch.Tensor, codec: KVCodec, key_map: KeyMap | None = None) -> Pages:
    """The pages of one layer, with the kernels chosen for them; to be made once and kept.

    Args:
        cache, codec, key_map: as in `Pages`.

    Raises:
        ValueError: as in `Pages` and `choose`.
        RuntimeError: as in `choose`.
    """
    return Pages(cache, codec, key_map, choose(codec, cache))


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor | None = None,
    copied: Copied | None = None,
) -> int:
    """Encodes new keys and values and stores their records at the mapped slots.

    Args:
        key: float32, bfloat16 or float16 [num_tokens, num_kv_heads, head_dim], last axis
            contiguous.
        value: as key.
        slot_mapping: int64 [num_slots], num_slots <= num_tokens; -1 skips a token.
        pages: where the records go, and how they are encoded.
        positions: int64 [at least num_slots], where tokens stand in their requests; needed with a
            map of keys, else unused.
        copied: which of them are also copied, with kernels that copy while they encode.

    Returns:
        How many stored vectors held a NaN or infinity; they are stored as zero vectors. On a GPU 0:
        it counts on the device (`kernels.device_counters`).

    Raises:
        ValueError: an argument's shape, dtype or layout; on a CPU also a slot outside the cache, or
            a position that is negative or outside key_map.turning's table.

    Cost: reads 2 * head_dim elements and writes record_bytes per token and KV head; the search
        takes num_rows * head_dim multiply-adds per vector.
    Oracle: reference.encode_kv, equal but for ties of the two nearest codewords.
    """
    checks.check_encode(key, value, slot_mapping, pages, positions, copied)
    return pages.kernels.encode_kv(key, value, slot_mapping, pages, positions, copied)


def paged_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None = None,
) -> None:
    """Causal attention of each request's newest tokens over its cached codes.

    A row's result depends only on its own query and on the tokens it sees: it is bit-equal
    whatever else is in the batch, however its prompt was cut into chunks, and for any number of
    threads. With raw_key it depends on which tokens are new, but never on other requests.

    Args:
        query: float32, bfloat16 or float16 [num_tokens, num_q_heads, head_dim], last axis
            contiguous.
        out: as query; rows query_start_loc[0]:query_start_loc[-1] are written.
        pages: the layer's cache.
        batch: the step's requests.
        attend: how the layer attends.
        fresh: what new tokens bring beside their queries; None when codes say all.

    Raises:
        ValueError: an argument's shape, dtype or layout, or a feature that the pages' kernels do
            not have; on a CPU also a block number outside the cache, or impossible lengths.

    Cost: reads record_bytes per cached token and KV head for every 48 rows that share them.
    Oracle: reference.paged_attention.
    """
    checks.check_attention(query, out, pages, batch, attend, fresh)
    if batch.num_reqs and query.shape[0]:
        pages.kernels.paged_attention(query, out, pages, batch, attend, fresh)
