# SPDX-License-Identifier: Apache-2.0
"""What we tell vLLM that we can do, and how large a page is; vLLM computes how many blocks fit."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine.head_dims import head_dim_problem
from vllm_fibquant.engine.metadata import FibQuantMetadataBuilder
from vllm_fibquant.engine.support import BACKEND_NAME, BLOCK_MULTIPLE
from vllm_fibquant.ops.checks import DTYPES
from vllm_fibquant.options import Options

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl


class FibQuantBackend(AttentionBackend):
    """`backend_for` makes one subclass per set of options, and so one for every preset of a run
    whose layers differ."""

    options: ClassVar[Options]

    # On a CPU attention's operator also encodes: a second one takes 10 us in every layer.
    forward_includes_kv_cache_update = current_platform.is_cpu()
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(PRESETS)

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FibQuantImpl]:
        from vllm_fibquant.engine.attention import FibQuantImpl

        return FibQuantImpl

    @staticmethod
    def get_builder_cls() -> type[FibQuantMetadataBuilder]:
        return FibQuantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_dim_problem(cls.options.preset, head_size, current_platform.device_type) is None

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Each (block, KV head) must be one contiguous run of records.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replaces the dense content size by record_bytes, for our layers only.

        vLLM also asks for the size of layers it keeps unquantised (kv_cache_dtype_skip_layers);
        those have the model's dtype and keep their size.
        """
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"customize_spec: head_size_v must equal head_size, got {spec.head_size_v} and "
                f"{spec.head_size}; use --kv-cache-dtype auto for this model"
            )
        layout = preset_layout(cls.options.preset, spec.head_size)
        if cls.options.retain:
            from vllm_fibquant.engine.retention import retention_spec  # registers a spec with vLLM

            return retention_spec(spec, cls.options.retain, layout.record_bytes)
        return replace(spec, state_content_bytes=layout.record_bytes)


@functools.cache
def chunked(backend: type[FibQuantBackend], chunk: int) -> type[FibQuantBackend]:
    """The backend of layers whose queries see their own chunk of `chunk` positions."""
    impl = type("ChunkedFibQuantImpl", (backend.get_impl_cls(),), {"chunk": chunk})
    content = {"get_impl_cls": staticmethod(lambda: impl), "__module__": __name__}
    return type(f"{backend.__name__}_chunk{chunk}", (backend,), content)


@functools.cache
def backend_for(options: Options) -> type[FibQuantBackend]:
    """The backend class of `options`; the same options give the same class."""
    # vLLM groups layers by class name, so different options need different names.
    name = f"FibQuantBackend_{options.preset.name}_{options.digest}"
    return type(name, (FibQuantBackend,), {"options": options, "__module__": __name__})
