# SPDX-License-Identifier: Apache-2.0
"""The adapter between one of vLLM's attention layers and our two ops, on vLLM's documented classes.

write:  `FibQuantImpl.do_kv_cache_update` -> `ops.encode_kv`
read:   `FibQuantImpl.forward`            -> `ops.paged_attention`

On a CPU `forward` itself begins with the update; on a GPU vLLM calls it before.

With a recent window the newest tokens are also copied: on a CPU by attention, where
`copies.CopyPool` says, on a GPU by encode, where `device_pool.DevicePool` does.

Both get the layer's cache as vLLM allocated it, uint8 [num_blocks, num_kv_heads, block_size,
record_bytes] (`backend.FibQuantBackend.customize_spec`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.engine import backend, non_finite, raw_library, rotary
from vllm_fibquant.engine.metadata import FibQuantMetadata
from vllm_fibquant.engine.support import refusal, run_options
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.ops import Attend, Fresh, Pages


class FibQuantImpl(AttentionImpl[FibQuantMetadata]):
    """Attention of one layer over its pages of codes."""

    chunk: ClassVar[int] = 0  # a query sees its own chunk of so many positions; 0: all

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "fibquant",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        problems = [f"{name}: must be left out, got {value}" for name, value in unknown.items()]
        if alibi_slopes is not None:
            problems.append("position encoding: must be in the keys (such as RoPE), got ALiBi")
        if attn_type != AttentionType.DECODER:
            problems.append(f"attention type: must be decoder, got {attn_type}")
        if problems:
            problems[-1] += "; use --kv-cache-dtype auto for this model"
            raise ValueError(refusal(kv_cache_dtype, problems))
        vllm_config = get_current_vllm_config()
        self.options = run_options(vllm_config).for_layer(kv_cache_dtype)
        # The layer whose pages this one reads and never writes, if it has none of its own.
        self.owner: FibQuantImpl | None = None
        # What this layer was last called with, if others read its pages.
        self.new_tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_shared = False
        if kv_sharing_target_layer_name is not None:
            self.owner = self._owner_named(kv_sharing_target_layer_name, vllm_config)
        self.retain = self.options.retain
        if self.retain and sliding_window:
            problem = f"retain: layers must have full attention, got a window of {sliding_window}"
            raise ValueError(refusal(kv_cache_dtype, [f"{problem}; leave retain out"]))

        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.attend = Attend(
            self.scale,
            window=self.retain.recent if self.retain else sliding_window or 0,
            chunk=self.chunk if self.chunk < vllm_config.model_config.max_model_len else 0,
            soft_cap=float(logits_soft_cap or 0.0),
            keep_first=self.retain.first if self.retain else 0,
        )
        self.codec = KVCodec.from_preset(self.options.preset, head_size)
        self.attends_raw = self.options.prefill == "raw"
        if self.attends_raw:
            library = raw_library.library_for(head_size, logits_soft_cap)
            self.attend = replace(self.attend, raw_library=library)
        self._sinks_param, self._sinks_version = sinks, -1
        self._pages: Pages | None = None
        self._turn_back: rotary.TurnBack | None = None
        self.key_map: KeyMap | None = None
        # What stands in for attention before there is a cache: calibrate.LayerCollector.
        self.without_cache: Callable[..., torch.Tensor] | None = None
        # What `key_map` was made from: ranks.facts_of compares it between ranks.
        self.calibration = "none"
        self._max_model_len = vllm_config.model_config.max_model_len
        rotary.watch(self)

    def _owner_named(self, name: str, vllm_config: VllmConfig) -> FibQuantImpl:
        """The layer of that name, which vLLM has built before; both must code alike."""
        owner = vllm_config.compilation_config.static_forward_context[name].impl
        found = getattr(getattr(owner, "options", None), "preset", None)
        if not isinstance(owner, FibQuantImpl) or owner.options != self.options:
            problem = (
                f"layers: those that read the cache of {name} must store as it does, got "
                f"{self.options.preset.name} for one and {found.name if found else '16 bits'} for "
                "it; name neither or both in layers and --kv-cache-dtype-skip-layers"
            )
            raise ValueError(refusal(self.options.preset.name, [problem]))
        owner._is_shared = True
        return owner

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self._sinks_version = -1
        self.refresh_sinks()
        if self.attend.keep_first:
            try:
                given = self, self._max_model_len, self.head_size, act_dtype
                self._turn_back = rotary.turn_back_of(*given)
            except ValueError as error:
                raise ValueError(f"retain: {error}; or leave retain out") from error

    def refresh_sinks(self) -> None:
        """Takes over sinks that changed, as weights may be updated while the model is served, into
        the tensor that exists: captured CUDA graphs read it where it is."""
        if self._sinks_param is None or self._sinks_version == self._sinks_param._version:
            return
        if self.attend.sinks is None:
            sinks = torch.empty_like(self._sinks_param, dtype=torch.float32).contiguous()
            self.attend = replace(self.attend, sinks=sinks)
        else:
            sinks = self.attend.sinks
        sinks.copy_(self._sinks_param.detach())
        self._sinks_version = self._sinks_param._version

    def pages(self, kv_cache: torch.Tensor) -> Pages:
        """The layer's cache with its kernels, made when the cache is new to it."""
        pages = self._pages
        if pages is None or pages.cache is not kv_cache or pages.key_map is not self.key_map:
            pages = self._pages = ops.pages_of(kv_cache, self.codec, self.key_map)
        return pages

    def forget_pages(self) -> None:
        """Lets go of a cache that was there to measure CUDA graphs, before it has seen another."""
        self._pages = self.attend.kept = self.new_tokens = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Encodes this step's keys and values into their slots.

        Args:
            layer: vLLM's, which knows its name.
            key: [num_tokens, num_kv_heads, head_dim], possibly padded behind slot_mapping's end.
            value: as key.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes]; empty while
                vLLM profiles, when nothing is stored.
            slot_mapping: int64 [num_tokens]; -1 is skipped.
        """
        if kv_cache.numel() == 0:
            return
        if key.shape[0] < slot_mapping.shape[0]:
            slot_mapping = slot_mapping[: key.shape[0]]
        positions = copied = None
        if self.key_map is not None or self.attend.copies is not None:
            if (step := self._step_of(layer)) is None:
                return
            positions = step.positions if self.key_map is not None else None
            if step.copy_rows is not None and self.attend.copies is not None:
                copied = ops.Copied(self.attend.copies, step.copy_rows)
        began = time.perf_counter()
        pages = self.pages(kv_cache)
        count = ops.encode_kv(key, value, slot_mapping, pages, positions, copied)
        if not kv_cache.is_cuda:  # there an op's return says nothing of its end
            own_counters().encoded(began)
        if count:
            non_finite.counter.add(count)

    def _step_of(self, layer: Any) -> FibQuantMetadata | None:
        """What the metadata builder made of this step; None in dummy runs, which store nothing.

        Raises:
            RuntimeError: a CUDA graph is captured that would lack what the builder makes.
        """
        found: Any = get_forward_context().attn_metadata
        if found is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "do_kv_cache_update: must not be captured without attention metadata, got a graph "
                "of vLLM's that holds it; leave use_inductor_graph_partition out of "
                "--compilation-config, or give --enforce-eager"
            )
        if isinstance(found, list):  # as vllm.model_executor's get_attention_context
            found = found[0]
        return None if found is None else found[layer.layer_name]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FibQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends this step's queries to their requests' codes; on a CPU it first encodes the new
        tokens, but for those of another layer's pages.

        Args:
            layer: vLLM's, which knows its name.
            query: [num_tokens, num_q_heads, head_dim], possibly padded.
            key: [num_tokens, num_kv_heads, head_dim]; attended in prefill mode "raw" alone. A layer
                that has an `owner` reads that layer's, and its own may be None.
            value: as key.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes].
            attn_metadata: None while vLLM profiles: the output is zero and nothing is read, unless
                the layer is being calibrated.
            output: [num_tokens, num_q_heads, head_dim], written; padding rows become zero.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "forward: output_scale must be None, got a scale; "
                "switch off the fusion of attention with output quantisation"
            )
        if self._is_shared:
            self.new_tokens = key, value
        if self.owner is not None and self.owner.new_tokens is not None:
            key, value = self.owner.new_tokens
        if attn_metadata is None or kv_cache.numel() == 0:
            if self.without_cache is not None:
                return self.without_cache(query, key, value, output)
            ops.reserve(query, raw=self.attends_raw)
            return output.zero_()
        if backend.FibQuantBackend.forward_includes_kv_cache_update and self.owner is None:
            slots = cast(Any, get_forward_context().slot_mapping).get(layer.layer_name)
            if slots is not None:
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
        pages, num_tokens = self.pages(kv_cache), attn_metadata.num_tokens
        if num_tokens < output.shape[0]:
            output[num_tokens:].zero_()
        fresh = Fresh(key, value) if self.attends_raw else None
        if self._turn_back and attn_metadata.num_gone is not None:
            num_gone = attn_metadata.num_gone[:num_tokens]
            fresh = Fresh(first_query=self._turn_back(query[:num_tokens], num_gone))
        began = time.perf_counter()
        for end, batch in attn_metadata.parts:
            if end == query.shape[0]:
                ops.paged_attention(query, output, pages, batch, self.attend, fresh)
            else:
                ops.paged_attention(query[:end], output[:end], pages, batch, self.attend, fresh)
        if not kv_cache.is_cuda:
            own_counters().attended(began)
        if attn_metadata.probe is not None:
            attn_metadata.probe.run(self, query, key, value, kv_cache)
        return output
