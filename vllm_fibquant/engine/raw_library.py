# SPDX-License-Identifier: Apache-2.0
"""Which library attends raw new tokens on the GPU at hand (`ops.raw_states`), and what it needs to
know of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_fibquant.engine import compat
from vllm_fibquant.ops import raw_states
from vllm_fibquant.ops.raw_states import RawLibrary

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_fibquant.engine.attention import FibQuantImpl

logger = init_logger(f"vllm.{__name__}")


def library_for(head_dim: int, soft_cap: float | None) -> RawLibrary | None:
    """vLLM's FlashAttention where it is, else xformers where that is; None for our own kernel, as
    on CPUs, whose kernels attend raw tokens themselves."""
    return _library_for(head_dim, bool(soft_cap)) if current_platform.is_cuda() else None


@functools.cache
def _library_for(head_dim: int, is_capped: bool) -> RawLibrary | None:
    library = None
    if found := compat.flash_attention(head_dim):
        library = raw_states.flash_attention(*found)
    elif not is_capped:  # xformers has no soft cap
        library = raw_states.xformers()
    if library is None:
        logger.warning(
            "FibQuant attends new tokens by a kernel of its own, several times slower than "
            "FlashAttention: vLLM's does not run here, and %s",
            "xformers has no soft cap" if is_capped else "xformers is not there; install it",
        )
    else:
        logger.info("FibQuant attends prompts' new tokens by %s", library.name)
    return library


def host_lists(
    vllm_config: VllmConfig, impls: Collection[FibQuantImpl]
) -> Callable[[CommonAttentionMetadata], dict[str, Any]]:
    """What finds `ops.Batch.query_starts` and `contexts`, by name, of a step of these layers."""
    attends_raw = any(impl.attends_raw for impl in impls)
    # With drafts the host may not know yet how many of the last step's were accepted.
    within_chunks = any(impl.attend.chunk for impl in impls) and not vllm_config.speculative_config

    def found(common: CommonAttentionMetadata) -> dict[str, Any]:
        if not attends_raw:
            return {}
        starts, lens = common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound
        known = within_chunks and lens is not None
        contexts = (lens - starts.diff()).tolist() if known else None
        return {"query_starts": starts.tolist(), "contexts": contexts}

    return found
