# SPDX-License-Identifier: Apache-2.0
"""Touches of vLLM's page allocator that vLLM does not document, under the rules of `compat`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from vllm_fibquant.codec.page_fit import fit_pages
from vllm_fibquant.engine.compat import wrap_once

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def fit_layers_pages(names: list[str]) -> None:
    """Has layers of two page sizes share pages with little left empty.

    What: wraps `Attention.get_kv_cache_spec`, whose answers are then those of `fitted`.
    Why: vLLM makes the pages of full and sliding-window layers equally large, and where one size
        does not divide the other (records of head_dim 256 and 512) pads every smaller one.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: vLLM's allocator has pools of several page sizes.

    Args:
        names: cache dtypes of the runs this is for.
    """
    from vllm.model_executor.layers.attention import Attention

    is_asking = False  # by `plain_specs`, whose layers may ask their base class, which is wrapped

    def get_kv_cache_spec(original: Any, self: Any, vllm_config: VllmConfig) -> Any:
        nonlocal is_asking
        own = original(self, vllm_config)
        if own is None or is_asking or vllm_config.cache_config.cache_dtype not in names:
            return own
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return own  # all layers are one group, each with pages of its own size
        is_asking = True
        try:
            specs = fitted(plain_specs(vllm_config))
        finally:
            is_asking = False
        return specs.get(self.layer_name, own)

    wrap_once(Attention, "get_kv_cache_spec", get_kv_cache_spec)


def fitted(specs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Specifications whose pages `codec.page_fit.fit_pages` has made equally large where it can."""
    specs = dict(specs)
    windows = {getattr(spec, "sliding_window", None) for spec in specs.values()}
    sizes = sorted({spec.page_size_bytes for spec in specs.values()})
    is_plain = all(getattr(spec, "page_size_padded", 1) is None for spec in specs.values())
    fit = fit_pages(*sizes) if len(sizes) == 2 and len(windows) > 1 and is_plain else None
    if fit is None:
        return specs
    grows = fit.page_bytes > sizes[1]  # then the smaller divides it, and vLLM enlarges its blocks
    for name, spec in specs.items():
        is_large = spec.page_size_bytes == sizes[1]
        if is_large and grows:
            specs[name] = dataclasses.replace(spec, page_size_padded=fit.page_bytes)
        elif not is_large and not grows:
            block_size = spec.block_size * fit.num_small
            specs[name] = dataclasses.replace(
                spec, block_size=block_size, page_size_padded=fit.page_bytes
            )
    return specs


def plain_specs(vllm_config: VllmConfig) -> dict[str, Any]:
    """The cache specification of every layer of this worker that has a cache of its own, before
    pages are fitted to each other.

    What: asks the layers, as the model runner's `get_kv_cache_spec` does.
    Why: a worker's report is made without its runner, and a layer does not know the others.
    Range: 0.32.0.
    Delete when: `VllmConfig` or the cache configuration keeps them.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    specs = {}
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, cast(Any, AttentionLayerBase))
    for name, layer in layers.items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        ask = type(layer).get_kv_cache_spec
        spec = getattr(ask, "__wrapped__", ask)(layer, vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = customize_attention_spec(layer.get_attn_backend(), spec)
        if spec is not None:
            specs[name] = spec
    return specs


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What vLLM makes of memory.

    Attributes:
        max_concurrency: requests of maximum length that fit.
        request_bytes: what such a request is given.
        used_bytes: of these, those that hold its keys, values and states.
    """

    num_blocks: int
    max_concurrency: float
    request_bytes: int
    used_bytes: int


def allocate(vllm_config: VllmConfig, specs: Mapping[str, Any], memory_bytes: int) -> Allocation:
    """What vLLM would make of a worker's memory, without allocating any.

    What: `get_kv_cache_groups`, `get_kv_cache_config_from_groups` and
        `get_max_concurrency_for_kv_cache_config` of `vllm.v1.core.kv_cache_utils`.
    Why: groups, padding and block sizes are decided there alone.
    Range: 0.32.0.
    Delete when: vLLM can be asked what would fit.
    """
    from vllm.v1.core import kv_cache_utils as utils

    with _quiet(utils.logger):
        groups = utils.get_kv_cache_groups(vllm_config, dict(specs))
        config = utils.get_kv_cache_config_from_groups(vllm_config, groups, memory_bytes)
    concurrency = utils.get_max_concurrency_for_kv_cache_config(vllm_config, config)
    block_bytes = utils._pool_bytes_per_block(vllm_config, groups)
    allocated = used = 0
    for group in groups:
        spec = group.kv_cache_spec
        num_blocks = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        allocated += num_blocks * block_bytes
        for name in group.layer_names:
            own = utils._get_per_layer_spec(group, name)
            used += num_blocks * getattr(own, "real_page_size_bytes", own.page_size_bytes)
    return Allocation(config.num_blocks, concurrency, allocated, used)


@contextlib.contextmanager
def layers_without_weights(vllm_config: VllmConfig) -> Iterator[None]:
    """Has the layers of a model in a configuration, without a model that could be run.

    What: as a worker does: groups of one rank, `initialize_model`, the platform's choice of a
        block size, and that of a layout; on the device "meta", which holds no numbers. Rotary
        tables, which a process shares between its models, are kept apart.
    Why: vLLM knows the size of a cache only from layers that are built.
    Range: 0.32.0.
    Delete when: vLLM can be asked what would fit.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends import utils

    shared = rotary_embedding._ROPE_DICT
    kept = dict(shared)
    shared.clear()
    with set_current_vllm_config(vllm_config):
        # An engine that failed to start in this process has left its groups.
        is_first = not torch.distributed.is_initialized()
        if is_first:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel_state.init_distributed_environment(1, 0, local_rank=0, backend="gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
                initialize_model(vllm_config)
            current_platform.update_block_size_for_backend(vllm_config)
            backends = get_current_attn_backends(vllm_config)
            names = [layout.name for layout in utils.get_supported_kv_cache_layouts(backends)]
            utils.resolve_kv_cache_layout(vllm_config, [names], plain_specs(vllm_config).values())
            yield
        finally:
            shared.clear()
            shared.update(kept)
            if is_first:
                parallel_state.destroy_model_parallel()
                parallel_state.destroy_distributed_environment()


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Nothing is logged of what is only asked."""
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
