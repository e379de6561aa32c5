# SPDX-License-Identifier: Apache-2.0
"""One step's batch as the ops want it, and what is planned once for all layers of a group."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_fibquant.engine import device_pool, raw_library
from vllm_fibquant.engine.copies import CopyPool
from vllm_fibquant.engine.monitored import planner_of_probes
from vllm_fibquant.engine.non_finite import DeviceReader
from vllm_fibquant.engine.self_checks import check_kernels
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.ops import Batch
from vllm_fibquant.ops.checks import check_tensor
from vllm_fibquant.options import Retain


@dataclass
class FibQuantMetadata(AttentionMetadata):
    """One step's batch, as the ops want it.

    Attributes:
        num_tokens: new tokens of all requests, without padding.
        batch: their requests.
        num_gone: int64 [at least num_tokens], how many tokens between a query and the first ones
            are kept no more; None if none of any query.
        probe: what the fidelity monitor compares in this step, or None.
        positions: int64 [at least num_tokens], where new tokens stand in their requests; None if no
            layer has a map of keys.
        num_decodes, num_decode_tokens: requests at the beginning with few new tokens, and those
            tokens, on a GPU: beside a long chunk they would be cut as the chunk is, and one CTA
            would read a request's whole context. 0 elsewhere.
        copy_rows: on a GPU `ops.Copied.rows` of layers that have copies, else None.
    """

    num_tokens: int
    batch: Batch
    num_gone: torch.Tensor | None = None
    probe: Any = None
    positions: torch.Tensor | None = None
    num_decodes: int = 0
    num_decode_tokens: int = 0
    copy_rows: torch.Tensor | None = None

    @functools.cached_property
    def parts(self) -> list[tuple[int, Batch]]:
        """What is attended in launches of its own: decodes, then the other requests, or all.

        Each with the row of the query tensor behind its tokens; query_start_loc says where those
        begin.
        """
        whole, n = self.batch, self.num_decodes
        if n in (0, whole.num_reqs):
            return [(self.num_tokens, whole)]

        def part(requests: slice, bounds: slice) -> Batch:
            copies, starts, contexts = whole.copy_table, whole.query_starts, whole.contexts
            return Batch(
                whole.query_start_loc[bounds], whole.seq_lens[requests],
                whole.block_table[requests], None if copies is None else copies[requests],
                query_starts=None if starts is None else starts[bounds],
                contexts=None if contexts is None else contexts[requests],
            )  # fmt: skip

        rest = slice(n, None)
        return [
            (self.num_decode_tokens, part(slice(n), slice(n + 1))),
            (self.num_tokens, part(rest, rest)),
        ]


class FibQuantMetadataBuilder(AttentionMetadataBuilder[FibQuantMetadata]):
    """Builds the metadata of one group of layers; checks the kernels when it is made."""

    # The GPU kernels' grids follow from shapes, and lengths are read on the device.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.retain: Retain | None = None
        self._pool: CopyPool | device_pool.DevicePool | None = None
        on_gpu = device.type == "cuda"
        self._device_reader = DeviceReader(device) if on_gpu else None
        if on_gpu:  # else the order of requests is left alone
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._counts_steps = _holds_first_layer(layer_names, vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = {name: layer.impl for name, layer in layers.items()}
        self._needs_positions = any(impl.key_map is not None for impl in impls.values())
        self._host_lists = raw_library.host_lists(vllm_config, impls.values() if on_gpu else ())
        self._with_sinks = [impl for impl in impls.values() if impl.attend.sinks is not None]
        self._plan_probe = planner_of_probes(vllm_config, impls, kv_cache_spec.block_size, device)
        for impl in impls.values():
            # The layers of a group have the same options, and share block tables and so one pool.
            options, self.retain = impl.options, impl.options.retain
            if (copies := impl.attend.copies) is not None and self._pool is None:
                shape = (len(copies.key), options.num_copied_first, options.recent_window,
                         kv_cache_spec.block_size)  # fmt: skip
                if device_pool.serves(device.type):
                    on_device = *_largest_step(vllm_config), device, device_pool.planner()
                    self._pool = device_pool.DevicePool(*shape, *on_device)
                else:
                    self._pool = CopyPool(*shape)
        # Captured CUDA graphs read positions, and how far queries turn back, where they were.
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self._positions, self._gone = (
            torch.zeros(most, dtype=torch.int64, device=device) if on_gpu and is_read else None
            for is_read in (self._needs_positions, self.retain is not None)
        )
        self._max_model_len = vllm_config.model_config.max_model_len
        self.supports_draft_decode_metadata_update = on_gpu and self._follows_its_buffers()
        check_kernels(impls, vllm_config.model_config.dtype, kv_cache_spec.block_size, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FibQuantMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(
                f"build: causal must be True, got {common.causal}; "
                "use --kv-cache-dtype auto for this model"
            )
        for impl in self._with_sinks:
            impl.refresh_sinks()
        if self._counts_steps:
            own_counters().stepped(common.num_actual_tokens)
            if self._device_reader is not None:
                self._device_reader.poll()
        num_decodes = num_decode_tokens = 0
        if self.reorder_batch_threshold is not None:
            num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
                common, self.reorder_batch_threshold
            )
        copies, copy_rows = self._plan_copies(common)
        positions = None
        if self._needs_positions:
            positions = _kept_in(self._positions, "positions", _positions(common).long())
        return FibQuantMetadata(
            num_tokens=common.num_actual_tokens,
            batch=Batch(
                common.query_start_loc,
                common.seq_lens,
                common.block_table_tensor,
                *copies,
                **self._host_lists(common),
            ),  # fmt: skip
            num_gone=self._num_gone(common),
            probe=self._plan_probe(common) if self._plan_probe else None,
            positions=positions,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            copy_rows=copy_rows,
        )

    def _follows_its_buffers(self) -> bool:
        """Whether a step's metadata is right for the next ones of a draft too, once
        `update_draft_decode_metadata` has run: not if Python plans each step (copies, the monitor),
        looks at the weights (sinks) or turns queries back (`retain`)."""
        return not (self._pool or self._plan_probe or self._with_sinks or self.retain)

    def update_draft_decode_metadata(self, metadata: FibQuantMetadata) -> None:
        """Makes a draft's metadata that of its next step, whose lengths, bounds and block table
        vLLM has written in place. Captured into the draft's CUDA graph, so nothing is read back."""
        if metadata.positions is not None:
            batch = metadata.batch
            now = _positions_of(batch.query_start_loc, batch.seq_lens, metadata.num_tokens)
            metadata.positions[: metadata.num_tokens] = now

    def _plan_copies(
        self, common: CommonAttentionMetadata
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """`Batch`'s fields from copy_table on, and `FibQuantMetadata.copy_rows`."""
        if self._pool is None:
            return (), None
        where = common.query_start_loc, common.seq_lens, common.block_table_tensor
        plan = self._pool.step(*where, common.slot_mapping[: common.num_actual_tokens])
        if plan.tokens is None:
            return (plan.table,), plan.rows
        return (plan.table, plan.tokens, plan.rows), None

    def _num_gone(self, common: CommonAttentionMetadata) -> torch.Tensor | None:
        if self.retain is None:
            return None
        if self._gone is None and common.max_seq_len <= self.retain.total:
            return None
        gone = (_positions(common) + 1 - self.retain.total).long()
        # Rows that pad a captured graph stand anywhere, and a distance must be one that is known.
        return _kept_in(self._gone, "num_gone", gone.clamp(0, self._max_model_len - 1))


def _kept_in(place: torch.Tensor | None, name: str, numbers: torch.Tensor) -> torch.Tensor:
    """The numbers of new tokens, on a GPU in one place for all steps, behind which are those of
    other steps: nobody reads there."""
    if place is None:
        return numbers
    at_most = range(len(place) + 1)
    check_tensor("build", name, numbers, (at_most,), torch.int64)
    place[: len(numbers)] = numbers
    return place


def _positions(common: CommonAttentionMetadata) -> torch.Tensor:
    """Where in its request each new token stands: [num_actual_tokens]."""
    if common.num_actual_tokens == common.num_reqs and common.max_query_len == 1:
        return common.seq_lens - 1
    return _positions_of(common.query_start_loc, common.seq_lens, common.num_actual_tokens)


def _positions_of(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """`_positions` of any batch, without looking at it."""
    ends = query_start_loc[1:]
    row = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device)
    req = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
    # From a token's row to its position it is as far as from its request's end to its length.
    return row + (seq_lens - ends)[req]


def _largest_step(vllm_config: VllmConfig) -> tuple[int, int]:
    """Requests and tokens of a step at most, with those that pad a captured graph."""
    scheduler = vllm_config.scheduler_config
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_seqs, captured), max(scheduler.max_num_batched_tokens, captured)


def _holds_first_layer(layer_names: list[str], vllm_config: VllmConfig) -> bool:
    """Whether these are the layers of whose steps all are counted: one group of several is."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    ours = (name for name, layer in layers.items() if hasattr(layer.impl, "codec"))
    return next(ours, None) in layer_names
