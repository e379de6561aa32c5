# SPDX-License-Identifier: Apache-2.0
"""The layers of this process that store codes, and the memory they have beside their pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_fibquant.engine import device_pool
from vllm_fibquant.engine.attention import FibQuantImpl
from vllm_fibquant.engine.copies import num_copy_rows
from vllm_fibquant.engine.support import refusal
from vllm_fibquant.ops import Copies

logger = init_logger(f"vllm.{__name__}")


def copy_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of copies of a model's keys and values."""
    return torch.bfloat16 if model_dtype == torch.float32 else model_dtype


def our_layers(vllm_config: VllmConfig) -> dict[str, FibQuantImpl]:
    """The layers of this process that store codes, by name."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    impls = {name: layer.impl for name, layer in layers.items()}
    return {name: impl for name, impl in impls.items() if isinstance(impl, FibQuantImpl)}


def check_layers(vllm_config: VllmConfig) -> None:
    """Refuses a model whose layers take no notice of --kv-cache-dtype.

    In vLLM 0.32.0 that is so of Falcon's: they are built without the cache's configuration, and
    would keep 16 bits whatever was asked for.

    Raises:
        ValueError: no layer of this process stores codes, although none is to be skipped.
    """
    cache, layers = vllm_config.cache_config, get_layers_from_vllm_config(vllm_config, Attention)
    if layers and not our_layers(vllm_config) and not cache.kv_cache_dtype_skip_layers:
        problem = (
            "model: layers must take their cache's dtype from --kv-cache-dtype, got "
            f"{vllm_config.model_config.architecture}, for whose {len(layers)} layers vLLM ignores "
            "it; use --kv-cache-dtype auto for this model"
        )
        raise ValueError(refusal(cache.cache_dtype, [problem]))


def tell_unused_scales(vllm_config: VllmConfig) -> None:
    """Says that scales a checkpoint has for an fp8 cache are not used: codes have norms."""
    model = vllm_config.model_config
    given = getattr(model.hf_config, "quantization_config", None) if model is not None else None
    given = given if isinstance(given, dict) else {}
    if told := [name for name, value in given.items() if name.startswith("kv_cache") and value]:
        logger.info(
            "FibQuant does not use what this checkpoint says of an fp8 cache: %s", ", ".join(told)
        )


def release_memory(vllm_config: VllmConfig) -> None:
    """Gives back what has served until here: pages on which vLLM measured CUDA graphs, and on a GPU
    what torch keeps of the memory in which texts were read. vLLM's pages take all that is left."""
    for impl in our_layers(vllm_config).values():
        impl.forget_pages()
    if vllm_config.device_config.device_type == "cuda":
        torch.cuda.empty_cache()


def copy_rows(vllm_config: VllmConfig, available_bytes: int) -> tuple[int, int]:
    """How many tokens of this process's layers are copied, as full batches need but few beside the
    pages, and the bytes of one in all layers; (0, 0) without a recent window.

    Args:
        available_bytes: what copies and pages may take together.
    """
    layers = list(our_layers(vllm_config).values())
    itemsize = copy_dtype(vllm_config.model_config.dtype).itemsize
    on_gpu = device_pool.serves(vllm_config.device_config.device_type)
    # On a GPU a layer that reads another's pages reads its copies, too: it encodes nothing.
    copied = [x for x in layers if x.options.recent_window and not (on_gpu and x.owner)]
    row_bytes = sum(2 * x.num_kv_heads * x.head_size * itemsize for x in copied)
    if row_bytes == 0:
        return 0, 0
    wanted = vllm_config.scheduler_config.max_num_seqs * _rows_of_a_request(vllm_config, layers[0])
    return num_copy_rows(wanted, row_bytes, available_bytes), row_bytes


def _rows_of_a_request(vllm_config: VllmConfig, layer: FibQuantImpl) -> int:
    kept = layer.options.num_copied_first, layer.options.recent_window
    return device_pool.rows_of_a_request(vllm_config.device_config.device_type, *kept)


def allocate_copies(vllm_config: VllmConfig, available_bytes: int) -> int:
    """Gives every layer of this process its copies; to be called once, before vLLM allocates pages.

    Args:
        available_bytes: as in `copy_rows`.

    Returns:
        Bytes taken.
    """
    num_rows, row_bytes = copy_rows(vllm_config, available_bytes)
    if num_rows == 0:
        return 0
    layers = list(our_layers(vllm_config).values())
    dtype = copy_dtype(vllm_config.model_config.dtype)
    device = torch.device(vllm_config.device_config.device_type)
    on_gpu = device_pool.serves(device.type)
    for layer in layers:
        if on_gpu and layer.owner is not None:
            layer.attend = replace(layer.attend, copies=layer.owner.attend.copies)
            continue
        shape = (num_rows, layer.num_kv_heads, layer.head_size)
        key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        copies = Copies(key, value, layer.options.num_copied_first)
        layer.attend = replace(layer.attend, copies=copies)
    logger.info(
        "FibQuant keeps copies of up to %d tokens (%.1f MiB): the newest %d and first %d of %d "
        "requests; others are read from codes",
        num_rows,
        num_rows * row_bytes / 2**20,
        layers[0].options.recent_window,
        layers[0].options.num_copied_first,
        num_rows // _rows_of_a_request(vllm_config, layers[0]),
    )
    return num_rows * row_bytes
