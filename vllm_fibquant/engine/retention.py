# SPDX-License-Identifier: Apache-2.0
"""A request's cache bounded: its first tokens, its newest, and nothing between.

vLLM's sliding-window manager frees the blocks a window has passed. This one is the same but for a
request's first blocks, which it holds on to: for a running request, and when it looks for a
cached prefix, which is usable when its first blocks and those of its window are still there.

Registered when imported. vLLM looks managers up by a spec's class, in whichever process it needs
one, and a spec that comes from another process imports this module when it is unpickled.

Source: StreamingLLM (arXiv 2309.17453) for what to keep; blocks and prefix cache are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_fibquant.options import Retain


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(SlidingWindowSpec):
    """The cache of one layer that keeps `keep_first` tokens and a window of `sliding_window`."""

    keep_first: int

    @property
    def num_first_blocks(self) -> int:
        """Blocks that hold the first tokens."""
        return cdiv(self.keep_first, self.block_size)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The most blocks one request holds at a time, whatever its length."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.num_first_blocks, cdiv(max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, RetentionSpec)
            and (spec.sliding_window, spec.keep_first) == (self.sliding_window, self.keep_first)
            for spec in kv_cache_specs.values()
        )


def retention_spec(spec: AttentionSpec, retain: Retain, state_content_bytes: int) -> RetentionSpec:
    """`spec`, of a full-attention layer, as one that keeps what `retain` says."""
    return replace_as(
        spec,
        RetentionSpec,
        drop=("sliding_window", "attention_chunk_size", "non_causal"),
        sliding_window=retain.recent,
        keep_first=retain.first,
        state_content_bytes=state_content_bytes,
    )


class RetentionManager(SlidingWindowManager):
    """Frees the blocks between a request's first tokens and its window.

    What: overrides what vLLM's manager does with blocks before the window.
    Why: vLLM's managers keep either a window or all; the registry is made for others.
    Range: read in 0.32.0; uses two helpers that begin with an underscore.
    Delete when: vLLM has a spec for a window with kept first tokens.
    """

    kv_cache_spec: RetentionSpec

    def _num_skipped_blocks(self, num_computed_tokens: int) -> int:
        """Blocks before the window, the first ones included."""
        return self.get_num_skipped_tokens(num_computed_tokens) // self.block_size

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        self._remove_blocks_in_range(
            request_id,
            self.kv_cache_spec.num_first_blocks,
            self._num_skipped_blocks(processed_computed_tokens),
        )

    def _kept_of_skipped(
        self, new_computed_blocks: Sequence[Any], num_computed_tokens: int
    ) -> Sequence[Any]:
        """Blocks of a cached prefix that a sliding window would have skipped and we keep."""
        num_skipped = self._num_skipped_blocks(num_computed_tokens)
        return new_computed_blocks[: min(self.kv_cache_spec.num_first_blocks, num_skipped)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        kept = self._kept_of_skipped(new_computed_blocks, total_computed_tokens)
        return self._get_num_evictable_blocks(kept) + super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        # There null blocks have taken the place of all that were skipped.
        num_computed_tokens = num_local_computed_tokens + num_external_computed_tokens
        kept = self._kept_of_skipped(new_computed_blocks, num_computed_tokens)
        self.block_pool.touch(kept)
        self.req_to_blocks[request_id][: len(kept)] = kept

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        num_first, block_size = kv_cache_spec.num_first_blocks, kv_cache_spec.block_size
        first = []
        for block_hash in islice(block_hashes, min(num_first, max_length // block_size)):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if cached is None:
                break
            first.append(cached)
        if len(first) < num_first:
            # Without all of the first blocks nothing behind them is of use.
            max_length = min(max_length, len(first) * block_size)
        blocks, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )
        for group, group_blocks in enumerate(blocks):
            kept = [cached[group] for cached in first][: len(group_blocks)]
            group_blocks[: len(kept)] = kept
        return blocks, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *args: Any, **kwargs: Any
    ) -> list[bool] | None:
        mask = super().reachable_block_mask(start_block, end_block, *args, **kwargs)
        if mask is not None:
            spec: RetentionSpec = kwargs["kv_cache_spec"]
            num_first = max(0, min(spec.num_first_blocks, end_block) - start_block)
            mask[:num_first] = [True] * num_first
        return mask


# vLLM fills the registry when it is first asked and empty: let it do so before we add to it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(RetentionSpec, RetentionManager, uniform_type_base_spec=RetentionSpec)
